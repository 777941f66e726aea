"""Who takes part in decode.py: each one's model of the same weights, and one text written with it.

A contender is built from the weights that decode.py made, and then called with `tokens`: it continues every prompt by
exactly that many tokens, greedily, and returns the seconds to the first token and in total.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LLAMA_FORMATS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
FIRST_ID = 5  # smaller ids end a text
Written = tuple[float, float, list[int]]  # seconds to the first token, seconds in total, the first prompt's new ids


def prompts(order: argparse.Namespace) -> list[list[int]]:
    """One prompt for each row of the batch, all of the same length."""
    numbers = itertools.count(7)
    ids = range(FIRST_ID, order.vocab_size)
    return [[ids[next(numbers) * 7919 % len(ids)] for _ in range(order.prompt)] for _ in range(order.batch)]


def our_model(order: argparse.Namespace):
    """The weights in the order's format; int8 is made from float32."""
    import torch

    from model.model import Transformer
    from model.weights import load_weights

    weights = load_weights(Path(order.folder) / "weights.pth")
    model = Transformer(weights.config).eval()
    model.load_state_dict(weights.state_dict)
    return model.to(order.device, torch.bfloat16 if order.format == "bf16" else torch.float32)


def ours(order: argparse.Namespace) -> Callable[[int], Written]:
    """MateConv, as TextGenerator generates."""

    from model.generation.engine import Engine
    from model.generation.rows import Rows
    from optimized_inference import GenerationConfig, decode

    model = our_model(order)
    engine = Engine(model, order.format == "int8", order.kind in ("compiled", "sampled"))
    settings = {} if order.kind.startswith("sampled") else {"do_sample": False, "repetition_penalty": 1.0}
    rows, texts = Rows(engine, order.batch), prompts(order)

    def write(tokens: int) -> Written:
        config = GenerationConfig(max_new_tokens=tokens, **settings)
        start, first, ids = time.perf_counter(), None, []
        for event in decode(rows, texts, config, [-1]):
            first = first or time.perf_counter() - start
            if event.number == 0:
                ids.append(event.token)
        return first, time.perf_counter() - start, ids

    return write


def transformers(order: argparse.Namespace) -> Callable[[int], Written]:
    """transformers' Llama and its `generate`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from model.weights.names import in_halves, reordered, transformers_name
    from model.weights.transformers_folder import config_json

    source = our_model(order)
    state_dict = reordered(source.state_dict(), source.config, in_halves)
    model = LlamaForCausalLM(LlamaConfig(**config_json(source.config, "llama", source.dtype))).eval()
    model.load_state_dict({transformers_name(name): tensor for name, tensor in state_dict.items()})
    model = model.to(source.device, source.dtype)
    ids = torch.tensor(prompts(order), device=order.device)

    def generate(tokens: int) -> list[list[int]]:
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
        return found.tolist()  # which waits for a GPU

    def write(tokens: int) -> Written:
        start = time.perf_counter()
        generate(1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        found = generate(tokens)
        return first, time.perf_counter() - start, found[0][order.prompt :]

    return write


def llama_cpp(order: argparse.Namespace) -> Callable[[int], Written]:
    """llama.cpp through llama-cpp-python's own calls, one prompt."""
    import llama_cpp
    import numpy as np

    path = str(Path(order.folder) / f"weights_{order.format}.gguf")
    model = llama_cpp.Llama(
        path, n_ctx=order.max_seq_len, n_threads=order.threads, n_threads_batch=order.threads, verbose=False
    )
    (prompt,) = prompts(order)

    def likeliest() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    def write(tokens: int) -> Written:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        ids = [likeliest()]
        first = time.perf_counter() - start
        for _ in range(tokens - 1):
            model.eval(ids[-1:])
            ids.append(likeliest())
        return first, time.perf_counter() - start, ids

    return write


def write_gguf(folder: Path, formats: list[str]) -> None:
    """The weights for llama.cpp."""
    from model.weights import load_weights
    from model.weights.gguf import save_gguf

    weights = load_weights(folder / "weights.pth")
    for name in formats:
        save_gguf(folder / f"weights_{name}.gguf", weights, LLAMA_FORMATS[name])


def serve(order: argparse.Namespace) -> None:
    """A contender's process: warm up, report it in JSON, then generate a text for every line on stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if order.kind not in ("llama_cpp", "transformers"):
        import torch

        torch.set_num_threads(order.threads)
    build = {"llama_cpp": llama_cpp, "transformers": transformers}.get(order.kind, ours)
    write = build(order)
    write(order.tokens)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(write(order.tokens)), file=answers, flush=True)


if __name__ == "__main__":
    serve(argparse.Namespace(**json.loads(sys.argv[2])))
