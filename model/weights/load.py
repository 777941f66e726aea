"""Weights on disk: `pretrain_512.pth`, `best_model.pth`, MiniMind v1's, and those inside checkpoints.

A file of weights is a plain state dict. Beside each of ours lies `{stem}.json` with the LMConfig and the tokenizer, so
that inference needs no flags. Checkpoints, which hold what training needs to go on, are in `model/runs/resume.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from model.errors import InputError
from model.LMConfig import LMConfig
from model.runs.state import state_problem
from model.storage.archive import load_torch, save_torch
from model.storage.archive_checks import check_shapes, read_shape, read_sidecar
from model.storage.files import write_json
from model.text.tokenization import (
    EMBEDDED_TOKENIZER,
    load_tokenizer,
    tokenizer_folder,
    tokenizer_sha256,
    vocabulary_size,
)
from model.weights.meta_names import on_cpu, plain_state_dict

FORMAT_VERSION = 1  # of the JSON beside weights


@dataclass
class Weights:
    """A model's weights with what is needed to use them."""

    state_dict: dict[str, Tensor]
    config: LMConfig
    tokenizer_path: str | None = None  # None: the embedded tokenizer
    tokenizer_sha256: str | None = None  # None: not known
    begins_with_bos: bool = True  # a text is read behind the tokenizer's bos, as in the documents of our token files
    inferred: str | None = None  # what no file says and was read off or assumed, on one line; None: nothing

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
    save_torch(path, on_cpu(weights.state_dict))


def load_weights(path: str | Path, given: Mapping[str, float] | None = None) -> Weights:
    """Read weights: ours, MiniMind's, those inside one of our checkpoints (the EMA's where it has them), or another
    program's (this folder).

    Args:
        given: what is known of a model that no description lies beside (`minimind.GIVABLE`), as {"n_heads": 8}.

    Raises:
        InputError: the file is missing, damaged, or holds no model that this program knows.
    """
    from model.weights.minimind import recognise  # both make Weights
    from model.weights.reading import load_foreign

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
        weights = Weights(plain_state_dict(content, path), *read_sidecar(sidecar))
    else:
        weights = recognise(plain_state_dict(content, path), path, given or {})
    if given and weights.inferred is None:
        raise InputError(f"{path}: its shape is described with it, {', '.join(given)} cannot be given")
    check_shapes(weights.state_dict, weights.config, path)
    return weights


def fitting_tokenizer(path: Path, weights: Weights, tokenizer_path: str | Path | None):
    """The tokenizer given, else the recorded one, else the embedded one.

    Raises:
        InputError: it is not the one that the weights were trained with, or its size is not the embedding's.
    """
    folder, recorded = tokenizer_path or recorded_tokenizer(weights), weights.tokenizer_sha256
    tokenizer = load_tokenizer(folder)
    shown = folder or EMBEDDED_TOKENIZER.name
    found = tokenizer_sha256(folder)
    if recorded is not None and found != recorded and not _holds_its_tokenizer(weights, folder):
        raise InputError(
            f"{path} was trained with another tokenizer: sha256 {recorded[:12]}… is recorded, "
            f"{shown} has {found[:12]}…; give the right one with --tokenizer_path"
        )
    tokens, rows = vocabulary_size(tokenizer), weights.config.vocab_size
    if tokens > rows or (tokens < rows and recorded is None):  # a recorded tokenizer may leave rows unused on purpose
        found = f"the tokenizer {shown} has {tokens} tokens, the embedding in {path} has {rows} rows"
        raise InputError(f"{found}; give the right one with --tokenizer_path")
    return tokenizer


def recorded_tokenizer(weights: Weights) -> str | None:
    """Where the weights' tokenizer lies; None is the embedded one, also where a folder is gone that held the same."""
    path = weights.tokenizer_path
    if path and not Path(path).exists() and weights.tokenizer_sha256 == tokenizer_sha256():
        return None
    return path


def _holds_its_tokenizer(weights: Weights, folder: str | Path) -> bool:
    """Whether a folder holds the recorded tokenizer in other bytes, as an export that adds the bos by itself does."""
    from model.text.tokenizer_folder import same_tokenizer

    own = recorded_tokenizer(weights)
    if own == str(folder) or (own is not None and not Path(own).exists()):
        return False
    unchanged = tokenizer_sha256(own) == weights.tokenizer_sha256
    return unchanged and same_tokenizer(tokenizer_folder(own), tokenizer_folder(folder))
