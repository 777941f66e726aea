"""A case is a SIGTERM or SIGINT to a real torchrun, to rank 0 or to rank 1 of two processes, while they train, between
the batches that a step accumulates, or while they evaluate or save; a third of the signals come twice, 0.2 seconds
apart. It passes if both processes end after the same step with the documented exit code (130; 0 under torchrun, which
ends with 0 unless it received the signal), if checkpoint_interrupted.pth is whole, if status.json says "interrupted",
and if `--resume` then ends with the bits of an uninterrupted run.
"""

import functools
import itertools
import json
from pathlib import Path

from tests.reliability.harness import HANG, Counts, Data, Job, finish, last_line, make_data, run_cases, start
from tests.reliability.job_kills import compare
from tests.reliability.states import state_of

STEPS = 16
FLAGS = {
    "batch_size": 2, "accumulation_steps": 2, "max_steps": STEPS, "save_interval": 8, "eval_interval": 8,
    "keep_last": 1, "use_ema": "true", "dropout": 0.1,
}  # fmt: skip
# Point, occurrence, and the step after which all must stop. They agree before the optimizer's step: a signal that comes
# later stops the next one.
MOMENTS = {
    "training": ("before the optimizer's step", 6, 7),
    "between accumulated batches": ("reading a batch", 12, 6),
    "evaluation": ("evaluation", 1, 8),
    "saving": ("gathering the states", 1, 9),
}


def case(data: Data, folder: Path, whole: Path, number: str, target: str, moment: str) -> list[str]:
    """Send the signal at that moment, look, resume, compare."""
    point, occurrence, stops_at = MOMENTS[moment]
    out = folder / f"{number}_{target}_{list(MOMENTS).index(moment)}"
    flags = data.flags(out, **FLAGS)
    twice = "*2" if moment == "between accumulated batches" else ""
    rank = 1 if target == "rank1" else 0
    # One signal to a rank goes under torchrun too: that torchrun must end with 0.
    launcher = target == "launcher" or (target, number) == ("rank1", "term")
    job = start(flags, 2, (point, occurrence, rank, f"{number}@{target}{twice}+1"), launcher=launcher)
    codes = job.wait()
    if not job.struck(rank):
        return [f"the point was not reached: {codes} {last_line(job)}"]
    problems = look(job, out, codes, target, launcher, stops_at)
    if HANG in codes or not (out / "checkpoint_interrupted.pth").exists():
        return problems
    resumed = start(flags | {"resume": "true"}, 2)
    codes = resumed.wait()
    if any(codes):
        return [*problems, f"resuming ended with {codes}: {last_line(resumed)}"]
    return problems + compare(whole, out, STEPS)


def look(job: Job, out: Path, codes: list, target: str, launcher: bool, stops_at: int) -> list[str]:
    """What is wrong with how a run was interrupted."""
    problems = []
    expected = 0 if launcher else 130
    ended = [job.exit_code(rank) for rank in range(2)]
    if HANG in codes:
        return [f"hung: {last_line(job)}"]
    if ended != [expected] * 2 or (not launcher and codes != ended):
        problems.append(f"the processes ended with {ended} ({codes}), not {expected}: {last_line(job)}")
    if launcher and target != "launcher" and codes != [0]:
        problems.append(f"torchrun ended with {codes[0]}, though it was not sent the signal: {last_line(job)}")
    reads = [len(job.reads(rank)) for rank in range(2)]
    if reads[0] != reads[1] or reads[0] != stops_at * FLAGS["accumulation_steps"]:
        problems.append(f"stopped after {reads} batches, not both after step {stops_at}")
    if not (out / "checkpoint_interrupted.pth").exists():
        return [*problems, f"no checkpoint_interrupted.pth: {last_line(job)}"]
    step = state_of(out / "checkpoint_interrupted.pth")["progress"]["step"]
    if step != stops_at:
        problems.append(f"checkpoint_interrupted.pth is of step {step}, not {stops_at}")
    if f"stopped after step {step}" not in job.stderr():
        problems.append(f"does not say that it stopped: {last_line(job)}")
    status = json.loads((out / "status.json").read_text())
    found = [status[key] for key in ("state", "step", "exit_code", "checkpoint")]
    if found != ["interrupted", step, expected, "checkpoint_interrupted.pth"]:
        problems.append(f"status.json says {found}")
    return problems


def run(scale: str, folder: Path) -> Counts:
    """2 signals to 3 targets at 3 moments; "fast": SIGINT to rank 1 in an evaluation, SIGTERM twice to rank 0."""
    data = make_data(folder / "data")
    whole = folder / "whole"
    finish(data.flags(whole, **FLAGS), 2)
    chosen = []
    for number, target in itertools.product(("term", "int"), ("launcher", "rank0", "rank1")):
        last = "evaluation" if number == "term" else "saving"
        chosen += [(number, target, moment) for moment in ("training", "between accumulated batches", last)]
    if scale == "fast":
        chosen = [("int", "rank1", "evaluation"), ("term", "rank0", "between accumulated batches")]
    names = {f"SIG{n.upper()} to {t}, {m}": functools.partial(case, data, folder, whole, n, t, m) for n, t, m in chosen}
    counts = run_cases(names)
    doubled = sum(moment == "between accumulated batches" for _, _, moment in chosen)
    counts.figures = f"{doubled} of the signals came twice"
    return counts
