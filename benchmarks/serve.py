"""The server under load, beside others' on the same weights: tokens a second, and how long the first token takes.

    python benchmarks/serve.py --llama_server ../llama.cpp/build/bin/llama-server
    python benchmarks/serve.py --only ours llama_python --llama_python ../llama/bin/python
    python benchmarks/serve.py --clients 1 16 --only ours --tokens 64

Each client sends chats one after the other, as streams, greedily; every prompt differs. The servers take turns at each
number of clients, so that other load on the machine affects all of them.

- llama_server: llama.cpp's own, with a slot for each client.
- llama_python: llama-cpp-python's, which writes one text at a time; of the interpreter that --llama_python names.
- transformers: `transformers serve`, with continuous batching unless --plain_transformers.
- direct: our `TextGenerator.chat` without a server, for one client.

All get the same weights of MiniMind v1's shape, each in its form.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from worker import warn_if_busy

import utils
from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.text.tokenization import EMBEDDED_TOKENIZER, tokenizer_sha256
from model.weights import Weights, save_weights

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("ours", "llama_server", "llama_python", "transformers")
OURS = "bench"  # the model's name at our server
STARTS = 120  # seconds that a server may take
ROW = "{:>7} {:14} {:>9} {:>12} {:>12} {:>12} {:>8}"
WORDS = "春风又绿江南岸明月何时照我还床前看光疑是地上霜举头望低思故乡"


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = utils.CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N", help="[1 4 16 64]")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="[all]")
    for name, default in {"tokens": 128, "requests": 2, "rounds": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"[{default}]")
    parser.add_argument("--llama_server", default="llama-server", metavar="FILE", help="llama.cpp's server")
    parser.add_argument("--llama_python", default=sys.executable, metavar="FILE", help="a Python with llama-cpp-python")
    parser.add_argument("--plain_transformers", action="store_true", help="without its --continuous-batching")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    return parser.parse_args()


def make_weights(folder: Path, options: argparse.Namespace) -> None:
    """The same random weights in each server's form."""
    torch.manual_seed(0)
    config = LMConfig()
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # logits as large as a trained model's
        for end in (0, 1, 2):  # no text ends by itself
            model.tok_embeddings.weight[end].zero_()
    sha256 = tokenizer_sha256(EMBEDDED_TOKENIZER)
    save_weights(folder / "bench.pth", Weights(model.state_dict(), config, str(EMBEDDED_TOKENIZER), sha256))
    forms = {"llama_server": "bench.gguf", "llama_python": "bench.gguf", "transformers": "bench_hf"}
    for form in {forms[name] for name in options.only if name in forms}:
        command = [sys.executable, "-m", "model.convert", str(folder / "bench.pth"), str(folder / form)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def command_of(name: str, folder: Path, port: int, options: argparse.Namespace) -> list[str]:
    """How a server is started."""
    at = ["--host", "127.0.0.1", "--port", str(port)]
    threads, rows = str(torch.get_num_threads()), str(min(64, max(options.clients)))
    if name == "ours":
        flags = ["--dtype", options.dtype, "--compile", "--rows", rows, "--queue", "256", "--any_model"]
        return [sys.executable, "inference.py", "--serve", "--model_path", str(folder / "bench.pth"), *flags, *at]
    if name == "llama_server":
        flags = ["--threads", threads, "--threads-batch", threads, "--chat-template", "chatml", "--no-webui"]
        flags += ["--parallel", rows, "--ctx-size", str(512 * int(rows))]
        return [options.llama_server, "--model", str(folder / "bench.gguf"), *flags, *at]
    if name == "llama_python":
        flags = ["--n_threads", threads, "--n_threads_batch", threads, "--n_ctx", "512", "--chat_format", "chatml"]
        flags += ["--interrupt_requests", "false"]  # else a new request ends the one that is being answered
        return [options.llama_python, "-m", "llama_cpp.server", "--model", str(folder / "bench.gguf"), *flags, *at]
    flags = ["--device", "cpu", "--dtype", options.dtype]
    flags += [] if options.plain_transformers else ["--continuous-batching"]
    program = Path(sys.executable).with_name("transformers")
    return [str(program), "serve", str(folder / "bench_hf"), *flags, *at]


@contextlib.contextmanager
def running(name: str, folder: Path, options: argparse.Namespace) -> Iterator[int]:
    """A server on a free port -> the port.

    Raises:
        InputError: it does not begin.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (folder / f"{name}.log").open("w")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = command_of(name, folder, port, options)
    with log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment) as process:
        try:
            wait_for(process, port, name, folder)
            yield port
        finally:
            process.kill()


def wait_for(process: subprocess.Popen, port: int, name: str, folder: Path) -> None:
    """Until it answers."""
    end = time.monotonic() + STARTS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).read()
            return
        time.sleep(0.2)
    last = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise InputError(f"{name}: the server did not begin: {' '.join(last)}")


async def ask(port: int, model: str, prompt: str, tokens: int) -> tuple[float, float, int]:
    """One streamed answer -> seconds to its first text, seconds in all, its tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if model == OURS:  # whose default is not 1
        body["repetition_penalty"] = 1.0
    content = json.dumps(body).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    first, pieces, counted = None, 0, 0
    status = await reader.readline()
    if b" 200 " not in status:
        raise InputError(f"status {status.decode().strip()}: {(await reader.read())[-300:]!r}")
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk.get("choices") and chunk["choices"][0].get("delta", {}).get("content"):
            first = first or time.perf_counter() - start
            pieces += 1
        if chunk.get("usage"):
            counted = chunk["usage"]["completion_tokens"]
    writer.close()
    return first or 0.0, time.perf_counter() - start, counted or pieces


async def load(port: int, model: str, clients: int, options: argparse.Namespace, salt: int) -> dict[str, float]:
    """Some clients at once."""
    found = []

    async def client(number: int) -> None:
        for n in range(options.requests):
            place = (salt * 7919 + number * 104729 + n * 1299709) % 9973
            prompt = "".join(WORDS[(place * (k + 3) + k * k) % len(WORDS)] for k in range(24))
            found.append(await ask(port, model, prompt, options.tokens))

    start = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    seconds = time.perf_counter() - start
    firsts = sorted(first for first, _, _ in found)
    return {
        "rate": sum(tokens for _, _, tokens in found) / seconds,
        "first": statistics.median(firsts),
        "late": firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))],
    }


