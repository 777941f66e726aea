"""Weights from one format to another: ours, transformers', GGUF, llama2.c's, Meta's.

python -m model.convert out/pretrain_512.pth my_model                   # a folder for transformers
python -m model.convert out/pretrain_512.pth my_model.gguf --dtype Q8_0 # for llama.cpp
python -m model.convert SmolLM2.gguf out/smollm2.pth                    # from others, to train it further
python -m model.convert pretrain_512.pth out/minimind2.pth --tokenizer_path minimind_tokenizer --n_heads 8

The content of the source shows its format; the name of the target, or --to, decides what is written.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from model.command import CommandParser, path_flag, run_command, say
from model.errors import InputError
from model.generation.generation_config import GenerationConfig
from model.LMConfig import LMConfig
from model.options import accepted_types, options_of
from model.storage.files import check_is_new
from model.text.tokenization import EMBEDDED_TOKENIZER, tokenizer_folder, tokenizer_sha256
from model.text.tokenizer_folder import same_tokenizer
from model.weights import Weights, load_weights, save_weights
from model.weights.find import find_weights
from model.weights.gguf import save_gguf
from model.weights.llama2c import save_llama2c, save_llama2c_checkpoint
from model.weights.load import fitting_tokenizer, recorded_tokenizer
from model.weights.meta_folder import save_meta_folder
from model.weights.minimind import GIVABLE
from model.weights.tokenizer_copy import copy_tokenizer
from model.weights.transformers_folder import save_transformers

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    dtype: str = "F32",
    tokenizer_path: str | Path | None = None,
    given: Mapping[str, float] | None = None,
    say: Callable[[str], None] = say,
) -> Weights:
    """Read weights in any format and write them in another.

    Args:
        source: a file or a folder; a run's folder means its newest weights.
        target: must not exist, or be an empty folder.
        to: a name in FORMATS; None: by the target's suffix.
        dtype: of the matrices, one of the format's dtypes.
        tokenizer_path: None: the one that comes with the weights, or the embedded one.
        given: values that a file without a description leaves open, such as {"n_heads": 8}.
        say: called with a line for each thing that was found or written.

    Returns:
        what was read.

    Raises:
        InputError: the source cannot be read, the target cannot express it or exists, or the tokenizer is not its own.
    """
    target = Path(target)
    if to is None and target.suffix == ".safetensors":
        raise InputError(f"{target}: a folder's name expected, which model.safetensors will be in")
    suffixes = {format.suffix: name for name, format in FORMATS.items()}
    to = to or suffixes.get(target.suffix, "transformers")  # a model's name may have a dot in it
    if to not in FORMATS:
        raise InputError(f"--to: {to!r} found, one of {', '.join(FORMATS)} expected")
    if dtype not in FORMATS[to].dtypes:
        raise InputError(f"--dtype: {dtype!r} found, {', '.join(FORMATS[to].dtypes)} expected for {to}")
    for path in (target, *(_beside(target) if to == "mateconv" else ())):
        check_is_new(path)
    source, choice = find_weights(source)
    if choice is not None:
        say(choice)
    weights = load_weights(source, given)
    if weights.inferred:
        say(weights.inferred)
    say(f"{source}: {describe(weights)}")
    fitting_tokenizer(source, weights, tokenizer_path)
    if tokenizer_path is None:
        weights = dataclasses.replace(weights, tokenizer_path=recorded_tokenizer(weights))
    else:
        sha256 = tokenizer_sha256(tokenizer_path)
        weights = dataclasses.replace(weights, tokenizer_path=str(tokenizer_path), tokenizer_sha256=sha256)
    for remark in write(to, target, weights, dtype):
        say(f"{target}: {remark}")
    say(f"{target}: written for {FORMATS[to].readers}")
    return weights


def write(to: str, target: Path, weights: Weights, dtype: str = "F32") -> list[str]:
    """Write weights in a format, as `convert` does; returns remarks for the user."""
    return FORMATS[to].write(target, weights, dtype) or []


def describe(weights: Weights) -> str:
    """A model on one line."""
    config = weights.config
    numbers = sum(t.numel() for name, t in weights.state_dict.items() if name != "output.weight")
    if not config.tie_embeddings:
        numbers += weights.state_dict["output.weight"].numel()
    more = [name for name in ("qk_norm", "qkv_bias", "tie_embeddings") if getattr(config, name)]
    more += [f"RoPE {config.rope_theta:g}" + (f" {config.rope_scaling}" if config.rope_scaling else "")]
    return (
        f"{numbers:,} parameters: {config.n_layers} layers of {config.dim}, {config.n_heads} heads of {config.head_dim}"
        f" ({config.n_kv_heads} for keys and values), {config.vocab_size:,} tokens, context {config.max_seq_len:,}; "
        + ", ".join(more)
    )


def _beside(target: Path) -> tuple[Path, Path]:
    """What our format writes beside `target`: its description, and its tokenizer unless that is the embedded one."""
    return target.with_suffix(".json"), target.with_name(f"{target.stem}_tokenizer")


def _write_mateconv(target: Path, weights: Weights, dtype: str) -> None:
    """X.pth with X.json, and the tokenizer as X_tokenizer unless it is the embedded one."""
    if weights.tokenizer_path is not None:
        folder, path = tokenizer_folder(weights.tokenizer_path), None
        if not same_tokenizer(folder, EMBEDDED_TOKENIZER):
            _, path = _beside(target)
            copy_tokenizer(folder, path)
        sha256 = tokenizer_sha256(path)
        weights = dataclasses.replace(weights, tokenizer_path=path and str(path), tokenizer_sha256=sha256)
    save_weights(target, weights)


def _write_transformers(target: Path, weights: Weights, dtype: str) -> None:
    defaults = vars(GenerationConfig())  # so that transformers samples as inference.py does without flags
    save_transformers(target, weights, DTYPES[dtype], {name: defaults[name] for name in SAMPLING})


class Format(NamedTuple):
    """A format that is written.

    Attributes:
        suffix: of a target's name that means this format; None: only --to does.
        readers: what reads it, for the user.
        dtypes: that its matrices can have, the usual one first.
        write: called with target, weights and dtype; returns remarks for the user, or None.
    """

    suffix: str | None
    readers: str
    dtypes: tuple[str, ...]
    write: Callable[[Path, Weights, str], list[str] | None]


FORMATS = {
    "mateconv": Format(
        ".pth", "MateConv: python inference.py --model_path, python train.py --init_from", ("F32",), _write_mateconv
    ),
    "transformers": Format(
        "", "transformers: AutoModelForCausalLM.from_pretrained", tuple(DTYPES), _write_transformers
    ),
    "gguf": Format(".gguf", "llama.cpp and what builds on it", (*DTYPES, "Q8_0"), save_gguf),
    "llama2c": Format(
        ".bin",
        "llama2.c's run; it needs a tokenizer.bin, which cannot express byte-level BPE and is not written",
        ("F32",),
        lambda target, weights, dtype: save_llama2c(target, weights),
    ),
    "llama2c_checkpoint": Format(
        ".pt",
        "llama2.c's Python scripts",
        ("F32",),
        lambda target, weights, dtype: save_llama2c_checkpoint(target, weights),
    ),
    "meta": Format(
        None,
        "what reads Meta's params.json and consolidated.00.pth; without a tokenizer",
        ("F32",),
        lambda target, weights, dtype: save_meta_folder(target, weights),
    ),
}


def main() -> None:
    """The command line."""
    parser = CommandParser(prog="python -m model.convert", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source",
        type=path_flag,
        help="a .pth, .pt, .gguf, .bin or .safetensors file or a folder, ours or another program's",
    )
    parser.add_argument("target", type=path_flag, help="what to write; must not exist")
    by_name = ", ".join(f"{f.suffix or 'a folder'}: {name}" for name, f in FORMATS.items() if f.suffix is not None)
    parser.add_argument("--to", choices=FORMATS, help=f"the format; default: by the target's name ({by_name})")
    dtypes = FORMATS["gguf"].dtypes  # which has all of them
    parser.add_argument("--dtype", choices=dtypes, default="F32", help="of the matrices; Q8_0 for GGUF only [F32]")
    parser.add_argument(
        "--tokenizer_path", type=path_flag, help="folder of the tokenizer; default: what comes with the weights"
    )
    for name in GIVABLE:
        kind = accepted_types(options_of(LMConfig)[name])[0]
        parser.add_argument(f"--{name}", type=kind, help="for files without a description, whose shapes do not show it")
    arguments = parser.parse_args(sys.argv[1:])
    given = {name: value for name in GIVABLE if (value := getattr(arguments, name)) is not None}
    convert(arguments.source, arguments.target, arguments.to, arguments.dtype, arguments.tokenizer_path, given)


if __name__ == "__main__":
    run_command(main)
