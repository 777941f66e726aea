"""Files of llama2.c (Karpathy, 2023): `ckpt.pt`, which its train.py writes, and the `.bin` that its C programs read.

A `.bin` is little-endian. Version 0, which run.c reads, begins with the seven int32 of SHAPE. Versions 1 and 2 begin
with 256 bytes: a magic, the version, the same seven, whether the embeddings are tied, and how many int8 share a scale.
Weights are float32; in version 2, which runq.c reads, all but the norms are int8.

No tokenizer.bin is written. It holds the pieces of a sentencepiece model, each with a score, and byte-level BPE, whose
merges have an order but no scores, cannot be expressed so: run.c computes what the model does, but its text must be
encoded and decoded elsewhere.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import rope_table
from model.storage.archive import load_torch, save_torch
from model.storage.files import replacing
from model.weights.names import on_cpu, plain_state_dict, whole_pair
from model.weights.shapes import COMMON, check_expressible, check_shapes, read_shape, require_fields, weight_shapes
from model.weights.weights import Weights

MAGIC, ZIP = b"24ka", b"PK\3\4"
LEGACY_HEADER, HEADER = struct.Struct("<7i"), struct.Struct("<4si7iBi")
HEADER_BYTES = 256
SHAPE = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
GROUP = 64  # int8 that share a scale, at most
# Weights in the order of the file. A part of the layers is stored for all layers before the next part follows.
LEGACY_ORDER = (
    "tok_embeddings", "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "norm", "rope_table", "output",
)  # fmt: skip
ORDER = (
    "attention_norm", "ffn_norm", "norm", "tok_embeddings", "attention.wq", "attention.wk", "attention.wv",
    "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "output",
)  # fmt: skip
LAYER_PARTS = ("attention", "ffn_norm", "feed_forward")
TOKENIZER_NOT_KNOWN = "llama2.c's files name no tokenizer: the embedded one is used unless you give one"


def is_llama2c_bin(path: str | Path) -> bool:
    """Whether a file is a `.bin` of llama2.c by its header, even if the rest is missing. Token files are not."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(LEGACY_HEADER.size)
    if start.startswith(MAGIC):
        return True
    try:
        return len(start) == LEGACY_HEADER.size and bool(_config(LEGACY_HEADER.unpack(start), None, path))
    except InputError:
        return False


