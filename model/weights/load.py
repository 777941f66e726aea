"""Reads weights in any format, and finds the tokenizer that fits them."""

from collections.abc import Mapping
from pathlib import Path

from model.errors import InputError
from model.storage.archive import is_finite
from model.text.tokenization import (
    EMBEDDED_TOKENIZER,
    open_tokenizer,
    tokenizer_folder,
    tokenizer_sha256,
    vocabulary_size,
)
from model.text.tokenizer_folder import same_tokenizer
from model.weights.formats import FORMATS, Source
from model.weights.minimind import recognise
from model.weights.names import plain_state_dict
from model.weights.weights import Weights


def load_weights(path: str | Path, overrides: Mapping[str, float] | None = None) -> Weights:
    """Read weights in any format: ours, another program's, or those in a training checkpoint (the EMA's if it has any).

    Args:
        path: a file or a folder.
        overrides: values that a file without a description leaves open (`minimind.OVERRIDABLE`), such as
            {"n_heads": 8}.

    Raises:
        InputError: the file is missing or damaged, holds no model that is supported, or weights that are not finite.
    """
    weights = _load(Source(path), overrides or {})
    if not is_finite(weights.state_dict):
        raise InputError(f"{path}: it holds weights that are not finite; use an older file")
    return weights


def _load(source: Source, overrides: Mapping[str, float]) -> Weights:
    path = source.path
    for known in FORMATS.values():
        if known.recognise(source):
            weights = known.load(source)
            if overrides:
                names = ", ".join(overrides)
                raise InputError(f"{path}: the model's shape comes with the file; {names} cannot be given")
            return weights
    return recognise(plain_state_dict(source.content, path), path, overrides)


def fitting_tokenizer(path: Path, weights: Weights, tokenizer_path: str | Path | None):
    """Open the given tokenizer, else the recorded one, else the embedded one.

    Raises:
        InputError: the weights were trained with another tokenizer, or its size differs from the embedding's.
    """
    folder, recorded = tokenizer_path or recorded_tokenizer(weights), weights.tokenizer_sha256
    tokenizer = open_tokenizer(folder)
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
    """The path of the weights' tokenizer; None for the embedded one, also where its recorded copy no longer exists."""
    path = weights.tokenizer_path
    if path and not Path(path).exists() and weights.tokenizer_sha256 == tokenizer_sha256():
        return None
    return path


def _holds_its_tokenizer(weights: Weights, folder: str | Path) -> bool:
    """Whether a folder holds the recorded tokenizer in other bytes, as an export that adds the bos does."""
    own = recorded_tokenizer(weights)
    if own == str(folder) or (own is not None and not Path(own).exists()):
        return False
    unchanged = tokenizer_sha256(own) == weights.tokenizer_sha256
    return unchanged and same_tokenizer(tokenizer_folder(own), tokenizer_folder(folder))
