"""The parts of gpu.py that are no separate benchmark or test: python benchmarks/gpu_parts.py PART DEVICE FOLDER …"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import utils
from model import accelerator
from model.attention import cached_attention, kernels_for_any_length
from model.weights.load import load_weights

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------------------- the machine


def milliseconds(device: torch.device, function: Callable[[], object]) -> float:
    """How long one call takes until the device has finished it."""
    accelerator.synchronize(device)
    start = time.perf_counter()
    function()
    accelerator.synchronize(device)
    return (time.perf_counter() - start) * 1000


def machine(device: torch.device, folder: Path) -> int:
    """Versions, rates of products and memory, the cost of a launch, and attention over a growing text."""
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
    microseconds = milliseconds(device, lambda: [small.add_(1) for _ in range(1000)])  # of one of a thousand
    print(f"a small operation: {microseconds:.1f} us of Python and launching")
    growing_text(device)
    return 0


def growing_text(device: torch.device) -> None:
    """What PyTorch's own choice of attention takes for each new length, and what ours takes."""
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


# ----------------------------------------------------------------------------------------------------- a run's numbers


def events_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def pair(device: torch.device, launched: Path, graph: Path) -> int:
    """Two runs that differ in `cuda_graph` alone: their speed, and whether losses and weights are the same."""
    rates = []
    for folder in (launched, graph):
        steps = [event["tokens_per_second"] for event in events_of(folder) if "tokens_per_second" in event]
        rates.append(statistics.median(steps[len(steps) // 2 :]))  # after compiling and capturing
    losses = [[(event["step"], event["loss"]) for event in events_of(f) if "loss" in event] for f in (launched, graph)]
    weights = [load_weights(next(folder.glob("pretrain_*.pth"))).state_dict for folder in (launched, graph)]
    same = losses[0] == losses[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    print(
        f"launched {rates[0]:,.0f} tokens/s, as a graph {rates[1]:,.0f}: {rates[1] / rates[0]:.2f} times;"
        f" losses and weights {'have the same bits' if same else 'DIFFER'}"
    )
    return 0 if same else 1


def told(device: torch.device, folder: Path) -> int:
    """A run's metrics.jsonl in a few lines."""
    events = events_of(folder)
    for event in events:
        if "val_loss" in event:
            print(
                f"step {event['step']}, {event['tokens']:,} tokens, {event['elapsed']} s: validation loss"
                f" {event['val_loss']:.4f}, {event['bits_per_byte']:.4f} bits per byte"
            )
    steps = [event for event in events if "tokens_per_second" in event]
    later = steps[len(steps) // 3 :]  # the first compile
    rate, mfu = (statistics.median(event[key] for event in later) for key in ("tokens_per_second", "mfu"))
    print(f"{rate:,.0f} tokens/s in the median, MFU {mfu:.1%}; the last loss {steps[-1]['loss']:.4f}")
    return 0


def main() -> int:
    """Run one part."""
    name, device, *folders = sys.argv[1:]
    part = {"machine": machine, "told": told, "pair": pair}[name]
    return part(utils.pick_device(device)[0], *map(Path, folders))


if __name__ == "__main__":
    utils.run_command(main)