def direct(folder: Path, options: argparse.Namespace):
    """Measures `TextGenerator.chat` as `load` does a server, alone."""
    from optimized_inference import GenerationConfig, load_generator

    generator = load_generator(folder / "bench.pth", dtype=options.dtype, compile=True)
    config = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=options.tokens)

    def measure(salt: int) -> dict[str, float]:
        tokens, start = 0, time.perf_counter()
        for n in range(options.requests):
            first = (7 * salt + 3 * n) % 8
            generator.chat([{"role": "user", "content": WORDS[first : first + 24]}], config)
            tokens += generator.speed.tokens
        return {"rate": tokens / (time.perf_counter() - start), "first": math.nan, "late": math.nan}

    measure(99)
    return measure


def main() -> None:
    """Measure and print."""
    options = read_options()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}; {options.tokens} tokens a text"
    )
    warn_if_busy()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_weights(folder, options)
        ports = {}
        for server in options.only:
            try:
                ports[server] = stack.enter_context(running(server, folder, options))
            except (InputError, OSError) as error:
                print(f"{server} is left out: {error}")
        models = dict.fromkeys(NAMES, "any") | {"ours": OURS, "transformers": str(folder / "bench_hf")}
        for server, port in ports.items():  # warm up, and compile
            asyncio.run(load(port, models[server], 2, options, 99))
        print(ROW.format("clients", "server", "tok/s", "first, p50", "first, p99", "of the best", "of ours"))
        alone = direct(folder, options) if "ours" in ports and 1 in options.clients else None
        for clients in options.clients:
            found = {server: [] for server in [*ports, *(["direct"] if alone and clients == 1 else [])]}
            for salt in range(options.rounds):
                for server, port in ports.items():
                    found[server].append(asyncio.run(load(port, models[server], clients, options, salt)))
                if "direct" in found:
                    found["direct"].append(alone(salt))
            report(clients, found)


def report(clients: int, found: dict[str, list[dict[str, float]]]) -> None:
    """A row for each server."""
    medians = {
        server: {name: statistics.median(one[name] for one in all_) for name in all_[0]}
        for server, all_ in found.items()
    }
    best_other = max((one["rate"] for server, one in medians.items() if server not in ("ours", "direct")), default=0.0)
    ours = medians.get("ours", {}).get("rate", 0.0)
    for server, one in medians.items():
        print(
            ROW.format(
                clients,
                server,
                f"{one['rate']:,.0f}",
                *("-" if math.isnan(one[name]) else f"{1000 * one[name]:,.0f} ms" for name in ("first", "late")),
                f"{one['rate'] / best_other:.2f}" if best_other else "-",
                f"{one['rate'] / ours:.2f}" if ours else "-",
            ),
            flush=True,
        )


if __name__ == "__main__":
    utils.run_command(main)
