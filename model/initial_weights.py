"""Weights that a training begins with instead of drawn ones: their shape and their tokenizer become the run's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from model.checkpoint import fitting_tokenizer, load_weights
from model.errors import InputError
from model.settings import ModelSettings, Settings

# What of a model's settings is not in its weights, and may be chosen anew.
FREE = ("max_seq_len", "dropout", "flash_attn")
GIVEN_BY_WEIGHTS = tuple(f.name for f in dataclasses.fields(ModelSettings) if f.name not in FREE)


def load_initial(settings: Settings, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """Read the weights of `init_from`, and give the settings their shape and, where none is named, their tokenizer.

    Returns:
        the state dict; None where there is nothing to begin with, or the run goes on and its file is gone: the
        checkpoint has all of it.

    Raises:
        InputError: the weights cannot be read, or the tokenizer is not theirs.
    """
    training, data, model = settings.training, settings.data, settings.model
    if training.init_from is None:
        return None
    path = Path(training.init_from)
    if (training.resume or training.resume_from) and not path.exists():
        return None
    weights = load_weights(path)
    if weights.inferred:
        say(weights.inferred)
    fitting_tokenizer(path, weights, data.tokenizer_path)
    data.tokenizer_path = data.tokenizer_path or weights.tokenizer_path
    theirs = {name: getattr(weights.config, name) for name in GIVEN_BY_WEIGHTS}
    if theirs != {name: getattr(model, name) for name in GIVEN_BY_WEIGHTS}:
        say(f"init_from {path}: the model's shape is that of these weights, whatever the settings' section model says")
    for name, value in theirs.items():
        setattr(model, name, value)
    if model.max_seq_len > weights.config.max_seq_len:
        known = f"these weights know positions up to {weights.config.max_seq_len:,}"
        say(f"init_from {path}: {known}, max_seq_len is {model.max_seq_len:,}: the others have to be learned")
    return weights.state_dict


def refuse_shape(names: list[str]) -> None:
    """See that no flag asks for what the weights of `init_from` settle.

    Args:
        names: of the flags given.

    Raises:
        InputError: naming those.
    """
    if refused := [f"--{name}" for name in names if name in GIVEN_BY_WEIGHTS]:
        raise InputError(f"{', '.join(refused)}: the shape is that of the weights of init_from; leave it away")
