"""A case is a run that is killed some steps after a checkpoint and then resumed. It passes if every step from there on
reads the same samples and logs the same loss, gradient norm and learning rate to the last bit, and if the run ends with
the same SHA-256 of the full state (weights, moving average, optimizer, float16 scaler, position, patience, random
states of all ranks) as a run that was never interrupted. Cases cover 1 and 2 processes; float32, bfloat16, and float16
with real overflows before and after the cut; accumulation 1 and 3; cuts in mid-epoch, at the edge of an epoch, and
while early stopping counts evaluations without improvement. Dropout 0.1 and EMA are on, epochs end with a shorter step,
and early stopping ends the run.
"""

import functools
import itertools
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.harness import Counts, Data, Job, finish, last_line, make_data, run_cases, start
from tests.reliability.states import differences, fingerprint, left_lying, logged, state_of

CUTS = ("mid-epoch", "epoch's edge", "early-stop window")
DTYPES = ("float32", "bfloat16", "float16")
ROWS = 2  # samples that a process reads at once
STEPS_AN_EPOCH = 4  # three of them, and one of half the rows
# The rate rises until the loss does, so that early stopping has something to stop.
FLAGS = {
    "batch_size": ROWS, "max_steps": None, "epochs": 9, "eval_interval": 1, "keep_last": 99, "learning_rate": 0.2,
    "warmup_steps": 30, "grad_clip": 0, "use_ema": "true", "ema_decay": 0.5, "dropout": 0.1, "early_stopping": "true",
    "patience": 4,
}  # fmt: skip
OPTIONS = {
    "environment": {"MATECONV_EMULATE_DTYPE": "1"},
    "setup": ("tests.reliability.exact_resume:scale_high", {"init_scale": 2.0**22, "growth_interval": 4}),
}


def scale_high(init_scale: float, growth_interval: int) -> None:
    """Let the float16 scaler begin so high, and rise so often, that gradients overflow again and again."""
    import torch

    begin = torch.amp.GradScaler.__init__

    def high(self, *args, **kwargs):
        begin(self, *args, **kwargs | {"init_scale": init_scale, "growth_interval": growth_interval})

    torch.amp.GradScaler.__init__ = high


