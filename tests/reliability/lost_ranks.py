"""A case is a run of two or three processes, one of which raises an exception, exits, is killed, hangs or is stopped at
a named point. It passes if every process ends within ddp_timeout + 60 s of the fault (one that is stopped, or hangs
before it has met the others, is killed, as torchrun would do), if the others end with 3 and name the process, with its
exception if it had one, if status.json says "failed" where rank 0 survives, and if `--resume` then ends with the
SHA-256 of the full state of an uninterrupted run. Uneven data, early stopping, and a save or a first step that takes
longer than ddp_timeout must not end a run.
"""

import functools
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.runs.status import read_status
from tests.reliability.harness import HANG, Counts, Data, Job, finish, last_line, make_data, run_cases, start
from tests.reliability.states import fingerprint, left_lying

TITLE = "A process of several fails"
TIMEOUT = 4.0  # ddp_timeout, seconds
GRACE = 60.0  # how much later all must have ended on a busy machine: 1 to 2 s on a quiet one
LAUNCHER_TIMEOUT = 12.0  # under torchrun, whose processes import for seconds
PATIENCE = 300.0  # a launcher's imports included
LAST = "checkpoint_step_12.pth"
POINTS = {  # and when it happens: in the sixth step, at the second evaluation and save
    "reading a batch": 6,
    "forward": 6,
    "backward": 6,
    "evaluation": 3,
    "gathering the states": 2,
}
SHARED = {"exchanging weights": 6, "gathering the shares": 90}  # the same where ranks share the optimizer
KINDS = ("raise", "kill", "hang", "stop")


@dataclass
class Case:
    """What happens to which process of how many."""

    kind: str
    point: str
    occurrence: int = 1
    rank: int = 1
    ranks: int = 2
    launcher: bool = False
    shard: str = "none"


def all_cases() -> dict[str, Case]:
    """Every kind at every point, and what differs with rank 0, with three processes, and at the start."""
    cases = [Case(kind, point, occurrence) for point, occurrence in POINTS.items() for kind in KINDS]
    cases += [Case(kind, point, occurrence, shard="full") for point, occurrence in POINTS.items() for kind in KINDS[1:]]
    cases += [
        Case(kind, point, occurrence, shard="optimizer") for point, occurrence in SHARED.items() for kind in KINDS
    ]
    cases.append(Case("kill", "exchanging weights", 6, 0, shard="optimizer"))
    cases.append(Case("hang", "gathering the shares", 90, 2, 3, shard="optimizer"))
    cases += [Case("exit:7", "forward", 6), Case("exit:7", "gathering the states", 2)]
    cases += [Case(kind, "start") for kind in ("kill", "hang")]
    cases += [Case(kind, "backward", 6, rank=0) for kind in KINDS]
    cases += [Case("kill", "forward", 6, 2, 3), Case("hang", "backward", 6, 1, 3), Case("raise", "evaluation", 3, 2, 3)]
    cases += [Case(kind, "forward", 6, launcher=True) for kind in ("raise", "hang")]
    return {
        f"{c.kind} at {c.point}, rank {c.rank} of {c.ranks}{', under torchrun' if c.launcher else ''}"
        f"{', sharing weights' if c.shard == 'full' else ''}": c
        for c in cases
    }


def run(scale: str, folder: Path) -> Counts:
    """All cases and four slow or uneven runs; "fast": eight."""
    lab = Lab(folder)
    chosen = all_cases()
    if scale == "fast":
        names = (
            "raise at forward, rank 1 of 2",
            "kill at gathering the states, rank 1 of 2",
            "hang at backward, rank 1 of 2",
            "stop at backward, rank 0 of 2",
            "kill at forward, rank 2 of 3",
            "kill at backward, rank 1 of 2, sharing weights",
            "kill at exchanging weights, rank 1 of 2",
            "hang at exchanging weights, rank 1 of 2",
        )
        chosen = {name: chosen[name] for name in names}
    cases: dict[str, Callable] = {
        name: functools.partial(lab.play, folder / f"case_{number}", case)
        for number, (name, case) in enumerate(chosen.items())
    }
    if scale == "full":
        cases |= {
            "samples that do not fill the last step": lab.uneven,
            "early stopping": lab.early_stopping,
            "a save that takes three times ddp_timeout": lab.slow_save,
            "a first step that takes twice ddp_timeout": lab.slow_first_step,
        }
    counts = run_cases(cases, at_once=3)
    if lab.seconds:
        counts.figures = f"all processes ended at most ddp_timeout {max(lab.seconds):+.1f} s after the fault"
    return counts


