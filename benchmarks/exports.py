"""Does a model compute the same in other programs, and come back from their files bit for bit?

    python benchmarks/exports.py --llama_python ../llama/bin/python
    python benchmarks/exports.py --llama_python ../llama/bin/python --weights out/best_model.pth ../smollm2.gguf

Models of several shapes with random weights, and those of --weights, are written in each format. The other program
reads the file, tokenizes a text in Chinese and English with emoji, computes the logits at each position, and continues
the text greedily. A row shows what is compared; the largest difference of a logit and the largest logit; whether ids
and text are the same; and whether reading the file back gives what was written.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from worker import Worker

import utils
from model.errors import first_line

TEXT = "春风又绿江南岸，明月何时照我还？2024 年 👩‍👩‍👧 don't stop 学而时习之"
NEW_TOKENS = 48
ROW = "{:34} {:22} {:>11} {:>9} {:>5} {:>6} {:>6}"
EXPERTS = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "n_experts": 8, "hidden_dim": 96}
SHAPES = {
    "MiniMind's shape, 2 layers": {"n_layers": 2},
    "9 heads, 3 for keys": {"dim": 288, "n_heads": 9, "n_kv_heads": 3, "n_layers": 2},
    "untied, 6,411 tokens": {"dim": 128, "n_heads": 4, "n_kv_heads": 1, "tie_embeddings": False, "vocab_size": 6411},
    "biases, as Qwen2": {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "qkv_bias": True},
    "qk_norm, heads of 64, as Qwen3": {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "head_dim": 64},
    "linear RoPE scaling": {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "rope_scaling": "linear", "rope_factor": 4.0},
    "llama3 RoPE scaling": {
        "dim": 128, "n_heads": 4, "n_kv_heads": 2, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_theta": 5e5,
        "rope_original_max_seq_len": 64,
    },
    "8 experts, as Mixtral": EXPERTS,
    "shared experts, as Granite": EXPERTS | {"n_shared_experts": 2},
    "experts, qk_norm, as Qwen3": EXPERTS | {"qk_norm": True},
    "experts, not normalised": EXPERTS | {"normalize_expert_weights": False},
    "experts by sigmoid, as GLM-4.5": EXPERTS | {
        "n_shared_experts": 1, "expert_score": "sigmoid", "expert_bias": True, "qk_norm": True,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the other programs


def serve(order: dict) -> None:
    """llama.cpp's process: tokenize, compute logits and continue, for every line."""
    import llama_cpp
    import numpy as np

    answers, sys.stdout = sys.stdout, sys.stderr
    f32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    model = llama_cpp.Llama(order["file"], n_ctx=order["context"], logits_all=True, verbose=False, **f32)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        ids = model.tokenize(order["text"].encode(), add_bos=True, special=False)
        model.eval(ids)
        np.save(order["logits"], model.scores[: len(ids)])
        new = []
        while len(new) < order["new_tokens"]:
            new.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(new[-1:])
        text = model.detokenize(new, prev_tokens=ids, special=False).decode("utf-8", "replace")
        print(json.dumps([ids, new, text]), file=answers, flush=True)


def in_llama_cpp(path: Path, context: int, python: str):
    """ids of TEXT, logits [T, V], the ids and the text that follow greedily."""
    import numpy as np

    with tempfile.TemporaryDirectory() as here:
        logits = Path(here) / "logits.npy"
        order = {"file": str(path), "context": context, "text": TEXT, "new_tokens": NEW_TOKENS, "logits": str(logits)}
        worker = Worker("llama.cpp", __file__, order, python=python).wait()
        try:
            ids, new, text = worker.ask()
        finally:
            worker.close()
        return ids, np.load(logits), new, text


