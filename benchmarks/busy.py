"""How long OpenMP threads should spin: training and generation on a quiet machine, and beside busy processes.

    python benchmarks/busy.py                                # all settings, some half an hour on two cores
    python benchmarks/busy.py --settings default 10000 --steps 3 --tokens 20 --rounds 1   # does it run?
    LD_PRELOAD=/path/to/libiomp5.so python benchmarks/busy.py --settings default blocktime_1    # Intel's library

A thread that has nothing to do first spins, which keeps its core, and then sleeps, which takes time to wake from. On a
quiet machine spinning wins; beside other processes each spin takes a core from a thread with work. `model/children.py`
sets what these figures say is the best on both. Each cell is the smallest of --rounds measurements, the settings taking
turns; the weights must be the same bits under every setting with the same number of threads.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {  # name: environment
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "1000": {"GOMP_SPINCOUNT": "1000"},
    "3000": {"GOMP_SPINCOUNT": "3000"},
    "10000": {"GOMP_SPINCOUNT": "10000"},
    "30000": {"GOMP_SPINCOUNT": "30000"},
    "100000": {"GOMP_SPINCOUNT": "100000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "blocktime_0": {"KMP_BLOCKTIME": "0"},
    "blocktime_1": {"KMP_BLOCKTIME": "1"},
    "blocktime_10": {"KMP_BLOCKTIME": "10"},
}
LIBRARY_DEFAULTS = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}  # set, since model/children.py would set ours
GNU = ["default", "passive", "1000", "3000", "10000", "30000", "100000", "one thread"]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that compute and do nothing else."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def run_script(script: str, environment: dict[str, str], *flags: str) -> str:
    """What the script says on stderr.

    Raises:
        SystemExit: it fails.
    """
    chosen = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", *LIBRARY_DEFAULTS)}
    command = [sys.executable, str(ROOT / script), *flags]
    chosen |= environment if "OMP_WAIT_POLICY" in environment else LIBRARY_DEFAULTS | environment
    ended = subprocess.run(command, cwd=ROOT, env=chosen, capture_output=True, text=True, encoding="utf-8")
    if ended.returncode:
        sys.exit(f"{script} ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}")
    return ended.stderr


def train(environment: dict[str, str], steps: int, folder: Path) -> tuple[float, str]:
    """Seconds that the demo trains for, without start and evaluation, and the SHA-256 of its weights."""
    flags = {"max_steps": steps, "out_dir": folder, "eval_interval": steps, "save_interval": steps, "log_interval": 1}
    flags |= {"early_stopping": "false", "compile": "false"}
    run_script("train.py", environment, "--config=config_demo.yaml", *(f"--{k}={v}" for k, v in flags.items()))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    elapsed = [event["elapsed"] for event in events if "loss" in event]
    weights = json.loads((folder / "best_model.json").read_text(encoding="utf-8"))
    sha256 = weights.get("sha256") or hashlib.sha256((folder / "best_model.pth").read_bytes()).hexdigest()
    return elapsed[-1], sha256


def generate(environment: dict[str, str], tokens: int, weights: Path) -> float:
    """Tokens a second of one text."""
    flags = [f"--model_path={weights}", "--prompt=中国", f"--max_new_tokens={tokens}", "--seed=1", "--compile=false"]
    said = run_script("inference.py", environment, *flags, "--min_new_tokens", str(tokens), "--show_speed")
    return float(re.search(r"([\d.,]+) tokens/s", said)[1].replace(",", ""))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """For each setting: seconds of training and tokens a second, quiet and busy."""
    results: dict[str, dict[str, float]] = {name: {} for name in options.settings}
    hashes: dict[str, set[str]] = {}
    for round_ in range(options.rounds):
        for load in ("quiet", "busy"):
            with busy_processes(options.busy if load == "busy" else 0):
                for name in options.settings:
                    out, row = folder / f"{round_}_{load}_{name}".replace(" ", "_"), results[name]
                    seconds, sha256 = train(SETTINGS[name], options.steps, out)
                    hashes.setdefault("one" if "OMP_NUM_THREADS" in SETTINGS[name] else "all", set()).add(sha256)
                    speed = generate(SETTINGS[name], options.tokens, out / "best_model.pth")
                    row[f"train {load}"] = min(seconds, row.get(f"train {load}", seconds))
                    row[f"generate {load}"] = max(speed, row.get(f"generate {load}", speed))
                    print(f"{load}, {name}: {seconds:.1f} s, {speed:.1f} tok/s", file=sys.stderr, flush=True)
    if any(len(different) > 1 for different in hashes.values()):
        sys.exit("the weights differ between settings with the same number of threads")
    return results


def main() -> None:
    """Measure each setting, quiet and beside busy processes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=GNU, help="default: GNU's library, all")
    parser.add_argument("--steps", type=int, default=80, help="of the demo's training")
    parser.add_argument("--tokens", type=int, default=300, help="to generate")
    parser.add_argument("--busy", type=int, default=2, help="busy processes beside")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mateconv_busy_") as folder:
        results = measure(options, Path(folder))
    print(f"| setting | {options.steps} steps, quiet | beside {options.busy} | tok/s, quiet | beside {options.busy} |")
    print("|---|---:|---:|---:|---:|")
    for name, row in results.items():
        train_cells = f"{row['train quiet']:.1f} s | {row['train busy']:.1f} s"
        print(f"| {name} | {train_cells} | {row['generate quiet']:.1f} | {row['generate busy']:.1f} |")


if __name__ == "__main__":
    main()
