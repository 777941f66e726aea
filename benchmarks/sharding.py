"""What do ranks gain that share the optimizer, and what does it cost?

    python benchmarks/sharding.py
    python benchmarks/sharding.py --ranks 2 --dim 512 --n_layers 8 --vocab_size 6400

For each number of gloo processes with one thread each, and each optimizer: the bytes of its state on each rank, counted
from the tensors; and the time of a step of gradients, exchange and update, with and without sharing, in turns. Where
processes share cores, only the ratio of the two says something.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from model.LMConfig import LMConfig
from model.model import Transformer
from model.training.optimizer import OPTIMIZERS, build_optimizer
from model.training.sharded_optimizer import ShardedOptimizer
from model.training.sharding import Shares
from utils import Processes

SHAPES = {"demo": (192, 4, 6400), "MiniMind": (512, 8, 6400)}  # dim, layers, vocabulary
ROW = "| {} | {} | {} | {} | {} | {} | {} |"


class Contender:
    """A model that is trained, with the optimizer shared or not."""

    def __init__(self, config: LMConfig, optimizer_type: str, processes: Processes, shares: bool) -> None:
        torch.manual_seed(0)
        self.model = Transformer(config)
        self.called = DistributedDataParallel(self.model) if processes.world_size > 1 else self.model
        self.optimizer = build_optimizer(self.model, optimizer_type, 1e-3, 0.1)
        if shares:
            kind = OPTIMIZERS[optimizer_type]
            pieces = Shares(self.model, kind.is_elementwise, processes)
            self.optimizer = ShardedOptimizer(self.optimizer, optimizer_type, pieces)

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Seconds of gradients and their exchange, and of the update."""
        start = time.perf_counter()
        (self.called(tokens[:, :-1], tokens[:, 1:]) / tokens.numel()).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return middle - start, time.perf_counter() - middle

    def state_bytes(self) -> int:
        """Of the optimizer, on this rank."""
        if isinstance(self.optimizer, ShardedOptimizer):
            return self.optimizer.state_bytes()
        return sum(tensor.nbytes for state in self.optimizer.state.values() for tensor in state.values())


def measure(rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    """Of one process: measure, and let rank 0 print the rows of the table."""
    torch.set_num_threads(1)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
    processes = Processes()
    processes.start()
    for shape, (dim, layers, vocabulary) in options.shapes.items():
        config = LMConfig(
            dim=dim, n_layers=layers, n_heads=dim // 32, n_kv_heads=dim // 64, vocab_size=vocabulary, max_seq_len=256
        )
        tokens = torch.randint(vocabulary, (options.rows, options.tokens + 1))
        for optimizer_type in ("adamw", "muon"):
            contenders = [Contender(config, optimizer_type, processes, shares) for shares in (False, ranks > 1)]
            seconds = [[], []]
            for turn in range(options.steps + 1):
                for own, contender in zip(seconds, contenders, strict=True):
                    processes.barrier()
                    own.append(contender.step(tokens))
                    own[-1] = sum(own[-1]), own[-1][1]
                    if turn == 0:
                        own.clear()
            held = processes.gather(contenders[1].state_bytes())
            if rank == 0:
                (step, update), (shared_step, shared_update) = (
                    [statistics.median(column) for column in zip(*own, strict=True)] for own in seconds
                )
                bytes_alone = contenders[0].state_bytes()
                megabytes = f"{bytes_alone / 1e6:.2f}", " ".join(f"{size / 1e6:.2f}" for size in held)
                times = f"{step * 1e3:.0f} / {shared_step * 1e3:.0f}", f"{update * 1e3:.0f} / {shared_update * 1e3:.0f}"
                ratio = statistics.median(b[0] / a[0] for a, b in zip(*seconds, strict=True))
                print(ROW.format(f"{shape}, {optimizer_type}", ranks, *megabytes, *times, f"{ratio:.2f}"), flush=True)
    processes.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dim", type=int, help="of one shape, in the place of the demo's and MiniMind's")
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=6400)
    parser.add_argument("--rows", type=int, default=2, help="samples of a step and rank")
    parser.add_argument("--tokens", type=int, default=128, help="of a sample")
    parser.add_argument("--steps", type=int, default=10, help="timed")
    options = parser.parse_args()
    options.shapes = SHAPES
    if options.dim is not None:
        options.shapes = {f"dim {options.dim}": (options.dim, options.n_layers, options.vocab_size)}
    print(
        f"torch {torch.__version__}, gloo, one thread a process; a step reads {options.rows} x {options.tokens} tokens"
    )
    print(ROW.format("model", "ranks", "state, MB", "shared: on each rank", "step, ms", "of it the update", "ratio"))
    print("|---|---:|---:|---:|---:|---:|---:|")
    for ranks in options.ranks:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        multiprocessing.spawn(measure, (ranks, port, options), nprocs=ranks)


if __name__ == "__main__":
    main()
