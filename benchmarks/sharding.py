"""What do ranks gain that share the optimizer, or the weights too, and what does it cost?

    python benchmarks/sharding.py
    python benchmarks/sharding.py --ranks 2 --dim 512 --n_layers 8 --vocab_size 6400

For each number of gloo processes with one thread each, and each optimizer: the bytes of weights, gradients and state on
each rank, counted from the tensors between two steps; and the time of a step of gradients, exchange and update, with
each way of sharing, in turns. Where processes share cores, only the ratios say something.
"""

import argparse
import contextlib
import os
import socket
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model.LMConfig import LMConfig
from model.model import Transformer
from model.training.fully_sharded import FullySharded
from model.training.optimizer import OPTIMIZERS, build_optimizer
from model.training.plan import Hardware
from model.training.sharded_optimizer import ShardedOptimizer
from model.training.sharding import Shares
from utils import Processes

SHAPES = {"demo": (192, 4, 6400), "MiniMind": (512, 8, 6400)}  # dim, layers, vocabulary
ROW = "| {} | {} | {} | {} | {} | {} | {} | {} |"
CPU = Hardware(torch.device("cpu"), torch.float32, contextlib.nullcontext())


class Contender:
    """A model that is trained, with what `shard` says shared."""

    def __init__(self, config: LMConfig, optimizer_type: str, processes: Processes, shard: str) -> None:
        torch.manual_seed(0)
        self.model = self.called = Transformer(config)
        holdings = None
        if shard == "full":
            holdings = FullySharded(self.model, processes.world_size, CPU, processes)
        elif processes.world_size > 1:
            self.called = DistributedDataParallel(self.model)
        self.optimizer = build_optimizer(self.model, optimizer_type, 1e-3, 0.1)
        if shard == "optimizer":
            holdings = Shares(self.model, OPTIMIZERS[optimizer_type].is_elementwise, processes)
        if holdings is not None:
            self.optimizer = ShardedOptimizer(self.optimizer, optimizer_type, holdings)

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Seconds of gradients and their exchange, and of the update."""
        start = time.perf_counter()
        (self.called(tokens[:, :-1], tokens[:, 1:]) / tokens.numel()).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        seconds = middle - start, time.perf_counter() - middle
        self.gradients = sum(_own_bytes(p.grad) for p in self.model.parameters())
        self.optimizer.zero_grad()
        return seconds

    def held(self) -> tuple[int, int, int]:
        """Bytes of weights, gradients and optimizer on this rank, after a step."""
        if isinstance(self.optimizer, ShardedOptimizer):
            state = self.optimizer.state_bytes()
        else:
            state = sum(tensor.nbytes for state in self.optimizer.state.values() for tensor in state.values())
        return sum(map(_own_bytes, self.model.parameters())), self.gradients, state


def _own_bytes(tensor: torch.Tensor) -> int:
    """What this rank holds of a tensor, which may be shared."""
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes


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
            ways = ("none", "optimizer", "full") if ranks > 1 else ("none",)
            contenders = [Contender(config, optimizer_type, processes, way) for way in ways]
            seconds: list[list[tuple[float, float]]] = [[] for _ in ways]
            for turn in range(options.steps + 1):
                for own, contender in zip(seconds, contenders, strict=True):
                    processes.barrier()
                    own.append(contender.step(tokens))
                    own[-1] = sum(own[-1]), own[-1][1]
                    if turn == 0:
                        own.clear()
            held = processes.gather([contender.held() for contender in contenders])
            for number, (way, own) in enumerate(zip(ways, seconds, strict=True)):
                if rank == 0:
                    most = [max(sizes) / 1e6 for sizes in zip(*(of_rank[number] for of_rank in held), strict=True)]
                    times = [f"{statistics.median(column) * 1e3:.0f}" for column in zip(*own, strict=True)]
                    ratio = statistics.median(b[0] / a[0] for a, b in zip(seconds[0], own, strict=True))
                    cells = way, " + ".join(f"{size:.1f}" for size in most), f"{sum(most):.1f}", *times, f"{ratio:.2f}"
                    print(ROW.format(f"{shape}, {optimizer_type}", ranks, *cells), flush=True)
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
    held = "weights + gradients + optimizer, MB on the fullest rank"
    print(ROW.format("model", "ranks", "shard", held, "together", "step, ms", "of it the update", "to none"))
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for ranks in options.ranks:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        multiprocessing.spawn(measure, (ranks, port, options), nprocs=ranks)


if __name__ == "__main__":
    main()
