"""What gpu.py runs that is no benchmark or test of its own: python benchmarks/gpu_parts.py PART DEVICE FOLDER."""

import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import utils
from model.attention import cached_attention, kernels_for_any_length
from tests.reliability.states import differences, logged

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------------------- the machine


def milliseconds(device: torch.device, function: Callable[[], object]) -> float:
    """What one call takes until the device has done it."""
    utils.synchronize(device)
    start = time.perf_counter()
    function()
    utils.synchronize(device)
    return (time.perf_counter() - start) * 1000


def machine(device: torch.device, folder: Path) -> int:
    """Versions, the rates of products and memory, what a launch costs, and attention over a growing text."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        print(
            f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, compute capability"
            f" {properties.major}.{properties.minor}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rates = [utils.measure_matmul_flops(device, dtype) for _ in range(2)]
        print(f"a large product in {dtype}: {' and '.join(f'{rate / 1e12:,.1f}' for rate in rates)} TFLOP/s")
    memory = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    for name, function, moved in (("read by a sum", memory.sum, 1), ("copied", memory.clone, 2)):
        seconds = statistics.median(milliseconds(device, function) for _ in range(9)) / 1000
        print(f"memory {name}: {moved * memory.nbytes / seconds / 1e9:,.0f} GB/s")
    small = torch.ones(8, device=device)
    seconds = milliseconds(device, lambda: [small.add_(1) for _ in range(1000)]) / 1000
    print(f"a small operation: {seconds * 1000:.1f} us of Python and launching")
    growing_text(device)
    return 0


def growing_text(device: torch.device) -> None:
    """What PyTorch's own choice of attention takes for each new length, and what ours does."""
    q, k, v = (torch.randn(1, heads, 400, 32, device=device, dtype=torch.bfloat16) for heads in (16, 8, 8))

    def pytorchs(length: int) -> None:
        F.scaled_dot_product_attention(q[:, :, :1], k[:, :, :length], v[:, :, :length], enable_gqa=True)

    def ours(length: int) -> None:
        with kernels_for_any_length(device):
            cached_attention(q[:, :, :1], k[:, :, :length], v[:, :, :length], None)

    for name, attend in (("PyTorch's choice", pytorchs), ("ours", ours)):
        times = [milliseconds(device, lambda: attend(length)) for length in range(100, 130)]  # noqa: B023 (called now)
        again = [milliseconds(device, lambda: attend(length)) for length in range(100, 130)]  # noqa: B023
        print(
            f"attention over 100 to 129 tokens, {name}: a new length {statistics.median(times):.3f} ms (at most"
            f" {max(times):.1f}), a known one {statistics.median(again):.3f} ms"
        )


# -------------------------------------------------------------------------------------------------- killed and resumed

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
    "float16, AdamW, average": {"dtype": "float16", "use_ema": "true"},
    "float16, compiled, Muon": {"dtype": "float16", "compile": "true", "optimizer_type": "muon"},
    "float32, Adam": {"dtype": "float32", "optimizer_type": "adam"},
}


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


def resume_case(flags: dict, folder: Path) -> list[str]:
    """Train at once, and killed and resumed; returns what is not the same."""
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
    if (code := train(flags | {"out_dir": cut, "resume": "true"}, log, **fresh)) != 0:
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
        problems = resume_case(data | shape | FIXED | changes, folder / str(number))
        return name, problems, time.perf_counter() - start

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        for name, problems, seconds in pool.map(one, enumerate(CASES.items())):
            print(f"{name}: {'; '.join(problems) or 'the same bits'} ({seconds:.0f} s)", flush=True)
            wrong += bool(problems)
    print(f"{len(CASES) - wrong} of {len(CASES)} cases end with the same bits")
    return wrong


# ----------------------------------------------------------------------------------------------------- a run's numbers


def told(device: torch.device, folder: Path) -> int:
    """What a run's metrics.jsonl says, in a few lines."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for event in events:
        if "val_loss" in event:
            print(
                f"step {event['step']}, {event['tokens']:,} tokens, {event['elapsed']} s: validation loss"
                f" {event['val_loss']:.4f}, {event['bits_per_byte']:.4f} bits per byte"
            )
    steps = [event for event in events if "tokens_per_second" in event]
    later = steps[len(steps) // 3 :]  # the first ones compile
    rate, mfu = (statistics.median(event[key] for event in later) for key in ("tokens_per_second", "mfu"))
    print(f"{rate:,.0f} tokens/s in the median, MFU {mfu:.1%}; the last loss {steps[-1]['loss']:.4f}")
    return 0


def main() -> int:
    """Run one part."""
    name, device, folder = sys.argv[1:]
    part = {"machine": machine, "resume": resume, "told": told}[name]
    return part(utils.pick_device(device)[0], Path(folder))


if __name__ == "__main__":
    utils.run_command(main)
