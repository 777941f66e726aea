"""Does training keep its promises? Real processes are killed, stopped, starved and fed garbage, and the cases counted.

    python -m tests.reliability                                  # all of it: under 30 minutes on 2 cores
    python -m tests.reliability --only exact_resume job_kills    # part of it, printed only
    python -m tests.reliability --fast                           # what the tests run, printed only

A whole run writes tests/reliability/RELIABILITY.md. The exit code is 1 if any case failed.
"""

import argparse
import datetime
import importlib
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPORT = Path(__file__).with_name("RELIABILITY.md")
TITLES = {
    "exact_resume": "Killed and resumed: the same bits",
    "save_kills": "Killed during a save",
    "job_kills": "One process of two killed at a named point",
    "part_saves": "Checkpoints that all processes write",
    "signals": "SIGTERM and SIGINT",
    "corruption": "Damaged checkpoints",
    "disks": "Full, read-only and vanished disks",
    "world_size": "Resumed with another number of processes",
    "numerics": "Non-finite numbers and loss spikes",
    "lost_ranks": "A rank that fails, hangs or is slow",
    "bad_input": "Bad configurations and token files",
    "malicious": "Files that try to run code",
    "wandb_faults": "wandb fails, raises or stalls",
    "soak": "A long run: memory, descriptors, files",
    "restarts": "Restarted by the supervisor",
}


@dataclass
class Row:
    """One row of the table."""

    name: str
    counts: object  # harness.Counts
    seconds: float
    meaning: str  # what a case is, and when it passes


def run_test(name: str, scale: str, folder: Path) -> Row:
    """Run one test; an exception counts as one failed case."""
    from tests.reliability.harness import Counts

    began = time.monotonic()
    try:
        module = importlib.import_module(f"tests.reliability.{name}")
        meaning = (module.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        counts = module.run(scale, folder)
    except Exception as error:
        traceback.print_exc()
        meaning, counts = "", Counts(1, 0, [f"the test itself failed: {type(error).__name__}: {error}"])
    return Row(name, counts, time.monotonic() - began, meaning)


def machine() -> str:
    """Processor, cores and memory of this machine."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {cores} cores, {memory:.0f} GiB; {platform.system()}"


def report(rows: list[Row], seconds: float) -> str:
    """The text of RELIABILITY.md."""
    import numpy
    import torch

    cases, passed = sum(row.counts.cases for row in rows), sum(row.counts.passed for row in rows)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {numpy.__version__}"
    lines = [
        "# Reliability, measured",
        "",
        "Written by `python -m tests.reliability`, which anyone can run: real processes, real signals, real files.",
        "",
        f"{datetime.date.today()}; {machine()}; {versions}. **{passed:,} of {cases:,} cases passed**, in"
        f" {seconds / 60:.0f} minutes.",
        "",
        "| what | cases | passed | seconds | figures |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        c = row.counts
        lines.append(f"| {TITLES[row.name]} | {c.cases:,} | {c.passed:,} | {row.seconds:.0f} | {c.figures} |")
    lines += ["", "## What a case is, and when it passes", ""]
    for row in rows:
        lines += [f"**{TITLES[row.name]}** (`tests/reliability/{row.name}.py`). {row.meaning}", ""]
    failures = [f"- {TITLES[row.name]}: {failure}" for row in rows for failure in row.counts.failures]
    if failures:
        lines += ["## What failed", "", *failures, ""]
    return "\n".join(lines)


def main() -> int:
    """Run the tests asked for; 1 if a case failed."""
    parser = argparse.ArgumentParser("python -m tests.reliability", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(TITLES), metavar="TEST", help=", ".join(TITLES))
    parser.add_argument("--fast", action="store_true", help="a few cases of each, as the tests run them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all runs and logs")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    os.environ["MATECONV_RELIABILITY_SEED"] = str(arguments.seed)

    folder, began, rows = Path(tempfile.mkdtemp(prefix="reliability_")), time.monotonic(), []
    try:
        for name in arguments.only or TITLES:
            (folder / name).mkdir()
            row = run_test(name, "fast" if arguments.fast else "full", folder / name)
            rows.append(row)
            c = row.counts
            print(f"{name:14} {c.passed:5,} of {c.cases:5,} passed  {row.seconds:5.0f} s  {c.figures}", flush=True)
            for failure in c.failures:
                print(f"    {failure}", flush=True)
            if not arguments.keep:
                shutil.rmtree(folder / name, ignore_errors=True)
    finally:
        if arguments.keep:
            print(f"the runs and their logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    text = report(rows, time.monotonic() - began)
    if arguments.only is None and not arguments.fast:
        REPORT.write_text(text, encoding="utf-8")
        print(f"wrote {REPORT}")
    else:
        print(f"\n{text}")
    return int(any(row.counts.passed < row.counts.cases for row in rows))


if __name__ == "__main__":
    sys.exit(main())
