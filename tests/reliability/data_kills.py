"""kill -9 of data processing at random instants, run again each time, until it ends: is every byte what it should be?

    python -m tests.reliability.data_kills --kills 50

The input is dirty on purpose: damaged lines, duplicates, control characters, HTML. Instants are spread over the whole
job, its start, its merging and its publishing included. Processes are real, killed by their parent's id; workers end by
themselves when their parent is gone.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("data.bin", "data.json", "data.ends", "data.val.bin", "data.val.json", "data.val.ends")
FILES += ("data.rejects.jsonl", "data.changes.jsonl", "data_stats.json")


def make_dirty_input(path: Path, copies: int) -> None:
    """The sample corpus several times over: a tenth of the lines damaged, a tenth repeated, a tenth to be cleaned."""
    dice = random.Random(7)
    lines = (ROOT / "dataset" / "classics_zh.jsonl").read_bytes().splitlines()
    with open(path, "wb") as file:
        for copy in range(copies):
            for line in lines:
                text = json.loads(line)["text"]
                fate = dice.random()
                if fate < 0.1:
                    file.write(
                        dice.choice([line[:-5], b"\xff" + line, b"", b"[1]", b'{"text": 7}', b'{"text": "\\ud800"}'])
                    )
                elif fate < 0.2:
                    file.write(line)  # again and again: a duplicate
                else:
                    dirt = "&nbsp;\u200bＡ\r\n" if fate < 0.3 else ""
                    file.write(json.dumps({"text": f"{copy}{dirt}{text}"}, ensure_ascii=False).encode())
                file.write(b"\n")


def command(folder: Path, source: Path, workers: int) -> list[str]:
    """The job, as a command line."""
    flags = {"--input_path": source, "--output_path": folder / "data.bin", "--workers": workers}
    flags |= {"--save_interval": 50_000, "--val_share": 0.02}
    script = [sys.executable, str(ROOT / "optimized_data_processing.py")]
    return [*script, *(str(word) for pair in flags.items() for word in pair)]


def stage(folder: Path) -> str:
    """How far a killed job had come."""
    job = folder / "data.bin.parts"
    if not job.exists():
        return "done" if (folder / "data.json").exists() else "nothing made yet"
    if (job / "publish.json").exists():
        return "giving the files their names"
    if (job / "merged").exists():
        return "merging"
    return "making parts" if any(job.glob("*.npz")) else "planned"


def main() -> int:
    """Kill, run again and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--copies", type=int, default=4, help="of the sample corpus, 9 MB each")
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    dice, stages, jobs, wrong, kills = random.Random(arguments.seed), Counter(), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "dirty.jsonl"
        make_dirty_input(source, arguments.copies)
        since = time.perf_counter()
        subprocess.run(command(folder / "whole", source, 2), check=True, stderr=subprocess.DEVNULL)
        whole_seconds = time.perf_counter() - since
        while kills < arguments.kills:
            killed = folder / "killed"
            shutil.rmtree(killed, ignore_errors=True)
            jobs += 1
            while True:
                process = subprocess.Popen(command(killed, source, dice.choice([0, 1, 2])), stderr=subprocess.DEVNULL)
                try:
                    process.wait(dice.uniform(0.3, 0.9 * whole_seconds) if kills < arguments.kills else None)
                    break  # it came to its end
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    stages[stage(killed)] += 1
            if process.returncode or not (killed / "data_stats.json").exists():
                subprocess.run(command(killed, source, 2), check=True, stderr=subprocess.DEVNULL)
            for file in FILES:
                if (folder / "whole" / file).read_bytes() != (killed / file).read_bytes():
                    print(f"{file} differs after {kills} kills")
                    wrong += 1
            if left := [path.name for path in killed.iterdir() if path.name not in (*FILES, "data_stats.png")]:
                print(f"left lying: {left}")
                wrong += 1
    print(f"{kills} kills in {jobs} jobs, of a job that takes {whole_seconds:.1f} s; {wrong} files that differ")
    print("killed while: " + ", ".join(f"{name} {count}" for name, count in stages.most_common()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
