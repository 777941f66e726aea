"""Our weights as files: `X.pth` with `X.json` and a copy of the tokenizer, or the weights in a training checkpoint."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from model.errors import InputError, shown
from model.lora import checked_adapters, merged_state
from model.text.tokenization import EMBEDDED_TOKENIZER, tokenizer_folder, tokenizer_sha256
from model.text.tokenizer_folder import same_tokenizer
from model.weights.names import plain_state_dict
from model.weights.shapes import check_shapes, read_shape
from model.weights.tokenizer_copy import copy_tokenizer
from model.weights.weights import Weights, checked_chat, read_sidecar, save_weights


def load_own(content: Mapping, path: Path) -> Weights:
    """The weights in a `.pth` with its description, or in a checkpoint (the EMA's if it has any).

    Args:
        content: of the file, as `load_parted` returns it.

    Raises:
        InputError: the file or its description is damaged.
    """
    if "progress" in content:
        return _of_checkpoint(content, path)
    weights = Weights(plain_state_dict(content, path), *read_sidecar(path.with_suffix(".json")))
    check_shapes(weights.state_dict, weights.config, path)
    return weights


def _of_checkpoint(content: Mapping, path: Path) -> Weights:
    """The weights in one of our checkpoints, even if the rest of it is damaged."""
    tokenizer = [content.get(name) for name in ("tokenizer_path", "tokenizer_sha256")]
    state_dict, config = content.get("ema"), read_shape(content.get("config"), path)
    if state_dict is None:
        state_dict = content.get("model")
    if "context" in content:  # since version 5: samples may be shorter than what the weights know
        config = read_shape(content["config"] | {"max_seq_len": content["context"]}, path)
    if not isinstance(state_dict, Mapping) or any(not isinstance(value, str | None) for value in tokenizer):
        raise InputError(f"{path}: not a whole checkpoint (its weights or tokenizer are missing); use an older file")
    try:
        chat, (rank, alpha) = checked_chat(content.get("chat")), checked_adapters(content.get("adapters"))
    except TypeError as error:
        raise InputError(f"{path}: not a whole checkpoint ({shown(str(error))}); use an older file") from error
    state_dict = dict(state_dict)  # what lies in parts is put together here
    check_shapes(state_dict, config, path, rank)
    return Weights(merged_state(state_dict, alpha) if rank else state_dict, config, *tokenizer, chat=chat)


def companions(target: Path) -> tuple[Path, Path]:
    """What `save_own` writes beside `target`: its description, and its tokenizer unless that is the embedded one."""
    return target.with_suffix(".json"), target.with_name(f"{target.stem}_tokenizer")


def save_own(target: Path, weights: Weights) -> None:
    """Write X.pth with X.json, and the tokenizer as X_tokenizer unless it is the embedded one; all of them or none.

    Raises:
        InputError: a file cannot be written, or as `check_links`.
    """
    new = [path for path in companions(target) if not path.exists()]
    try:
        if weights.tokenizer_path is not None:
            folder, path = tokenizer_folder(weights.tokenizer_path), None
            if not same_tokenizer(folder, EMBEDDED_TOKENIZER):
                _, path = companions(target)
                copy_tokenizer(folder, path)
            sha256 = tokenizer_sha256(path)
            weights = dataclasses.replace(weights, tokenizer_path=path and str(path), tokenizer_sha256=sha256)
        save_weights(target, weights)
    except BaseException as error:
        for path in new:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
        raise
