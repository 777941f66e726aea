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
    """MateConv, by the call of `TextGenerator` that takes prompts' ids: `generate` and `batch_generate` encode theirs,
    and do the same."""
    from model.text.tokenization import load_tokenizer
    from optimized_inference import GenerationConfig, TextGenerator

    graphs = order.kind in ("graph", "sampled_graph")  # of kernels as they are: what a GPU does unasked
    options = {"int8": order.format == "int8", "compile": None if graphs else order.kind in ("compiled", "sampled")}
    generator = TextGenerator(our_model(order), load_tokenizer(), **options)
    generator.eos_ids, generator.say = [-1], lambda line: None
    settings = {} if order.kind.startswith("sampled") else {"do_sample": False, "repetition_penalty": 1.0}

    def generate(tokens: int) -> list[int]:
        config = GenerationConfig(max_new_tokens=tokens, **settings)
        return generator.continued(prompts(order), config)[0].ids

    return twice(generate)


def our_loop(order: argparse.Namespace) -> Callable[[int], Written]:
    """MateConv's loop of ids alone, compiled: without text, and without a look whether the weights have changed."""
    from model.generation.engine import Engine
    from model.generation.rows import Rows
    from optimized_inference import GenerationConfig, decode

    rows, texts = Rows(Engine(our_model(order), order.format == "int8", True), order.batch), prompts(order)

    def generate(tokens: int) -> list[int]:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, repetition_penalty=1.0)
        return [event.token for event in decode(rows, texts, config, [-1]) if event.number == 0]

    return twice(generate)


def twice(generate: Callable[[int], list[int]]) -> Callable[[int], Written]:
    """A text of one token, and then the whole text, both timed; `generate` returns the first prompt's new ids."""

    def write(tokens: int) -> Written:
        start = time.perf_counter()
        generate(1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        ids = generate(tokens)
        return first, time.perf_counter() - start, ids

    return write


def transformers(order: argparse.Namespace) -> Callable[[int], Written]:
    """transformers' Llama and its `generate`; with a static cache it compiles the step by itself, as a graph."""
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

    def generate(tokens: int) -> list[int]:
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options |= {"cache_implementation": "static"} if order.kind == "static" else {}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
        return found.tolist()[0][order.prompt :]  # which waits for a GPU

    return twice(generate)


def llama_cpp(order: argparse.Namespace) -> Callable[[int], Written]:
    """llama.cpp by its C functions, which llama-cpp-python passes on: its class `Llama` takes 15 to 20 % more."""
    import llama_cpp as llama
    import numpy as np

    llama.llama_backend_init()
    path = Path(order.folder) / f"weights_{order.format}.gguf"
    loading = llama.llama_model_default_params()
    loading.use_extra_bufts = not order.llama_plain
    model = llama.llama_model_load_from_file(str(path).encode(), loading)
    options = llama.llama_context_default_params()
    options.n_seq_max, options.n_ctx = order.batch, order.batch * order.max_seq_len
    options.n_outputs_max = order.batch
    options.n_batch = max(options.n_batch, order.batch * order.prompt)
    options.n_threads = options.n_threads_batch = order.threads
    context = llama.llama_init_from_model(model, options)
    memory, texts = llama.llama_get_memory(context), prompts(order)
    batch = llama.llama_batch_init(order.batch * order.prompt, 0, 1)

    def likeliest(tokens: list[list[int]], position: int) -> list[int]:
        """After some tokens of every text, from that position on."""
        batch.n_tokens, ends = 0, []
        for row, ids in enumerate(tokens):
            for place, token in enumerate(ids):
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.seq_id[n][0], batch.n_seq_id[n] = token, position + place, row, 1
                batch.logits[n] = place == len(ids) - 1
                batch.n_tokens = n + 1
            ends.append(batch.n_tokens - 1)
        if llama.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = [llama.llama_get_logits_ith(context, end) for end in ends]
        return [int(np.ctypeslib.as_array(row, shape=(order.vocab_size,)).argmax()) for row in rows]

    def generate(tokens: int) -> list[int]:
        llama.llama_memory_clear(memory, True)
        newest = likeliest(texts, 0)
        written = newest[:1]
        for position in range(order.prompt, order.prompt + tokens - 1):
            newest = likeliest([[token] for token in newest], position)
            written.append(newest[0])
        return written

    return twice(generate)


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
    if order.kind not in ("llama_cpp", "transformers", "static"):
        import torch

        torch.set_num_threads(order.threads)
    others = {"llama_cpp": llama_cpp, "transformers": transformers, "static": transformers, "loop": our_loop}
    build = others.get(order.kind, ours)
    write = build(order)
    write(order.tokens)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(write(order.tokens)), file=answers, flush=True)


if __name__ == "__main__":
    serve(argparse.Namespace(**json.loads(sys.argv[2])))
