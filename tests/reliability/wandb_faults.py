"""A case is a run with a wandb that fails at a named place: it raises, stalls for ten minutes, or dies, and
it also seeds the global random generators and leaves a thread and a hook that hold up the exit. It passes if the run
exits with 0 before the stall is over, if its weights and its full state have the SHA-256 of a run without wandb, if
metrics.jsonl has every line, and if one line informs the user.
"""

import hashlib
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tests.reliability.harness import ROOT, Counts, Job, last_line, make_data, run_cases, start
from tests.reliability.states import fingerprint, logged

TITLE = "wandb fails, raises or stalls"
FAULTS = {
    "fast": ("log raises", "init stalls"),
    "full": ("init raises", "init stalls", "log raises", "log stalls", "log dies", "finish stalls"),
}
STEPS = 60
FLAGS = {"max_steps": STEPS, "eval_interval": 20, "save_interval": STEPS, "dropout": 0.1, "use_ema": "true"}


def run(scale: str, folder: Path) -> Counts:
    """Run the cases of a scale, "fast" or "full", one after the other, since their time is measured."""
    data = make_data(folder / "data")
    timed(data.flags(folder / "first", **FLAGS))  # what is slow only once is not counted
    added: dict[str, float] = {}

    def case(fault: str) -> Iterable[str]:
        """A run without wandb, and right after it one with the fault."""
        name = fault.replace(" ", "_")
        without, out = folder / f"{name}_without", folder / name
        its_seconds = timed(data.flags(without, **FLAGS))[1]
        environment = {"FAKE_TRACKER_FAULT": fault, "FAKE_TRACKER_LOG": folder / f"{name}.jsonl"}
        fake = ("tests.reliability.wandb_faults:use_fake", {})
        job, seconds = timed(data.flags(out, use_wandb="true", **FLAGS), environment=environment, setup=fake)
        added[fault] = seconds - its_seconds
        if job.code() != 0:
            return [f"ended with {job.code()}: {last_line(job)}"]
        return problems(out, without, job)

    counts = run_cases({fault: partial(case, fault) for fault in FAULTS[scale]}, at_once=1)
    counts.figures = "added time: " + ", ".join(f"{fault} {seconds:.1f} s" for fault, seconds in added.items())
    return counts


def timed(flags: dict, **options) -> tuple[Job, float]:
    """Run a training to its end; how many seconds it took from its start to the end of its process."""
    clock = time.monotonic()
    job = start(flags, **options)
    job.wait(300)  # a stall takes 600
    return job, time.monotonic() - clock


def problems(out: Path, without: Path, job: Job) -> Iterable[str]:
    """What is not as in the run without wandb."""
    for name in ("pretrain_32.pth", "best_model.pth"):
        first, second = (hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (without, out))
        if first != second:
            yield f"{name} is not the same"
    checkpoint = f"checkpoint_step_{STEPS}.pth"
    if fingerprint(without / checkpoint) != fingerprint(out / checkpoint):
        yield "the full state is not the same"
    if logged(without) != logged(out):
        yield "metrics.jsonl is not the same"
    told = [line for line in job.stderr().splitlines() if line.startswith("wandb: ") and "https" not in line]
    if len(told) != 1 or "Traceback" in job.stderr():
        yield f"{len(told)} lines about it, not 1: {last_line(job)}"


def use_fake() -> None:
    """Put the tests' fake wandb before the real one; called in the training process."""
    sys.path.insert(0, str(ROOT / "tests" / "fake_trackers"))