@dataclass
class Whole:
    """An uninterrupted run, which the resumed ones are compared with."""

    folder: Path
    data: Data
    job: Job
    rows_a_step: int
    samples: int

    def steps(self) -> list[int]:
        return sorted(int(path.stem.rsplit("_", 1)[1]) for path in self.folder.glob("checkpoint_step_*.pth"))

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint_step_{step}.pth"

    def tries(self, step: int) -> int:
        """Optimizer steps tried, skipped ones included, when the run was at this step."""
        epochs, rest = divmod(state_of(self.checkpoint(step))["progress"]["samples"], self.samples)
        return epochs * STEPS_AN_EPOCH + -(-rest // self.rows_a_step)

    def skips(self) -> list[int]:
        """Which of the tried steps, counted from 0, overflowed."""
        scales = self.job.reads(0, "scale")
        return [number for number, (a, b) in enumerate(itertools.pairwise([2.0**22, *scales])) if b < a]

    def cut(self, kind: str, dtype: str) -> int:
        """The first step that is such a cut, is followed by two more, and in float16 lies between two overflows."""
        last = self.steps()[-1]
        for step in self.steps():
            progress = state_of(self.checkpoint(step))["progress"]
            at_edge, waiting = progress["samples"] % self.samples == 0, progress["evaluations_without_gain"] > 0
            found = {"mid-epoch": not at_edge and not waiting, "epoch's edge": at_edge, "early-stop window": waiting}
            skips, tries = self.skips(), self.tries(step)
            between = dtype != "float16" or (any(s < tries for s in skips) and any(s >= tries for s in skips))
            if found[kind] and between and self.tries(last) >= tries + 2 and (step > 1 or kind != "mid-epoch"):
                return step
        raise AssertionError(f"no step of this run is a cut of this kind ({kind})")


class Runs:
    """Uninterrupted runs, each made once for its three cuts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self.locks: dict[tuple, threading.Lock] = {}
        self.done: dict[tuple, Whole] = {}

    def get(self, ranks: int, dtype: str, accumulation: int) -> Whole:
        key = ranks, dtype, accumulation
        with self.lock:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.done:
                self.done[key] = self._make(*key)
            return self.done[key]

    def _make(self, ranks: int, dtype: str, accumulation: int) -> Whole:
        rows = ROWS * ranks * accumulation
        samples = rows * (STEPS_AN_EPOCH - 1) + rows // 2
        data = make_data(self.folder / "data", samples=samples, validation_samples=4)
        out = self.folder / f"whole_{ranks}_{dtype}_{accumulation}"
        flags = data.flags(out, **FLAGS, dtype=dtype, accumulation_steps=accumulation, save_interval=1)
        job = finish(flags, ranks, **OPTIONS)
        if "early stopping after step" not in job.stderr():
            raise RuntimeError(f"the uninterrupted run was not stopped early: {last_line(job)}")
        return Whole(out, data, job, rows, samples)


def case(runs: Runs, ranks: int, dtype: str, accumulation: int, kind: str) -> list[str]:
    """Kill, resume, compare; returns what is not the same."""
    whole = runs.get(ranks, dtype, accumulation)
    step = whole.cut(kind, dtype)
    out = runs.folder / f"{ranks}_{dtype}_{accumulation}_{CUTS.index(kind)}"
    flags = whole.data.flags(out, **FLAGS, dtype=dtype, accumulation_steps=accumulation, save_interval=step)
    saved = out / f"checkpoint_step_{step}.pth"
    read = (whole.tries(step) + 2) * accumulation  # the last read of the second step after the cut
    killed = start(flags, ranks, [("reading a batch", read, None, "kill", str(saved))], **OPTIONS)
    killed.code(0, 60)
    killed.kill()
    if not any(killed.struck(rank) for rank in range(ranks)):
        return [f"was not killed: {last_line(killed)}"]
    for name in ("_step_" + str(later) for later in whole.steps() if later > step):
        if (out / f"checkpoint{name}.pth").exists():
            return [f"checkpoint{name}.pth was saved before the kill"]
    problems = [f"at the cut {part} is not the same" for part in differences(whole.checkpoint(step), saved)]

    resumed = start(flags | {"resume": "true"}, ranks, **OPTIONS)
    codes = resumed.wait()
    if any(codes) or f"at step {step:,}" not in resumed.stderr():
        return [*problems, f"resuming ended with {codes}: {last_line(resumed)}"]
    return problems + compare(whole, out, killed, resumed)


def compare(whole: Whole, out: Path, killed: Job, resumed: Job) -> list[str]:
    """What the killed and the resumed run did otherwise than the whole one."""
    problems = []
    for rank in range(whole.job.ranks):
        for key in ("samples", "scale"):
            expected, first, then = whole.job.reads(rank, key), killed.reads(rank, key), resumed.reads(rank, key)
            if first != expected[: len(first)] or then != expected[len(expected) - len(then) :]:
                problems.append(f"rank {rank} had another {key} in some step")
            if key == "samples" and not len(expected) > len(then) > len(expected) - len(first):
                problems.append(f"rank {rank}: {len(first)} reads, then {len(then)}, of {len(expected)}")
    if logged(out) != logged(whole.folder):
        problems.append("metrics.jsonl differs")
    last = whole.steps()[-1]
    ends = whole.checkpoint(last), out / whole.checkpoint(last).name
    if not ends[1].exists() or fingerprint(ends[0]) != fingerprint(ends[1]):
        parts = differences(*ends) if ends[1].exists() else ["it is missing"]
        problems.append(f"the last checkpoint differs: {', '.join(parts)}")
    for name in ("pretrain_32.pth", "best_model.pth"):
        if not (out / name).exists() or (out / name).read_bytes() != (whole.folder / name).read_bytes():
            problems.append(f"{name} differs")
    return problems + [f"left lying: {name}" for name in left_lying(out)]


def run(scale: str, folder: Path) -> Counts:
    """All 36 cases; "fast": 2 processes in float16 cut in mid-epoch, and 1 in float32 while early stopping waits."""
    runs = Runs(folder)
    chosen = list(itertools.product((1, 2), DTYPES, (1, 3), CUTS))
    if scale == "fast":
        chosen = [(2, "float16", 3, "mid-epoch"), (1, "float32", 1, "early-stop window")]
    names = {
        f"{r} ranks, {d}, accumulation {a}, {k}": functools.partial(case, runs, r, d, a, k) for r, d, a, k in chosen
    }
    counts = run_cases(names)
    overflows = sum(len(whole.skips()) for key, whole in runs.done.items() if key[1] == "float16")
    steps = sum(whole.steps()[-1] for whole in runs.done.values())
    counts.figures = f"{len(runs.done)} uninterrupted runs of {steps} steps with {overflows} float16 overflows"
    for out in folder.glob("[0-9]_*"):
        shutil.rmtree(out, ignore_errors=True)
    return counts
