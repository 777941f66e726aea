"""Generation speed compared with transformers and llama.cpp, with the same weights, prompts and number of tokens.

    python benchmarks/decode.py
    python benchmarks/decode.py --llama_python ../llama/bin/python
    python benchmarks/decode.py --shapes 26.9M --formats fp32 --batches 1 --tokens 64 --rounds 3
    python benchmarks/decode.py --device cuda --formats fp32 bf16

llama.cpp takes part if llama-cpp-python is installed, here or for the interpreter that --llama_python names, and gguf
is installed here. Every contender has its own process and they take turns, one text per round, so that other load on
the machine affects all of them. first: milliseconds that a text of one token takes, which include reading the prompt.
tok/s: all new tokens over the time of whole texts; medians over the rounds. after: the tokens after the first one over
the time after it. GB/s: the weights' bytes, read once per step after the first token. Limit:
the rate at which a sum reads as many bytes, from a cache if they fit it, the best of five in every round. On a GPU
transformers takes part with its usual cache and a static one, for which it compiles; and MateConv with each kernel
launched (eager), graphs of them, and graphs of compiled code, greedy and sampling.
"""

import argparse
import functools
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decode_contenders
import torch
from worker import Worker, ready_workers, warn_if_busy

import utils
from model import accelerator
from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights import Weights, save_weights

SHAPES = {
    "26.9M": LMConfig(),  # MiniMind v1's
    "135M": LMConfig(  # SmolLM2-135M's
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152, max_seq_len=512
    ),
}
NAMES = {
    "transformers": "transformers generate",
    "static": "transformers, static cache",
    "llama_cpp": "llama.cpp",
    "eager": "MateConv, eager",
    "loop": "MateConv, compiled, ids alone",
    "compiled": "MateConv, compiled",
    "sampled": "MateConv, compiled, sampling",
    "graph": "MateConv, graph",
    "sampled_eager": "MateConv, eager, sampling",
    "sampled_graph": "MateConv, graph, sampling",
}
PASSED_ON = ("prompt", "tokens", "threads", "device", "llama_plain")  # to each contender
ON_A_CPU = ("transformers", "llama_cpp", "eager", "loop", "compiled", "sampled")
ON_A_GPU = ("transformers", "static", "eager", "graph", "compiled", "sampled_eager", "sampled_graph", "sampled")
ROW = "{:34} {:>9} {:>8} {:>8} {:>8} {:>7} {:>9} {:>8} {:>8}   {}"


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = utils.CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N [cpu]")
    parser.add_argument("--formats", nargs="+", choices=("fp32", "bf16", "int8"), help="[all that the device has]")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], metavar="N", help="[1 32]")
    for name, default in {"prompt": 32, "tokens": 128, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"[{default}]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every process")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--together", action="store_true", help="warm up all contenders at the same time")
    parser.add_argument("--llama_python", default=sys.executable, metavar="FILE", help="a Python with llama-cpp-python")
    parser.add_argument(
        "--llama_plain",
        action="store_true",
        help="llama.cpp with the weights as in the file: its AMX code ends with SIGILL (code -4) on some machines",
    )
    options = parser.parse_args()
    device = utils.pick_device(options.device)[0]
    options.device = str(device)
    if device.type == "cpu":
        possible, formats = ON_A_CPU, ["fp32", "bf16", "int8"]
    else:
        possible, formats = ON_A_GPU, ["fp32", "bf16"]
    options.only, options.formats = options.only or possible, options.formats or formats
    if wrong := [*(set(options.only) - set(possible)), *(set(options.formats) - set(formats))]:
        raise InputError(
            f"{wrong[0]} found, of {', '.join((*possible, *formats))} expected, since the device is {device}"
        )
    return options


def contenders(options: argparse.Namespace, form: str) -> list[str]:
    """Who takes part in a table."""
    return [name for name in options.only if form != "int8" or name != "transformers"]  # which has no such weights


def bandwidth(memory: torch.Tensor) -> float:
    """Bytes per second that a sum reads, the best of five: small weights are read from a cache."""
    best = math.inf
    for _ in range(5):
        accelerator.synchronize(memory.device)
        start = time.perf_counter()
        memory.sum()
        accelerator.synchronize(memory.device)
        best = min(best, time.perf_counter() - start)
    return memory.numel() * memory.element_size() / best


