"""Do runs on this device end with the same bits when they are killed and resumed? Real processes, real kills.

    python -m tests.reliability.device_resume cuda

Compiled and eager, each optimizer and dtype; eight runs at a time on a GPU's machine.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import utils
from tests.reliability.states import differences, logged

ROOT = Path(__file__).resolve().parents[2]

SHAPE = {"dim": 512, "n_layers": 4, "n_heads": 16, "n_kv_heads": 8, "max_seq_len": 512, "batch_size": 16}
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "batch_size": 4}
STEPS, SAVED = 240, 80
FIXED = {
    "max_steps": STEPS, "save_interval": SAVED, "eval_interval": SAVED, "eval_steps": 2, "log_interval": 1,
    "keep_last": 9, "learning_rate": 1e-3, "warmup_steps": 10,
}  # fmt: skip
DOCUMENTS = {"sample_start": "document", "document_mask": "true"}
CASES = {
    "bfloat16, AdamW, average, dropout": {"use_ema": "true", "dropout": 0.1},
    "bfloat16, Muon, documents": {"optimizer_type": "muon"} | DOCUMENTS,
    "bfloat16, compiled, AdamW, average": {"compile": "true", "use_ema": "true"},
    "bfloat16, compiled, Muon, dropout": {"compile": "true", "optimizer_type": "muon", "dropout": 0.1},
    "bfloat16, compiled, documents, accumulation": {"compile": "true", "accumulation_steps": 2} | DOCUMENTS,
    "bfloat16, compiled, AdamW, resumed without a graph": {"compile": "true"},
    "float16, AdamW, average": {"dtype": "float16", "use_ema": "true"},
    "float16, compiled, Muon": {"dtype": "float16", "compile": "true", "optimizer_type": "muon"},
    "float32, Adam": {"dtype": "float32", "optimizer_type": "adam"},
}
RESUMED = {"bfloat16, compiled, AdamW, resumed without a graph": {"cuda_graph": "false"}}  # what then changes


def train(flags: dict, log: Path, until: Path | None = None, **environment: str) -> int:
    """Run train.py to its end, or kill it (SIGKILL) once a file is there; returns its exit code."""
    command = [sys.executable, str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with open(log, "ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | environment)
        while until is not None and process.poll() is None:
            if until.exists():
                process.kill()
            time.sleep(0.002)
        return process.wait()


def resume_case(flags: dict, folder: Path, resumed: dict) -> list[str]:
    """Train at once, and killed and resumed, with flags on top; returns what is not the same."""
    whole, cut, log = folder / "whole", folder / "cut", folder / "log"
    folder.mkdir(parents=True)
    last = f"checkpoint_step_{STEPS}.pth"

    def last_words() -> str:
        return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1][:300]

    if (code := train(flags | {"out_dir": whole}, log)) != 0:
        return [f"the whole run ended with {code}: {last_words()}"]
    saved = cut / f"checkpoint_step_{SAVED}.pth"
    if (code := train(flags | {"out_dir": cut}, log, saved)) == 0 or (cut / last).exists():
        return [f"it was not killed, but ended with {code}"]
    # What was compiled is compiled again: its bits must not depend on what a cache holds.
    fresh = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    if (code := train(flags | {"out_dir": cut, "resume": "true"} | resumed, log, **fresh)) != 0:
        return [f"the resumed run ended with {code}: {last_words()}"]
    if "resuming from" not in log.read_text(encoding="utf-8", errors="replace"):
        return ["it did not resume"]
    problems = [f"{part} differs" for part in differences(whole / last, cut / last)]
    problems += ["metrics.jsonl differs"] if logged(whole) != logged(cut) else []
    for path in sorted(whole.glob("pretrain_*.pth")):
        hashes = [hashlib.sha256((out / path.name).read_bytes()).hexdigest() for out in (whole, cut)]
        print(f"    {path.name}: {hashes[0][:16]} and {hashes[1][:16]}")
        problems += [f"{path.name} differs"] if hashes[0] != hashes[1] else []
    shutil.rmtree(folder)
    return problems


def resume(device: torch.device, folder: Path) -> int:
    """All cases, eight at a time on a GPU's machine; the exit code tells how many went wrong."""
    data = {"train_data_path": ROOT / "dataset" / "classics_zh.bin", "device": device, "compile": "false"}
    data["raw_data_path"] = ROOT / "dataset" / "classics_zh.jsonl"  # where the token file is missing
    shape = SMALL if device.type == "cpu" else SHAPE
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    wrong = 0

    def one(item: tuple[int, tuple[str, dict]]) -> tuple[str, list[str], float]:
        (number, (name, changes)), start = item, time.perf_counter()
        problems = resume_case(data | shape | FIXED | changes, folder / str(number), RESUMED.get(name, {}))
        return name, problems, time.perf_counter() - start

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        for name, problems, seconds in pool.map(one, enumerate(CASES.items())):
            print(f"{name}: {'; '.join(problems) or 'the same bits'} ({seconds:.0f} s)", flush=True)
            wrong += bool(problems)
    print(f"{len(CASES) - wrong} of {len(CASES)} cases end with the same bits")
    return wrong


def main() -> int:
    """Run all cases on the device named; returns the exit code."""
    (name,) = sys.argv[1:] or ["auto"]
    with tempfile.TemporaryDirectory(prefix="mateconv_resume_") as folder:
        return min(1, resume(utils.pick_device(name)[0], Path(folder)))


if __name__ == "__main__":
    utils.run_command(main)
