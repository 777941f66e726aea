"""Weights and checkpoints on disk.

Two kinds of file, both written so that a crash leaves the old one or the new one, both read without running code:

- weights (`pretrain_512.pth`, `best_model.pth`): a plain state dict. Beside each lies `{stem}.json` with the
  LMConfig and the tokenizer, so that inference needs no flags.
- checkpoints (`checkpoint_step_5000.pth`, `checkpoint_interrupted.pth`): everything training needs to go on exactly.
"""

import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError
from model.files import replacing, write_json
from model.LMConfig import LMConfig

FORMAT_VERSION = 1  # of the JSON beside weights
CHECKPOINT_VERSION = 1
CHECKPOINT_KEYS = {
    "format_version", "started", "settings", "config", "tokenizer_path", "tokenizer_sha256", "data", "validation",
    "pace", "total_steps", "progress", "model", "ema", "ema_updates", "optimizer", "scaler", "random_states",
    "environment",
}  # fmt: skip

# What zipfile and torch.load raise for files that were damaged, cut off, or made to look like what they are not.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError,
    TypeError, LookupError, AttributeError, OverflowError, NotImplementedError, AssertionError, MemoryError,
)  # fmt: skip


@dataclass
class Weights:
    """A model's weights with what is needed to use them."""

    state_dict: dict[str, Tensor]
    config: LMConfig
    tokenizer_path: str | None = None  # None: the embedded tokenizer
    tokenizer_sha256: str | None = None  # None: not known
    inferred: bool = False  # the config was read off the shapes, since no JSON lay beside the weights


def save_weights(path: str | Path, weights: Weights) -> None:
    """Write `X.pth`, a plain state dict on the CPU in float32, and `X.json` beside it."""
    path = Path(path)
    sidecar = {
        "format_version": FORMAT_VERSION,
        "config": asdict(weights.config),
        "tokenizer_path": weights.tokenizer_path,
        "tokenizer_sha256": weights.tokenizer_sha256,
    }
    write_json(path.with_suffix(".json"), sidecar)
    save_torch(path, _on_cpu(weights.state_dict))


def _on_cpu(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached float32 tensors on the CPU; keys that share one matrix still share it, so it is stored once."""
    moved: dict[int, Tensor] = {}
    result = {}
    for key, tensor in state_dict.items():
        if tensor.data_ptr() not in moved:
            moved[tensor.data_ptr()] = tensor.detach().to("cpu", torch.float32)
        result[key] = moved[tensor.data_ptr()]
    return result


def load_weights(path: str | Path) -> Weights:
    """Read weights: ours, MiniMind v1's, or those inside one of our checkpoints (the EMA's where it has them).

    Raises:
        InputError: the file is missing, damaged, or holds no model that this program knows.
    """
    path = Path(path)
    content = load_torch(path)
    if CHECKPOINT_KEYS <= content.keys():
        state_dict, config = content["ema"] or content["model"], LMConfig(**content["config"])
        return Weights(state_dict, config, content["tokenizer_path"], content["tokenizer_sha256"])

    state_dict = _clean_keys(content, path)
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return Weights(state_dict, infer_config(state_dict, path), inferred=True)
    try:
        described = json.loads(sidecar.read_text(encoding="utf-8"))
        config = LMConfig(**described["config"])
        return Weights(state_dict, config, described["tokenizer_path"], described["tokenizer_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{sidecar}: does not describe weights ({error!r}); without it the shapes are read") from error


def _clean_keys(content: Mapping, path: Path) -> dict[str, Tensor]:
    """Strip the prefixes that wrappers leave behind, and MiniMind's saved mask buffers."""
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: expected a state dict of tensors or a MateConv checkpoint, found neither")
    cleaned = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in content.items()}
    return {key: value for key, value in cleaned.items() if not key.endswith("attention.mask")}


def infer_config(state_dict: Mapping[str, Tensor], path: str | Path = "weights") -> LMConfig:
    """Read an LMConfig off a state dict with Meta's names. Heads keep MiniMind v1's 32 numbers: shapes don't tell.

    Raises:
        InputError: the names are not Meta's, or the shapes do not fit together.
    """
    needed = ("tok_embeddings.weight", "layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight", "norm.weight")
    missing = [key for key in needed if key not in state_dict]
    if missing:
        raise InputError(f"{path}: no {missing[0]} inside; expected MiniMind v1's names (tok_embeddings, layers.0.…)")
    vocab_size, dim = state_dict["tok_embeddings.weight"].shape
    head_dim = LMConfig().head_dim
    layers = {int(key.split(".")[1]) for key in state_dict if key.startswith("layers.")}
    return LMConfig(
        dim=dim,
        n_layers=max(layers) + 1,
        n_heads=dim // head_dim,
        n_kv_heads=state_dict["layers.0.attention.wk.weight"].shape[0] // head_dim,
        vocab_size=vocab_size,
        hidden_dim=state_dict["layers.0.feed_forward.w1.weight"].shape[0],
    )


def save_torch(path: str | Path, content: Mapping) -> None:
    """`torch.save` that leaves the old file or the new one, whatever happens.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's archive writer hides the system's error behind its own
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from error


def load_torch(path: str | Path) -> dict:
    """`torch.load(weights_only=True)` onto the CPU, after every record's checksum was compared.

    `torch.load` itself does not look at the checksums: a flipped bit would pass as a weight.

    Raises:
        InputError: the file is missing, truncated, damaged, not a dict, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's text advises to load unsafely; the one line that says what was found is enough.
        found = re.search(r"Unsupported (?:global|class|operand)[^.]*|GLOBAL \S+", str(error))
        reason = found[0].strip() if found else str(error).strip().splitlines()[0][:200]
        raise InputError(f"{path}: expected tensors and plain values only ({reason}); it is not loaded") from error
    except DAMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: truncated, damaged or not a PyTorch file ({reason}); use an older file") from error
    if damaged:
        raise InputError(f"{path}: damaged (the checksum of {damaged} is wrong); use an older file")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content