def start(names: list[str], order: dict, options: argparse.Namespace) -> list[Worker]:
    """Their processes, warmed up."""

    def begin(name: str) -> Worker:
        python = options.llama_python if name == "llama_cpp" else sys.executable
        return Worker(name, decode_contenders.__file__, order | {"kind": name}, options.threads, python)

    return ready_workers([functools.partial(begin, name) for name in names], options.together)


def compare(workers: list[Worker], order: dict, weight_bytes: int, options: argparse.Namespace) -> None:
    """Let them take turns, and print a table."""
    memory = torch.ones(weight_bytes // 4, device=options.device)  # as large as what a step reads
    bandwidth(memory)
    rates, answers = [], {worker.name: [] for worker in workers}
    for _ in range(options.rounds):
        for worker in workers:
            answers[worker.name].append(worker.ask())
        rates.append(bandwidth(memory))
    limit = statistics.median(rates)
    table = f"{order['shape']}, {order['format']}, batch {order['batch']}"
    print(f"\n{table}; reading as many bytes: {limit / 1e9:.1f} GB/s")
    columns = ("", "first", "tok/s", "best", "after", "GB/s", "of limit", "of HF", "of llama", "text")
    print(ROW.format(*columns))
    speeds = {
        name: [order["batch"] * options.tokens / seconds for _, seconds, _ in texts] for name, texts in answers.items()
    }

    def beside(name: str, peer: str) -> str:
        if peer not in speeds:
            return "-"
        return f"{statistics.median(own / its for own, its in zip(speeds[name], speeds[peer], strict=True)):.2f}"

    reference = None
    for name, texts in answers.items():
        first = statistics.median(first for first, _, _ in texts)
        speed, ids = statistics.median(speeds[name]), texts[0][2]
        reference = reference or ids
        same = next((n for n, (a, b) in enumerate(zip(ids, reference, strict=True)) if a != b), len(ids))
        steps = statistics.median((options.tokens - 1) / (seconds - first) for first, seconds, _ in texts)
        read = steps * weight_bytes
        print(
            ROW.format(
                NAMES[name] + (f" {decode_contenders.LLAMA_FORMATS[order['format']]}" if name == "llama_cpp" else ""),
                f"{first * 1000:.1f} ms",
                f"{speed:,.0f}",
                f"{max(speeds[name]):,.0f}",
                f"{steps * order['batch']:,.0f}",
                f"{read / 1e9:.1f}",
                f"{read / limit:.0%}",
                beside(name, "transformers"),
                beside(name, "llama_cpp"),
                "the same" if same == len(ids) else f"the same for {same} tokens",
            ),
            flush=True,
        )


def measure(shape: str, options: argparse.Namespace) -> None:
    """All tables of one shape."""
    config = SHAPES[shape]
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # logits as large as a trained model's: with small ones 16-bit rounding decides
    weights = model.parameter_count() - (0 if config.tie_embeddings else model.tok_embeddings.weight.numel())
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "weights.pth", Weights(model.state_dict(), config))
        if "llama_cpp" in options.only:
            try:
                decode_contenders.write_gguf(Path(folder), options.formats)
            except ImportError as error:
                print(f"llama.cpp is left out: {error}")
        for form in options.formats:
            for batch in options.batches:
                order = {"shape": shape, "format": form, "batch": batch, "folder": folder}
                order |= {"vocab_size": config.vocab_size, "max_seq_len": config.max_seq_len}
                order |= {name: getattr(options, name) for name in PASSED_ON}
                workers = start(contenders(options, form), order, options)
                if workers:
                    compare(workers, order, weights * {"fp32": 4, "bf16": 2, "int8": 1}[form], options)
                for worker in workers:
                    worker.close()


def main() -> None:
    """Measure and print."""
    options = read_options()
    print(
        f"torch {torch.__version__}, {options.device}, {options.threads} threads; prompts of {options.prompt} tokens"
        f" and {options.tokens} new ones, greedy"
    )
    warn_if_busy()
    for shape in options.shapes:
        measure(shape, options)


if __name__ == "__main__":
    utils.run_command(main)
