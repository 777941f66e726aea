"""Reading weights in any format; the content of a file or folder shows whose it is."""

from collections.abc import Mapping
from pathlib import Path

from model.errors import InputError
from model.storage.archive import is_finite, load_torch
from model.storage.gguf_header import is_gguf
from model.text.tokenization import (
    EMBEDDED_TOKENIZER,
    load_tokenizer,
    tokenizer_folder,
    tokenizer_sha256,
    vocabulary_size,
)
from model.text.tokenizer_folder import same_tokenizer
from model.weights.gguf import load_gguf
from model.weights.llama2c import is_llama2c_bin, load_llama2c, read_llama2c_checkpoint
from model.weights.meta_folder import is_meta_folder, load_meta_folder
from model.weights.minimind import recognise
from model.weights.names import plain_state_dict
from model.weights.shapes import check_shapes, read_shape
from model.weights.transformers_folder import load_transformers
from model.weights.weights import Weights, read_sidecar


def load_weights(path: str | Path, given: Mapping[str, float] | None = None) -> Weights:
    """Read weights in any format: ours, another program's, or those in a training checkpoint (the EMA's if it has any).

    Args:
        path: a file or a folder.
        given: values that a file without a description leaves open (`minimind.GIVABLE`), such as {"n_heads": 8}.

    Raises:
        InputError: the file is missing or damaged, or holds no model that is supported.
    """
    path = Path(path)
    if (weights := load_foreign(path)) is None:
        content, sidecar = load_torch(path), path.with_suffix(".json")
        if "progress" in content:
            weights = _of_checkpoint(content, path)
        elif "model_args" in content:
            weights = read_llama2c_checkpoint(content, path)
        elif sidecar.is_file():
            weights = Weights(plain_state_dict(content, path), *read_sidecar(sidecar))
            check_shapes(weights.state_dict, weights.config, path)
        else:
            return recognise(plain_state_dict(content, path), path, given or {})
    if given:
        raise InputError(f"{path}: its shape is described with it, {', '.join(given)} cannot be given")
    return weights


def _of_checkpoint(content: Mapping, path: Path) -> Weights:
    """The weights in one of our checkpoints, even if the rest of it is damaged."""
    tokenizer = [content.get(name) for name in ("tokenizer_path", "tokenizer_sha256")]
    state_dict, config = content.get("ema") or content.get("model"), read_shape(content.get("config"), path)
    if not isinstance(state_dict, Mapping) or any(not isinstance(value, str | None) for value in tokenizer):
        raise InputError(f"{path}: not a whole checkpoint (its weights or tokenizer are missing); use an older file")
    check_shapes(state_dict, config, path)
    if not is_finite(state_dict):
        raise InputError(f"{path}: it holds weights that are not finite; use an older file")
    return Weights(dict(state_dict), config, *tokenizer)


def load_foreign(path: Path) -> Weights | None:
    """Weights in another program's format; None if the file is a `.pth`, which torch reads.

    Raises:
        InputError: they cannot be read.
    """
    if path.is_dir():
        if is_meta_folder(path):
            return load_meta_folder(path)
        if (path / "adapter_config.json").is_file():
            raise InputError(
                f"{path}: a LoRA adapter; merge it into its base model first, with peft's merge_and_unload"
            )
        if not _has_config(path):
            raise InputError(f"{path}: neither config.json (transformers) nor params.json (Meta) in this folder")
        return load_transformers(path)
    if not path.is_file():
        return None
    is_index = path.name.endswith(".index.json")
    if (
        is_index
        or path.suffix == ".safetensors"
        or (path.name.startswith("pytorch_model") and _has_config(path.parent))
    ):
        if not _has_config(path.parent):
            raise InputError(f"{path}: no config.json beside it, which would describe the model")
        return load_transformers(path.parent, None if is_index else path.name)
    if path.match("consolidated.*.pth") and is_meta_folder(path.parent):
        return load_meta_folder(path.parent)
    if is_gguf(path):
        return load_gguf(path)
    return load_llama2c(path) if is_llama2c_bin(path) else None


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def fitting_tokenizer(path: Path, weights: Weights, tokenizer_path: str | Path | None):
    """Load the given tokenizer, else the recorded one, else the embedded one.

    Raises:
        InputError: the weights were trained with another one, or it has another size than the embedding.
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
    """The path of the weights' tokenizer; None for the embedded one, even if a copy of it was recorded and is gone."""
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