class Lab:
    """Data, uninterrupted runs, and how long after a fault the processes ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, make_data(folder / "data")
        self.seconds: list[float] = []
        self.lock, self.whole = threading.Lock(), {}

    def flags(self, out: Path, data: Data | None = None, **changes) -> dict[str, str]:
        return (data or self.data).flags(out, **{"batch_size": 2, "ddp_timeout": TIMEOUT} | changes)

    def expected(self, ranks: int) -> str:
        """The fingerprint of an uninterrupted run."""
        with self.lock:
            if ranks not in self.whole:
                finish(self.flags(self.folder / f"whole_{ranks}"), ranks)
                self.whole[ranks] = fingerprint(self.folder / f"whole_{ranks}" / LAST)
            return self.whole[ranks]

    def play(self, out: Path, case: Case) -> list[str]:
        """Run one case; returns what is not as it should be."""
        expected = self.expected(case.ranks)
        saved = None if case.point == "start" else str(out / "checkpoint_step_4.pth")
        fault = (case.point, case.occurrence, case.rank, case.kind, saved)
        timeout = LAUNCHER_TIMEOUT if case.launcher else TIMEOUT
        flags = self.flags(out, ddp_timeout=timeout, shard=case.shard)
        job = start(flags, case.ranks, fault, launcher=case.launcher)
        codes, seconds = ends(job, case)
        if not job.struck(case.rank):
            return [f"the fault did not happen: {last_line(job)}"]
        problems = code_problems(job, case, codes) + said_problems(job, case)
        slowest = max(seconds)
        self.seconds.append(slowest - timeout)
        if slowest > timeout + GRACE:
            problems.append(f"ended only {slowest:.1f} s after the fault")
        status = read_status(out)
        if case.rank != 0 and case.point != "start" and (status is None or status["state"] != "failed"):
            problems.append(f"status.json says {status and status['state']}")
        return problems + self.restart_problems(out, case.ranks, expected)

    def restart_problems(self, out: Path, ranks: int, expected: str) -> list[str]:
        """Go on from the newest checkpoint; where there is none yet, start again."""
        resume = "true" if (out / "checkpoint_step_4.pth").exists() else None
        job = start(self.flags(out, resume=resume), ranks)
        codes = job.wait()
        if any(codes):
            return [f"starting again ended with {codes}: {last_line(job)}"]
        if fingerprint(out / LAST) != expected:
            return ["started again, it ended with another state than the uninterrupted run"]
        return [f"left lying: {name}" for name in left_lying(out)]

    # ------------------------------------------------------------------------------- what must not end a run

    def uneven(self) -> list[str]:
        """Two epochs of 45 samples in steps of 4 rows."""
        data = make_data(self.folder / "data", samples=45)
        flags = self.flags(self.folder / "uneven", data, max_steps=None, epochs=2)
        job = start(flags, 2)
        problems = finished_problems(job)
        read = [sample for rank in range(2) for rows in job.reads(rank) for sample in rows]
        return problems + ([] if sorted(read) == sorted([*range(45)] * 2) else ["samples were left out or read twice"])

    def early_stopping(self) -> list[str]:
        flags = {"learning_rate": 0.2, "grad_clip": 0, "early_stopping": "true", "patience": 2, "eval_interval": 1}
        job = start(self.flags(self.folder / "early", **flags, max_steps=200, save_interval=100), 2)
        problems = finished_problems(job)
        return problems + ([] if "early stopping after step" in job.stderr() else ["it was not stopped early"])

    def slow_save(self) -> list[str]:
        """The disk takes 12 s for the first checkpoint and for the last one."""
        faults = [("before the rename of a checkpoint", number, 0, "sleep:12") for number in (1, 3)]
        job = start(self.flags(self.folder / "slow_save"), 2, faults)
        return finished_problems(job) + self.state_problems(self.folder / "slow_save")

    def slow_first_step(self) -> list[str]:
        job = start(self.flags(self.folder / "slow_step"), 2, ("forward", 1, 1, "sleep:8"))
        return finished_problems(job) + self.state_problems(self.folder / "slow_step")

    def state_problems(self, out: Path) -> list[str]:
        if (out / LAST).exists() and fingerprint(out / LAST) == self.expected(2):
            return []
        return ["it ended with another state than the run that was not slow"]


def finished_problems(job: Job) -> list[str]:
    """What is wrong where both ranks should end with 0."""
    codes = job.wait(PATIENCE)
    return [] if codes == [0, 0] else [f"ended with {codes}: {last_line(job)}"]


def ends(job: Job, case: Case) -> tuple[list[int | str], list[float]]:
    """Each process's exit code, and how many seconds after the fault it ended; one that can't is killed at last."""
    mark, wanted = job.folder / f"fault.rank{case.rank}", list(range(len(job.pids)))
    helpless = case.rank if case.kind == "stop" or (case.kind, case.point) == ("hang", "start") else None
    codes, ended = dict.fromkeys(wanted), dict.fromkeys(wanted, 0.0)
    patience = time.monotonic() + PATIENCE + TIMEOUT + GRACE
    while time.monotonic() < patience and (None in codes.values()):
        for rank in wanted:
            if codes[rank] is None and (code := job.code(rank)) is not None:
                codes[rank], ended[rank] = code, time.time()
        if helpless is not None and all(code is not None for rank, code in codes.items() if rank != helpless):
            job.signal(signal.SIGKILL, helpless)
            helpless = None
        time.sleep(0.02)
    if None in codes.values():
        job.wait(0)  # which asks where they hang, and kills
    struck = mark.stat().st_mtime if mark.exists() else time.time()
    late = [time.time() - struck if codes[rank] is None else ended[rank] - struck for rank in wanted]
    return [HANG if codes[rank] is None else codes[rank] for rank in wanted], late


def code_problems(job: Job, case: Case, codes: list) -> list[str]:
    """Whether the survivors ended with 3, and the one that failed as it must."""
    survivors = (3,)
    if case.launcher:
        if case.kind == "hang" and not re.search(r"exitcode\s*: 3", job.stderr("launcher")):
            return ["no exit code 3 in what torchrun said"]
        codes = [job.exit_code(rank) for rank in range(case.ranks)]
        survivors = (3, None)  # the watch ends the process at once, and torchrun those that are left
    own = {"raise": (1,), "exit:7": (7,), "kill": (-9,), "stop": (-9,), "hang": (3,)}[case.kind]
    own = (-9,) if (case.kind, case.point) == ("hang", "start") else own
    own = (3, None) if case.launcher and case.kind == "hang" else own
    wrong = [
        f"rank {rank} ended with {code}: {last_line(job)}"
        for rank, code in enumerate(codes)
        if code not in (own if rank == case.rank else survivors)
    ]
    return wrong[:1]


def said_problems(job: Job, case: Case) -> list[str]:
    """Whether the survivors named the process, and its exception."""
    problems = []
    for rank in range(case.ranks):
        if rank == case.rank:
            continue
        lines = [line for line in job.stderr(rank).splitlines() if "error: " in line]
        named = len(lines) == 1 and f"rank {case.rank} " in lines[0].partition("error: ")[2]
        if not named or (case.kind == "raise" and f"injected at {case.point}" not in lines[0]):
            problems.append(f"rank {rank} said {lines or 'nothing'}")
        if "Traceback" in job.stderr(rank):
            problems.append(f"rank {rank} ended with a traceback")
    return problems
