"""Weights that a training begins with instead of drawn ones: their shape and their tokenizer become the run's."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from model.errors import InputError
from model.LMConfig import LMConfig
from model.runs.resume import find_checkpoint
from model.text.tokenization import EMBEDDED_TOKENIZER, tokenizer_folder
from model.text.tokenizer_folder import same_tokenizer
from model.training.settings import ModelSettings, Settings
from model.weights import Weights, load_weights
from model.weights.load import fitting_tokenizer, recorded_tokenizer
from model.weights.shapes import read_shape

# What of a model's settings is not in its weights, and may be chosen anew.
FREE = ("max_seq_len", "dropout", "flash_attn")
GIVEN_BY_WEIGHTS = tuple(f.name for f in dataclasses.fields(ModelSettings) if f.name not in FREE)


def load_initial(settings: Settings, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """Read the weights of `init_from`, and give the settings their shape and, where none is named, their tokenizer.

    Returns:
        the state dict; None where there is nothing to begin with, or the run goes on and the file is gone: shape and
        tokenizer are the checkpoint's then, which has all else too.

    Raises:
        InputError: the weights cannot be read, or the tokenizer is not theirs.
    """
    training, data, model = settings.training, settings.data, settings.model
    if training.init_from is None:
        return None
    path = Path(training.init_from)
    if not path.exists() and (found := find_checkpoint(training, lambda line: None)) is not None:
        _, checkpoint = found
        _take_shape(model, read_shape(checkpoint["config"], path))
        data.tokenizer_path = data.tokenizer_path or checkpoint["tokenizer_path"]
        return None
    weights = load_weights(path)
    if weights.inferred:
        say(weights.inferred)
    fitting_tokenizer(path, weights, data.tokenizer_path)
    data.tokenizer_path = data.tokenizer_path or _folder_of(weights)
    told = "training begins with these weights"
    if _take_shape(model, weights.config):
        told = "the model's shape is that of these weights, whatever the settings' section model says"
    say(f"init_from {path}: {told}")
    if model.max_seq_len > weights.config.max_seq_len:
        known = f"these weights know positions up to {weights.config.max_seq_len:,}"
        say(f"init_from {path}: {known}, max_seq_len is {model.max_seq_len:,}: the others have to be learned")
    return weights.state_dict


def initial_tokenizer(settings: Settings) -> str | None:
    """The tokenizer_path that `load_initial` will come to; data that are not there yet are made with it.

    Raises:
        InputError: as `load_initial`.
    """
    settings = copy.deepcopy(settings)
    load_initial(settings, lambda line: None)
    return settings.data.tokenizer_path


def _folder_of(weights: Weights) -> str | None:
    """The weights' tokenizer; None if that is the embedded one, with which data were made before, and which stays."""
    path = recorded_tokenizer(weights)
    return None if path is None or same_tokenizer(tokenizer_folder(path), EMBEDDED_TOKENIZER) else path


def _take_shape(model: ModelSettings, shape: LMConfig) -> bool:
    """Set what weights settle; whether any of it was something else."""
    theirs = {name: getattr(shape, name) for name in GIVEN_BY_WEIGHTS}
    changed = theirs != {name: getattr(model, name) for name in GIVEN_BY_WEIGHTS}
    for name, value in theirs.items():
        setattr(model, name, value)
    return changed


def refuse_shape(names: list[str]) -> None:
    """See that no flag asks for what the weights of `init_from` settle.

    Args:
        names: of the flags given.

    Raises:
        InputError: naming those.
    """
    if refused := [f"--{name}" for name in names if name in GIVEN_BY_WEIGHTS]:
        raise InputError(f"{', '.join(refused)}: the shape is that of the weights of init_from; leave it away")