def load_llama2c(path: str | Path) -> Weights:
    """Read a `ckpt.pt` or a `.bin` of any version; int8 becomes float32.

    Raises:
        InputError: the file is damaged, or has another size than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, a file expected' if path.is_dir() else 'no such file'}")
    with open(path, "rb") as file:
        if file.read(len(ZIP)) == ZIP:
            return read_llama2c_checkpoint(load_torch(path), path)
        file.seek(0)
        state_dict, config = _read_bin(file, path)
    if config.tie_embeddings:
        state_dict["output.weight"] = state_dict["tok_embeddings.weight"]
    return Weights(state_dict, config, inferred=f"{path}: {TOKENIZER_NOT_KNOWN}")


# ----------------------------------------------------------------------------------------------------- a checkpoint


def read_llama2c_checkpoint(content: Mapping, path: Path) -> Weights:
    """The model in a `ckpt.pt`, as `load_torch` returns it.

    Raises:
        InputError: `model_args` does not describe it.
    """
    values, model = content.get("model_args"), content.get("model")
    if not isinstance(values, Mapping) or not isinstance(model, Mapping):
        raise InputError(f"{path}: no model with its model_args inside; a checkpoint of llama2.c's train.py expected")
    require_fields(values, ("dim", "n_layers", "n_heads", "vocab_size"), f"{path}: model_args")
    usual = {"multiple_of": 256, "max_seq_len": 2048}  # of its ModelArgs, where other than an LMConfig's
    n_kv_heads = values["n_heads"] if values.get("n_kv_heads") is None else values["n_kv_heads"]
    config = read_shape({**usual, **values, "n_kv_heads": n_kv_heads}, path)
    state_dict, config.tie_embeddings = whole_pair(plain_state_dict(model, path))
    check_shapes(state_dict, config, path)
    return Weights(state_dict, config, inferred=f"{path}: {TOKENIZER_NOT_KNOWN}")


def save_llama2c_checkpoint(path: str | Path, weights: Weights) -> None:
    """Write a `ckpt.pt` that llama2.c's model.py, export.py and train.py (`--init_from=resume`) load, in float32.

    It holds no optimizer state, so resuming starts with a new optimizer.

    Raises:
        InputError: llama2.c cannot express the model, or the file cannot be written.
    """
    config = weights.config
    check_expressible(config, path, "llama2.c's model_args", (*COMMON, "norm_eps"), _only(config))
    names = (*SHAPE, "multiple_of", "norm_eps", "dropout")
    content = {
        "model": on_cpu(weights.state_dict),
        "model_args": {name: getattr(config, name) for name in names},
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {"vocab_source": "custom", "vocab_size": config.vocab_size},
    }
    save_torch(path, content)


def _only(config: LMConfig) -> dict[str, tuple]:
    """The values that llama2.c's programs assume."""
    values = {"head_dim": config.dim / config.n_heads, "rope_theta": 1e4, "norm_eps": 1e-5, "tie_embeddings": True}
    return {name: (value,) for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------------- a .bin


def _config(numbers: Sequence[int], tied: bool | None, path: Path) -> LMConfig:
    """The config of a header's seven numbers. If `tied` is None, a negative vocab_size says that it is not."""
    values = dict(zip(SHAPE, numbers, strict=True))
    if tied is None:
        tied, values["vocab_size"] = values["vocab_size"] > 0, abs(values["vocab_size"])
    return read_shape({**values, "tie_embeddings": tied}, path)


def _read_bin(file: BinaryIO, path: Path) -> tuple[dict[str, Tensor], LMConfig]:
    """The weights in a `.bin`, once its size is known to be what its header says."""
    start = file.read(HEADER_BYTES)
    version, group = 0, 1
    if start.startswith(MAGIC):
        if len(start) < HEADER_BYTES:
            raise InputError(f"{path}: truncated within its header: {len(start)} of {HEADER_BYTES} bytes")
        _, version, *numbers, tied, group = HEADER.unpack_from(start)
        if version not in (1, 2):
            raise InputError(f"{path}: version {version} of llama2.c's format, 0, 1 or 2 expected")
        config = _config(numbers, bool(tied), path)
    elif len(start) < LEGACY_HEADER.size:
        raise InputError(f"{path}: {len(start)} bytes, less than llama2.c's header; it is truncated or no model")
    else:
        config = _config(LEGACY_HEADER.unpack_from(start), None, path)
    if version == 2 and (group < 1 or config.dim % group or config.hidden_dim % group):
        widths = f"dim {config.dim} and hidden_dim {config.hidden_dim}"
        raise InputError(f"{path}: its header says {group} numbers share a scale, a divisor of {widths} expected")
    expected, found = _bin_bytes(config, version, group), path.stat().st_size
    if found != expected:
        raise InputError(
            f"{path}: {found:,} bytes, by its header {expected:,} expected; it is truncated, damaged or no model"
        )
    file.seek(HEADER_BYTES if version else LEGACY_HEADER.size)
    parts = _parts(config, version)
    state_dict = {name: _read(file, shape, group if version == 2 else None) for name, shape in parts}
    state_dict.pop("rope_table", None)  # run.c computes it again, and so does the model
    return state_dict, config


def _parts(config: LMConfig, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all that follows a file's header."""
    shapes = weight_shapes(dataclasses.replace(config, n_layers=1))
    for part in ORDER if version else LEGACY_ORDER:
        if part == "rope_table":
            yield part, (2, config.max_seq_len, config.head_dim // 2)
        elif part.startswith(LAYER_PARTS):
            shape = shapes[f"layers.0.{part}.weight"]
            yield from ((f"layers.{layer}.{part}.weight", shape) for layer in range(config.n_layers))
        elif part != "output" or not config.tie_embeddings:
            yield f"{part}.weight", shapes[f"{part}.weight"]


def _bin_bytes(config: LMConfig, version: int, group: int) -> int:
    size = HEADER_BYTES if version else LEGACY_HEADER.size
    for _, shape in _parts(config, version):
        numbers = math.prod(shape)
        size += numbers + 4 * (numbers // group) if version == 2 and len(shape) == 2 else 4 * numbers
    return size


def _read(file: BinaryIO, shape: tuple[int, ...], group: int | None) -> Tensor:
    """The next weight as float32; if `group` is not None, a matrix is int8 with a scale for each group after them."""
    numbers = math.prod(shape)
    if group is None or len(shape) == 1:
        return torch.from_numpy(np.fromfile(file, "<f4", numbers)).view(shape)
    values = np.fromfile(file, np.int8, numbers).reshape(-1, group)
    scales = np.fromfile(file, "<f4", numbers // group)
    return torch.from_numpy(values * scales[:, None]).view(shape)


def save_llama2c(path: str | Path, weights: Weights, version: int = 0) -> None:
    """Write a `.bin`: version 0 (run.c) or 1 in float32, version 2 (runq.c) in int8. No tokenizer is written.

    Raises:
        InputError: llama2.c cannot express the model, or the file cannot be written.
    """
    config, state_dict = weights.config, weights.state_dict
    if version not in (0, 1, 2):
        raise InputError(f"version {version} of llama2.c's format requested, 0, 1 or 2 expected")
    check_expressible(config, path, "llama2.c's .bin", (*COMMON, "tie_embeddings"), _only(config))
    group = math.gcd(config.dim, config.hidden_dim, GROUP) if version == 2 else 1
    numbers = [getattr(config, name) for name in SHAPE]
    if version:
        header = HEADER.pack(MAGIC, version, *numbers, config.tie_embeddings, group if version == 2 else 0)
        header = header.ljust(HEADER_BYTES, b"\0")
    else:
        *shape, vocab_size, max_seq_len = numbers
        header = LEGACY_HEADER.pack(*shape, vocab_size if config.tie_embeddings else -vocab_size, max_seq_len)
    with replacing(path, needed=_bin_bytes(config, version, group)) as file:
        file.write(header)
        for name, _ in _parts(config, version):
            tensor = torch.stack(rope_table(config)) if name == "rope_table" else state_dict[name]
            array = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
            for written in _int8(array, group) if version == 2 and array.ndim == 2 else (array,):
                file.write(written)


def _int8(matrix: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, group] and float32 scales [n]; the largest number of a group is 127 times its scale."""
    groups = matrix.reshape(-1, group)
    scales = np.abs(groups).max(axis=1) / np.float32(127)
    divisors = np.where(scales == 0, np.float32(1), scales)
    return np.rint(groups / divisors[:, None]).astype(np.int8), scales.astype("<f4", copy=False)
