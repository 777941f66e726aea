"""Weights from one format to another: ours, transformers', GGUF, llama2.c's, Meta's.

python -m model.convert out/pretrain_512.pth my_model                   # a folder for transformers
python -m model.convert out/pretrain_512.pth my_model.gguf --dtype Q8_0 # for llama.cpp
python -m model.convert SmolLM2.gguf out/smollm2.pth                    # from others, to train it further
python -m model.convert pretrain_512.pth out/minimind2.pth --tokenizer_path minimind_tokenizer --n_heads 8

The source's format is recognised by its content; the target's name, or --to, decides what is written.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from model.command import CommandParser, path_flag, run_command, say
from model.errors import InputError, counted
from model.generation.generation_config import GenerationConfig
from model.LMConfig import LMConfig
from model.options import accepted_types, options_of
from model.storage.files import check_is_new
from model.text.tokenization import tokenizer_sha256
from model.weights import Weights, load_weights
from model.weights.find import find_weights
from model.weights.formats import FORMATS
from model.weights.load import fitting_tokenizer, recorded_tokenizer
from model.weights.minimind import OVERRIDABLE

# Options of GenerationConfig that a format's file of sampling defaults holds too.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


def convert(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    dtype: str = "F32",
    tokenizer_path: str | Path | None = None,
    overrides: Mapping[str, float] | None = None,
    say: Callable[[str], None] = say,
) -> Weights:
    """Read weights in any format and write them in another.

    Args:
        source: a file or a folder; a run's folder means its newest weights.
        target: a new path, or an empty folder.
        to: a name in FORMATS; None: by the target's suffix.
        dtype: of the matrices, one of the format's dtypes.
        tokenizer_path: None: the weights' tokenizer, or the embedded one.
        overrides: values that a file without a description leaves open, such as {"n_heads": 8}.
        say: called with each status line.

    Returns:
        the weights that were read.

    Raises:
        InputError: the source cannot be read, the target exists or cannot express the model, or the
            tokenizer does not fit the weights.
    """
    target = Path(target)
    if to is None and target.suffix == ".safetensors":
        raise InputError(f"{target}: a folder's name expected, which model.safetensors will be in")
    to = to or format_of_name(target)
    if to not in FORMATS:
        raise InputError(f"--to: {to!r} found, one of {', '.join(FORMATS)} expected")
    if dtype not in FORMATS[to].dtypes:
        raise InputError(f"--dtype: {dtype!r} found, {', '.join(FORMATS[to].dtypes)} expected for {to}")
    for path in (target, *FORMATS[to].companions(target)):
        check_is_new(path)
    source, choice = find_weights(source)
    if choice is not None:
        say(choice)
    weights = load_weights(source, overrides)
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


def format_of_name(target: Path) -> str:
    """The format that a target's name stands for, a name in FORMATS.

    Raises:
        InputError: the name ends like a file of an unknown format.
    """
    names = {format.suffix: name for name, format in FORMATS.items() if format.suffix is not None}
    if target.suffix in names:
        return names[target.suffix]
    looks_like_a_file = re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]*", target.suffix)  # my_model-1.5 has no ending
    if looks_like_a_file and not target.is_dir():
        known = ", ".join(suffix for suffix in names if suffix)
        raise InputError(
            f"{target}: {target.suffix} is no format that can be written; name it {known}, or without an ending for"
            " a folder of transformers (--to names the format of any other name)"
        )
    return "transformers"


def write(to: str, target: Path, weights: Weights, dtype: str = "F32") -> list[str]:
    """Write weights in a format, as `convert` does; returns remarks for the user."""
    defaults = vars(GenerationConfig())  # so that transformers samples as inference.py does without flags
    return FORMATS[to].save(target, weights, dtype, {name: defaults[name] for name in SAMPLING}) or []


def describe(weights: Weights) -> str:
    """One line on a model."""
    config, counts = weights.config, {name: tensor.numel() for name, tensor in weights.state_dict.items()}
    if config.tie_embeddings:
        counts.pop("output.weight")
    numbers = sum(count for name, count in counts.items() if not name.endswith("router.bias"))  # which is no parameter
    more = [name for name in ("qk_norm", "qkv_bias", "tie_embeddings") if getattr(config, name)]
    if config.n_experts:
        shared = f" and {config.n_shared_experts} shared" if config.n_shared_experts else ""
        more.insert(
            0, f"{config.n_experts} experts of {config.expert_hidden_dim}, {config.n_active_experts} active{shared}"
        )
    more += [f"RoPE {config.rope_theta:g}" + (f" {config.rope_scaling}" if config.rope_scaling else "")]
    return (
        f"{numbers:,} parameters: {counted(config.n_layers, 'layer')} of {config.dim},"
        f" {counted(config.n_heads, 'head')} of {config.head_dim}"
        f" ({config.n_kv_heads} for keys and values), {config.vocab_size:,} tokens, context {config.max_seq_len:,}; "
        + ", ".join(more)
    )


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
    shape = parser.add_argument_group("shape", "For weights without a description, where their tensors do not show it.")
    for name in OVERRIDABLE:
        field = options_of(LMConfig)[name]
        kind = accepted_types(field)[0]
        shape.add_argument(f"--{name}", type=str if kind is bool else kind, help=field.metadata["help"])
    arguments = parser.parse_args(sys.argv[1:])
    overrides = {name: value for name in OVERRIDABLE if (value := getattr(arguments, name)) is not None}
    convert(arguments.source, arguments.target, arguments.to, arguments.dtype, arguments.tokenizer_path, overrides)


if __name__ == "__main__":
    run_command(main)
