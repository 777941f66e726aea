"""A case is one SIGKILL of a training that saves after every step, at a random instant within a save: its temporary
file exists, or a checkpoint that has not been reported yet. It passes if afterwards the newest checkpoint is whole and
no older than the last one reported, if claiming the folder leaves no temporary file, if at most keep_last + 1
checkpoints remain, and if a real `--resume` continues from it. After all its kills each run is finished, and its last
state must have the bits of a run that was never killed.
"""

import functools
import random
import re
import time
from pathlib import Path

from model.runs.folder import checkpoints_by_step, claim
from tests.reliability.harness import Counts, Data, finish, last_line, make_data, run_cases, start
from tests.reliability.states import differences, resumed_from

KEEP_LAST = 2
LONGEST_WAIT = 0.06  # seconds from the first save of a process to its kill: some saves


class Chain:
    """One run, killed again and again."""

    def __init__(self, data: Data, out: Path, seed: int, steps: int) -> None:
        self.out, self.random, self.steps = out, random.Random(seed), steps
        own = {"save_interval": 1, "eval_interval": steps, "max_steps": steps, "keep_last": KEEP_LAST}
        self.flags = data.flags(out, **own, use_ema="true", dropout=0.1)
        self.reported = 0  # step of the newest checkpoint that was reported as saved
        self.kills = self.inside = 0
        self.was_inside = self.over = False  # over: the run came to its end
        self.left = {"temporary file": 0, "not yet reported": 0}

    def kill_once(self) -> list[str]:
        """Start or resume, kill, look; returns what is wrong. Whether it struck inside a save is in `was_inside`."""
        newest, _ = resumed_from(self.out)
        expected = newest.content["progress"]["step"] if newest else None
        job = start(self.flags | ({"resume": "true"} if newest else {}), record=False)
        job.said(f"saved {self.out}")
        time.sleep(self.random.uniform(0, LONGEST_WAIT))
        ended = job.code(0)
        job.kill()
        said = job.stderr()
        if ended == 0:
            self.over = True
            return []
        if ended is not None:
            return [f"ended by itself with {ended}: {last_line(job)}"]
        saved = [int(step) for step in re.findall(r"saved \S*checkpoint_step_(\d+)\.pth", said)]
        self.reported = max([self.reported, *saved])
        self.kills += 1
        problems = self._look()
        if expected and f"at step {expected:,}" not in said:
            problems.append(f"did not go on from step {expected}")
        return problems

    def _look(self) -> list[str]:
        """What is wrong in the folder after a kill."""
        temporary = any(self.out.glob("checkpoint_*.tmp"))
        steps = [step for step, _ in checkpoints_by_step(self.out)]
        unreported = bool(steps) and max(steps) > self.reported
        self.was_inside = temporary or unreported
        self.inside += self.was_inside
        self.left["temporary file"] += temporary
        self.left["not yet reported"] += unreported and not temporary
        problems = []
        try:
            found, passed_over = resumed_from(self.out)
            step = found.content["progress"]["step"] if found else 0
            if step < self.reported:
                problems.append(f"step {self.reported} was reported as saved, but {step} is the newest that is whole")
            if passed_over:
                problems.append(f"a damaged checkpoint: {passed_over[0]}")
        except Exception as error:
            problems.append(f"no checkpoint can be read: {error}")
        if len(steps) > KEEP_LAST + 1:
            problems.append(f"{len(steps)} checkpoints are there")
        claim(self.out).release()
        left = [path.name for path in self.out.rglob("*.tmp")]
        return problems + ([f"left lying after the claim: {', '.join(left)}"] if left else [])

    def last_state(self) -> Path:
        return self.out / f"checkpoint_step_{self.steps}.pth"


def chain(data: Data, folder: Path, seed: int, wanted: int, found: list) -> list[str]:
    """Kill one run inside `wanted` saves, then finish it and compare it with one that was not killed."""
    killed = Chain(data, folder / f"killed_{seed}", seed, steps=15 * wanted)
    for _ in range(20 * wanted):
        problems = killed.kill_once()
        if killed.over:
            break
        if killed.was_inside or problems:
            found.append([f"kill {killed.kills} of chain {seed}: {problem}" for problem in problems])
        if killed.inside >= wanted or problems:
            break
    found_kills[seed] = killed
    whole = killed.flags | {"out_dir": str(folder / f"whole_{seed}"), "save_interval": str(killed.steps)}
    finish(whole)
    finish(killed.flags | {"resume": "true", "save_interval": str(killed.steps)})
    last = killed.last_state()
    short = [f"the run ended after {killed.inside} of {wanted} kills within saves"] if killed.inside < wanted else []
    return short + [f"after all: {part} differs" for part in differences(Path(whole["out_dir"]) / last.name, last)]


found_kills: dict[int, Chain] = {}


def run(scale: str, folder: Path) -> Counts:
    """200 kills inside saves, in two runs at a time; "fast": 8, in one run."""
    data = make_data(folder / "data")
    chains, wanted = (10, 20) if scale == "full" else (1, 8)
    found: list[list[str]] = []
    found_kills.clear()
    ends = run_cases({f"chain {n}": functools.partial(chain, data, folder, n, wanted, found) for n in range(chains)})
    failures = [problems[0] for problems in found if problems] + ends.failures
    cases = chains * wanted
    passed = min(cases, sum(not problems for problems in found)) if not ends.failures else 0
    all_kills, inside = (sum(getattr(c, name) for c in found_kills.values()) for name in ("kills", "inside"))
    left = {name: sum(c.left[name] for c in found_kills.values()) for name in ("temporary file", "not yet reported")}
    figures = (
        f"{all_kills} kills, {inside} of them inside a save ({left['temporary file']} left a temporary file,"
        f" {left['not yet reported']} a checkpoint not yet reported); {chains} runs then finished, {ends.passed} with"
        " the same bits"
    )
    return Counts(cases, passed, failures, figures)
