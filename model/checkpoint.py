"""Weights on disk: `pretrain_512.pth`, `best_model.pth`, MiniMind v1's, and those inside checkpoints.

A file of weights is a plain state dict. Beside each of ours lies `{stem}.json` with the LMConfig and the tokenizer, so
that inference needs no flags. Checkpoints, which hold what training needs to go on, are in `model/resume.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.archive import load_torch, save_torch
from model.archive_checks import check_shapes, read_shape, read_sidecar
from model.errors import InputError, shown
from model.files import write_json
from model.LMConfig import LMConfig
from model.tokenization import EMBEDDED_TOKENIZER, load_tokenizer, tokenizer_sha256, vocabulary_size
from model.training_state import state_problem

FORMAT_VERSION = 1  # of the JSON beside weights


@dataclass
class Weights:
    """A model's weights with what is needed to use them."""

    state_dict: dict[str, Tensor]
    config: LMConfig
    tokenizer_path: str | None = None  # None: the embedded tokenizer
    tokenizer_sha256: str | None = None  # None: not known
    begins_with_bos: bool = True  # a text is read behind the tokenizer's bos, as in the documents of our token files
    inferred: bool = False  # the config was read off the shapes, since no JSON lay beside the weights

    def with_state(self, state_dict: dict[str, Tensor]) -> "Weights":
        """The same description of other weights."""
        return replace(self, state_dict=state_dict)


def save_weights(path: str | Path, weights: Weights) -> None:
    """Write `X.pth`, a plain state dict on the CPU in float32, and `X.json` beside it."""
    path = Path(path)
    sidecar = {
        "format_version": FORMAT_VERSION,
        "config": asdict(weights.config),
        "tokenizer_path": weights.tokenizer_path,
        "tokenizer_sha256": weights.tokenizer_sha256,
        "begins_with_bos": weights.begins_with_bos,
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


def load_weights(path: str | Path, given: Mapping[str, float] | None = None) -> Weights:
    """Read weights: ours, MiniMind's, those inside one of our checkpoints (the EMA's where it has them), or another
    program's (`model/formats`).

    Args:
        given: values of the shape that a file without a description leaves open, such as {"n_heads": 8}.

    Raises:
        InputError: the file is missing, damaged, or holds no model that this program knows.
    """
    from model.formats.reading import load_foreign  # which makes Weights

    path = Path(path)
    if (weights := load_foreign(path)) is not None:
        return weights
    content, sidecar = load_torch(path), path.with_suffix(".json")
    if "progress" in content:
        if (problem := state_problem(path, content)) is not None:
            raise InputError(f"{path}: not a whole checkpoint ({problem}); use an older file")
        config, tokenizer = (
            read_shape(content["config"], path),
            (content["tokenizer_path"], content["tokenizer_sha256"]),
        )
        weights = Weights(content["ema"] or content["model"], config, *tokenizer)
    elif sidecar.is_file():
        weights = Weights(_clean_keys(content, path), *read_sidecar(sidecar))
    else:
        state_dict = _clean_keys(content, path)
        weights = Weights(state_dict, infer_config(state_dict, path), inferred=True)
    check_shapes(weights.state_dict, weights.config, path)
    return weights


def _clean_keys(content: Mapping, path: Path) -> dict[str, Tensor]:
    """Strip the prefixes that wrappers leave behind, and MiniMind's saved mask buffers."""
    if not content or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
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
    head_dim = LMConfig().head_dim
    layers = {key.split(".")[1] for key in state_dict if key.startswith("layers.")}
    matrices = [state_dict[key] for key in needed[:3]]
    if not all(matrix.dim() == 2 for matrix in matrices):
        raise InputError(f"{path}: {needed[0]} has shape {shown(tuple(matrices[0].shape))}, a matrix expected")
    vocab_size, dim = matrices[0].shape
    try:
        return LMConfig(
            dim=dim,
            n_layers=len(layers),
            n_heads=dim // head_dim,
            n_kv_heads=matrices[1].shape[0] // head_dim,
            vocab_size=vocab_size,
            hidden_dim=matrices[2].shape[0],
        )
    except InputError as error:
        raise InputError(f"{path}: its shapes are of no model ({error})") from error


def fitting_tokenizer(path: Path, weights: Weights, tokenizer_path: str | Path | None):
    """The tokenizer given, else the recorded one, else the embedded one.

    Raises:
        InputError: it is not the one that the weights were trained with, or its size is not the embedding's.
    """
    folder, recorded = tokenizer_path or weights.tokenizer_path, weights.tokenizer_sha256
    if tokenizer_path is None and folder and not Path(folder).is_dir() and recorded == tokenizer_sha256():
        folder = None  # the recorded folder is gone, and the embedded tokenizer is the same
    tokenizer = load_tokenizer(folder)
    shown = folder or EMBEDDED_TOKENIZER.name
    found = tokenizer_sha256(folder)
    if recorded is not None and found != recorded:
        raise InputError(
            f"{path} was trained with another tokenizer: sha256 {recorded[:12]}… is recorded, "
            f"{shown} has {found[:12]}…; give the right one with --tokenizer_path"
        )
    tokens, rows = vocabulary_size(tokenizer), weights.config.vocab_size
    if tokens > rows or (tokens < rows and recorded is None):  # a recorded tokenizer may leave rows unused on purpose
        found = f"the tokenizer {shown} has {tokens} tokens, the embedding in {path} has {rows} rows"
        raise InputError(f"{found}; give the right one with --tokenizer_path")
    return tokenizer
