"""One case is a real process that trains for 3,000 steps with 30 saves and 6 evaluations, watched from outside every
second. It passes if from step 300 to the end its memory (resident set) grows by less than 5 %, if it has as many open
descriptors and threads at the end as at step 300, and if exactly the newest keep_last checkpoints are in its folder,
beside the weights and logs.
"""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.harness import Counts, Job, last_line, make_data, run_cases, start
from tests.reliability.states import file_names, left_lying

TITLE = "A long run does not grow"
KEEP_LAST, MAX_GROWTH = 3, 1.05
SETTLED = 0.1  # the part of the run after which nothing may grow any more
ALWAYS = {".lock", "best_model.json", "best_model.pth", "config.yaml", "metrics.jsonl", "pretrain_32.json"}
ALWAYS |= {"pretrain_32.pth", "status.json"}


@dataclass
class Sample:
    """What a process used at one moment."""

    step: int  # the last one that status.json names
    memory: int  # kB; 0 where the system does not tell
    descriptors: int
    threads: int


def run(scale: str, folder: Path) -> Counts:
    """The one case; "fast": 300 steps, 6 saves, and no look at memory."""
    steps, saves, evaluations = (3000, 30, 6) if scale == "full" else (300, 6, 1)
    data = make_data(folder / "data")
    flags = data.flags(
        folder / "out",
        max_steps=steps,
        save_interval=steps // saves,
        eval_interval=steps // evaluations,
        keep_last=KEEP_LAST,
        log_interval=10,
    )
    figures = []

    def case() -> list[str]:
        job = start(flags, record=False)
        samples = watch(job, folder / "out", every=1.0 if scale == "full" else 0.05)
        codes = job.wait()
        if codes != [0]:
            return [f"ended with {codes}: {last_line(job)}"]
        settled = [sample for sample in samples if sample.step >= steps * SETTLED]
        figures.append(describe(settled, steps))
        return growth_problems(settled, scale == "full") + file_problems(folder / "out", steps, steps // saves)

    counts = run_cases({f"{steps} steps, {saves} saves": case})
    counts.figures = "".join(figures)
    return counts


def watch(job: Job, out: Path, every: float) -> list[Sample]:
    """Look at the process every so many seconds until it ends."""
    samples, end = [], time.monotonic() + 900
    while job.code(0, every) is None and time.monotonic() < end:
        sample = look(job.pid(0), out)
        if sample is not None:
            samples.append(sample)
    return samples


def look(pid: int, out: Path) -> Sample | None:
    """What the process uses now; None where it does not train yet, or no more."""
    try:
        status = json.loads((out / "status.json").read_text(encoding="utf-8"))
        if status["state"] != "running":
            return None
        step = status["step"]
        if not Path("/proc/self/status").exists():
            reported = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
            return Sample(step, int(reported.stdout), 0, 0)
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return Sample(step, int(values["VmRSS"].split()[0]), descriptors, int(values["Threads"]))
    except (OSError, ValueError, KeyError):
        return None


def parts(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The first and the last fifth, of three samples at least: a save or a log line opens a file for a moment."""
    size = max(3, len(samples) // 5)
    return samples[:size], samples[-size:]


def growth_problems(samples: list[Sample], of_memory: bool) -> list[str]:
    """What grew between the first and the last samples."""
    if len(samples) < 3:
        return [f"only {len(samples)} samples were taken"]
    (first, last), problems = parts(samples), []
    for name in ("descriptors", "threads"):
        before, after = (min(getattr(sample, name) for sample in part) for part in (first, last))
        if before != after:
            problems.append(f"{before} {name} at the beginning, {after} at the end")
    before, after = first[0].memory, last[-1].memory
    if of_memory and after > MAX_GROWTH * before:
        problems.append(f"{before:,} kB at the beginning, {after:,} kB at the end")
    return problems


def describe(samples: list[Sample], steps: int) -> str:
    """The numbers, for the report."""
    if not samples:
        return "no samples"
    first, last = parts(samples)
    growth = 100 * (last[-1].memory / max(1, first[0].memory) - 1)
    before, after = (
        [min(getattr(s, name) for s in part) for name in ("descriptors", "threads")] for part in (first, last)
    )
    return (
        f"memory {first[0].memory / 1024:.1f} MiB at step {samples[0].step}, {last[-1].memory / 1024:.1f} MiB at the"
        f" end ({growth:+.1f} %, {len(samples)} samples); descriptors {before[0]} and {after[0]}, threads"
        f" {before[1]} and {after[1]}; {steps} steps"
    )


def file_problems(out: Path, steps: int, save_interval: int) -> list[str]:
    """Whether exactly the files lie there that should."""
    kept = {f"checkpoint_step_{steps - number * save_interval}.pth" for number in range(KEEP_LAST)}
    wrong = sorted((file_names(out) - {"curves.png"}) ^ (kept | ALWAYS))
    return [f"{name} is there or missing" for name in wrong] + [f"left lying: {name}" for name in left_lying(out)]