def in_transformers(path: Path, context: int, python: str):
    """The same in transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(ids).logits[0].numpy()
        greedy = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None, "top_k": None, "top_p": None}
        found = model.generate(ids, max_new_tokens=NEW_TOKENS, temperature=None, **greedy)
    new = found[0, ids.shape[1] :].tolist()
    return ids[0].tolist(), logits, new, tokenizer.decode(new, skip_special_tokens=True)


def in_mateconv(weights):
    """The same in ours."""
    import torch

    from model.generation.engine import Engine
    from model.generation.rows import Rows
    from model.model import Transformer
    from model.text.tokenization import load_tokenizer
    from model.weights.load import fitting_tokenizer
    from optimized_inference import GenerationConfig, TextGenerator, decode

    model = Transformer(weights.config).eval()
    model.load_state_dict(weights.state_dict)
    tokenizer = fitting_tokenizer(Path("weights"), weights, None)
    ids = TextGenerator(model, tokenizer, begins_with_bos=weights.begins_with_bos).encode_prompt(TEXT)
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0].numpy()
        config = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS)
        new = [event.token for event in decode(Rows(Engine(model, compile=False), 1), [ids], config, [-1])]
    return ids, logits, new, load_tokenizer(tokenizer.name_or_path).decode(new, skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------------- comparing


def random_weights(shape: dict, seed: int):
    """A model whose logits differ enough for a greedy choice, with gains and biases that are not 1 and 0."""
    import torch

    from model.LMConfig import LMConfig
    from model.model import Transformer
    from model.weights import Weights

    torch.manual_seed(seed)
    model = Transformer(LMConfig(**{"n_layers": 3, "max_seq_len": 256} | shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0, 0.5 if "embeddings" in name or "output" in name else 0.08)
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias"):
                buffer.normal_(0, 0.1)
    return Weights({name: tensor.detach() for name, tensor in model.state_dict().items()}, model.config)


def same_bits(one, other) -> bool:
    """Whether two models have the same shape and weights, in float32."""
    import torch

    return one.config == other.config and all(
        torch.equal(tensor.float(), other.state_dict[name].float()) for name, tensor in one.state_dict.items()
    )


def compare(name: str, weights, formats: list[tuple[str, str]], llama_python: str | None) -> None:
    """A row for each format."""
    from model.convert import convert, write
    from model.weights import load_weights

    context = min(weights.config.max_seq_len, 256)
    with tempfile.TemporaryDirectory() as here:
        for number, (kind, dtype) in enumerate(formats):
            path = Path(here) / f"{number}{'.gguf' if kind == 'gguf' else ''}"
            write(kind, path, weights, dtype)
            back = load_weights(path)
            ours = in_mateconv(back)  # the numbers in the file
            program = "llama.cpp" if kind == "gguf" else "transformers"
            theirs = PROGRAMS[program](path, context, llama_python)
            pth = Path(here) / f"{number}.pth"
            convert(path, pth, say=lambda line: None)
            exact = dtype == "F32" and not same_bits(weights, back)
            whole = "NO" if exact or not same_bits(load_weights(pth), back) else "yes"
            print_row(name, f"{program} {dtype}", ours, theirs, whole)


def compare_as_it_is(path: Path, programs: list[str], llama_python: str | None) -> None:
    """A row for each program that reads a foreign file itself."""
    from model.weights import load_weights

    weights = load_weights(path)
    ours = in_mateconv(weights)
    for program in programs:
        try:
            theirs = PROGRAMS[program](path, min(weights.config.max_seq_len, 256), llama_python)
        except (ValueError, ImportError) as error:  # transformers needs the package accelerate to read GGUF
            print(f"{path.name}: left out: {program}: {first_line(error)}")
            continue
        print_row(path.name, f"{program}, as it is", ours, theirs, "-")


def print_row(name: str, program: str, ours: tuple, theirs: tuple, back: str) -> None:
    """A row of the table."""
    import numpy as np

    same = ["yes" if ours[part] == theirs[part] else "NO" for part in (0, 3)]
    largest = f"{np.abs(ours[1]).max():.3g}"
    difference = "-"
    if ours[0] == theirs[0]:
        difference = f"{np.abs(ours[1] - theirs[1]).max():.2g}"
    print(ROW.format(name[-34:], program, difference, largest, *same, back), flush=True)


PROGRAMS = {"transformers": in_transformers, "llama.cpp": in_llama_cpp}


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = utils.CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--llama_python", metavar="FILE", help="a Python with llama-cpp-python; omitted: without llama.cpp"
    )
    parser.add_argument(
        "--weights", nargs="+", type=Path, default=[], metavar="PATH", help="more weights, in any format"
    )
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    from model.weights import load_weights

    options = read_options()
    formats = [("transformers", dtype) for dtype in ("F32", "BF16")]
    if options.llama_python:
        formats += [("gguf", dtype) for dtype in ("F32", "F16", "BF16", "Q8_0")]
    print(ROW.format("model", "program, numbers", "difference", "of logits", "ids", "text", "back"))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        compare(name, random_weights(shape, seed), formats, options.llama_python)
    for path in options.weights:
        if path.is_dir() or path.suffix == ".gguf":
            own = ["transformers", "llama.cpp"] if path.suffix == ".gguf" else ["transformers"]
            compare_as_it_is(path, own if options.llama_python else own[:1], options.llama_python)
        weights = load_weights(path)
        state_dict = {name: tensor.float() for name, tensor in weights.state_dict.items()}
        compare(str(path), dataclasses.replace(weights, state_dict=state_dict), formats, options.llama_python)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(json.loads(sys.argv[2]))
    else:
        utils.run_command(main)
