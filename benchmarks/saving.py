"""How long does saving a checkpoint stop training, in the foreground and in the background?

    python benchmarks/saving.py
    python benchmarks/saving.py --dim 1024 --n_layers 24 --device cuda

For a model of MiniMind's shape with AdamW: the time of `torch.save`; of saving with SHA-256, flushing and reading back;
how long `BackgroundSaver.submit` stalls the loop; and by how much steps slow down while the thread writes. Limits:
memory bounds the copy and the disk bounds the writing, whose speed is measured with plain bytes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model.LMConfig import LMConfig
from model.model import Transformer
from model.runs.saving import BackgroundSaver, check_finite
from model.storage.archive import save_torch, tensor_bytes
from model.training.optimizer import build_optimizer

REPEATS = 5


def seconds_of(function) -> float:
    """The median time of a call, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain_disk_seconds(folder: Path, size: int) -> float:
    """Seconds that writing and flushing this many bytes takes."""
    block = os.urandom(1 << 20)

    def write() -> None:
        with open(folder / "plain", "wb") as file:
            for _ in range(size >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    return seconds_of(write)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="samples of the steps that run meanwhile")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    config = LMConfig(dim=arguments.dim, n_layers=arguments.n_layers)
    model = Transformer(config).to(arguments.device)
    optimizer = build_optimizer(model, "adamw", 1e-4, 0.1)
    tokens = torch.randint(config.vocab_size, (arguments.rows, config.max_seq_len + 1), device=arguments.device)

    def step() -> None:
        (model(tokens[:, :-1], tokens[:, 1:]) / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    size, alone = tensor_bytes(content), seconds_of(step)
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads; {size / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk = plain_disk_seconds(folder, size)
        print(f"the disk alone: {disk:.2f} s ({size / disk / 1e9:.2f} GB/s)")
        print(f"torch.save, not flushed: {seconds_of(lambda: torch.save(content, folder / 'a.pth')):.2f} s")
        print(f"SHA-256, flushed, read back: {seconds_of(lambda: save_torch(folder / 'b.pth', content)):.2f} s")

        def save(copied: dict) -> None:
            check_finite(copied)
            save_torch(folder / "c.pth", copied)

        saver, stalls, whole, during = BackgroundSaver(print), [], [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            saver.submit("checkpoint", content, save)
            stalls.append(time.perf_counter() - start)
            while not saver.is_idle():
                during.append(seconds_of_one(step))
            saver.wait()
            whole.append(time.perf_counter() - start)
        stall, slower = statistics.median(stalls), statistics.mean(during) / alone
        print(f"in the background: training stops for {stall:.3f} s ({size / stall / 1e9:.1f} GB/s of copying)")
        print(f"    and runs {slower:.2f} times slower for {statistics.median(whole):.2f} s (a step: {alone:.3f} s)")
        lost = stall + (statistics.median(whole) - stall) * (1 - 1 / slower)
        print(f"    which costs {lost:.2f} s of training in total")


def seconds_of_one(function) -> float:
    """The time of one call, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
