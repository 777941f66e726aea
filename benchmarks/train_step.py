"""The speed of one training step compared with other projects' models of the same shape, and where its time goes.

    python benchmarks/train_step.py --nanogpt ../nanoGPT --minimind ../minimind
    python benchmarks/train_step.py --device cuda --batch_size 64 --only ours-compiled llama-compiled
    python benchmarks/train_step.py --profile

A step is forward, backward, clipping at 1.0, the optimizer's step and zero_grad. Every contender has its own process
and they take turns, one step per round (on a GPU ten in a row), so that other load on the machine affects all of them.
MiniMind's folder is a checkout of its tag minimind-v1; transformers must be installed. Missing contenders are skipped.

GFLOP/s: 6 FLOP per weight of the contender and token, plus causal attention. Limit: the best rate of large matrix
products and of those with the layers' weights on this device in this dtype, also measured in every round.
"""

import argparse
import functools
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import step_contenders
import torch
from worker import Worker, ready_workers, warn_if_busy

import utils
from model.errors import InputError
from model.model import Transformer

ROW = "{:30} {:>7} {:>8} {:>9} {:>9} {:>8} {:>7} {:>9} {:>9}"


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `device` and `dtype` as used."""
    parser = utils.CommandParser(description=__doc__.split("\n")[0])
    numbers = {"dim": 512, "n_layers": 8, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 6400, "max_seq_len": 512}
    for name, default in (numbers | {"batch_size": 8, "rounds": 6}).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"[{default}]")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every process [torch's choice]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="[bfloat16]")
    parser.add_argument("--steps", type=int, metavar="N", help="steps per turn [1, on a GPU 10]")
    parser.add_argument("--together", action="store_true", help="warm up at the same time: first steps are slower")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a checkout of nanoGPT")
    parser.add_argument("--minimind", metavar="FOLDER", help="a checkout of MiniMind at its tag minimind-v1")
    parser.add_argument(
        "--only", nargs="+", choices=step_contenders.NAMES, metavar="NAME", help="only these contenders"
    )
    parser.add_argument(
        "--keep_freed_memory",
        action="store_true",
        help="measure again, with the peers' C library keeping freed memory as ours does",
    )
    parser.add_argument("--profile", action="store_true", help="instead: show where one of our steps spends its time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # this is the process of that contender
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in (*numbers, "batch_size", "rounds", "threads", "steps")}
    if below_one := [name for name, number in given.items() if number is not None and number < 1]:
        raise InputError(f"--{below_one[0]}: at least 1 expected")
    step_contenders.our_config(options)  # an impossible shape is reported here
    if options.threads:
        torch.set_num_threads(options.threads)
    device = utils.pick_device(options.device)[0]
    options.device, options.steps = str(device), options.steps or (1 if device.type == "cpu" else 10)
    dtype, why = utils.pick_dtype(options.dtype, device)
    if str(dtype) != f"torch.{options.dtype}":
        print(f"dtype {str(dtype).removeprefix('torch.')}: {why}")
    options.dtype = str(dtype).removeprefix("torch.")
    return options


class Contender(Worker):
    """A contender, warmed up."""

    def __init__(self, name: str, options: argparse.Namespace, keeps_freed_memory: bool) -> None:
        order = {"name": name, "keeps_freed_memory": keeps_freed_memory, "options": vars(options)}
        super().__init__(name, __file__, order, options.threads)
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def step(self) -> None:
        """Take a turn and record the seconds of a step."""
        seconds, peak = self.ask()
        self.seconds.append(seconds)
        self.peak_bytes = max(self.peak_bytes, peak)


def contenders_here(options: argparse.Namespace) -> list[str]:
    """Who can take part; prints who cannot."""
    names = options.only or [name for name in step_contenders.NAMES if name not in step_contenders.ONLY_IF_ASKED]
    for peer, file in (("nanogpt", "model.py"), ("minimind", "model/LMConfig.py")):
        folder = getattr(options, peer)
        if folder is not None and not (Path(folder) / file).exists():
            raise InputError(f"--{peer}: no {file} in {folder}, a checkout expected")
        if folder is None and any(name.startswith(peer) for name in names):
            print(f"{peer}: left out, since --{peer} FOLDER is not given")
            names = [name for name in names if not name.startswith(peer)]
    return names


def start(names: list[str], options: argparse.Namespace, keeps_freed_memory: bool) -> list[Contender]:
    """Their processes, warmed up."""
    begin = [
        functools.partial(Contender, name, options, keeps_freed_memory or name.startswith("ours")) for name in names
    ]
    return ready_workers(begin, options.together)


def compare(workers: list[Contender], options: argparse.Namespace, title: str) -> None:
    """Let them take turns, and print a table."""
    device, dtype, rates = torch.device(options.device), getattr(torch, options.dtype), []
    with torch.device("meta"):
        shapes = Transformer(step_contenders.our_config(options)).layer_shapes()
    for worker in workers:
        worker.seconds.clear()
    for _ in range(options.rounds):
        for worker in workers:
            worker.step()
        rates.append(utils.measure_matmul_flops(device, dtype, shapes))
    rate, tokens = statistics.median(rates), options.batch_size * options.max_seq_len
    print(f"\n{title}; a large matrix product: {rate / 1e9:,.0f} GFLOP/s (best: {max(rates) / 1e9:,.0f})")
    print(ROW.format("", "weights", "first", "tok/s", "best", "GFLOP/s", "of the", "of the", "memory"))
    print(ROW.format("", "", "step", "median", "", "median", "product", "best peer", "at most"))
    peers = [worker for worker in workers if not worker.name.startswith("ours")]
    best_peer = min(peers, key=lambda worker: statistics.median(worker.seconds), default=None)
    for worker in workers:
        median = statistics.median(worker.seconds)
        flops = worker.ready["flops_per_token"] * tokens / median
        beside = "-"
        if best_peer is not None:  # of the same round
            pairs = zip(best_peer.seconds, worker.seconds, strict=True)
            beside = f"{statistics.median(peer / own for peer, own in pairs):.2f}"
        print(
            ROW.format(
                step_contenders.NAMES[worker.name],
                f"{worker.ready['parameters'] / 1e6:.1f}M",
                f"{worker.ready['first_step_seconds']:.1f} s",
                f"{tokens / median:,.0f}",
                f"{tokens / min(worker.seconds):,.0f}",
                f"{flops / 1e9:,.0f}",
                f"{flops / rate:.0%}",
                beside,
                f"{worker.peak_bytes / 1e9:.1f} GB" if worker.peak_bytes else "-",
            ),
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        order = json.loads(sys.argv[2])
        step_contenders.serve(order["name"], order["keeps_freed_memory"], argparse.Namespace(**order["options"]))
        return
    options = read_options()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Trainer does, and its processes inherit it
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.dtype}; batches of"
        f" {options.batch_size} x {options.max_seq_len} tokens"
    )
    warn_if_busy()
    if options.profile:
        from step_profile import print_profile

        print_profile(options)
        return
    names = contenders_here(options)
    workers = start(names, options, keeps_freed_memory=False)
    if workers:
        compare(workers, options, "Each as it comes")
    if options.keep_freed_memory and workers:
        for worker in workers:
            if not worker.name.startswith("ours"):
                worker.close()
        ours = [worker for worker in workers if worker.name.startswith("ours")]
        peers = [worker.name for worker in workers if not worker.name.startswith("ours")]
        workers = ours + start(peers, options, keeps_freed_memory=True)
        compare(workers, options, "With our allocator's setting for all")
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    utils.run_command(main)
