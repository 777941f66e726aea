"""What the formats with Meta's names share, which are ours too: state dicts as programs save them, and as we do."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import LMConfig

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's
# Tables that some versions saved; all of them follow from the shape.
TABLES = re.compile(r"(?:^|\.)(?:mask|inv_freq|rope\.freqs|freqs_cis|freqs_cos|freqs_sin|pos_cis)$")
TIED_PAIR = ("tok_embeddings.weight", "output.weight")


def plain_state_dict(content: Mapping, path: str | Path) -> dict[str, Tensor]:
    """The weights alone, by their plain names.

    Raises:
        InputError: there is something else than tensors by name.
    """
    if not content or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise InputError(f"{path}: expected a state dict of tensors or a MateConv checkpoint, found neither")
    plain = {WRAPPERS.sub("", key): value for key, value in content.items()}
    return {key: value for key, value in plain.items() if not TABLES.search(key)}


def whole_pair(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Our state dict with both of embedding and output, and whether they are one matrix.

    Programs that tie them save both or one of them.
    """
    pair = [state_dict[name] for name in TIED_PAIR if name in state_dict]
    tied = len(pair) < 2 or (pair[0].dtype == pair[1].dtype and torch.equal(*pair))
    return {**state_dict, **(dict.fromkeys(TIED_PAIR, pair[0]) if pair and tied else {})}, tied


def on_cpu(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached float32 tensors on the CPU; keys that share one matrix still share it, so it is stored once."""
    moved: dict[int, Tensor] = {}
    result = {}
    for key, tensor in state_dict.items():
        if tensor.data_ptr() not in moved:
            moved[tensor.data_ptr()] = tensor.detach().to("cpu", torch.float32)
        result[key] = moved[tensor.data_ptr()]
    return result


def check_expressible(config: LMConfig, path: str | Path, fixed: Mapping, place: str) -> None:
    """See that a format which cannot say everything can say this.

    Args:
        fixed: what a config's fields must be.
        place: where the others would have to stand, for the message.

    Raises:
        InputError: with every field that is something else.
    """
    others = [name for name, value in fixed.items() if getattr(config, name) != value]
    if others:
        told = ", ".join(f"{name} {shown(getattr(config, name))} (only {fixed[name]})" for name in others)
        raise InputError(f"{path}: {place} cannot say {told}; a folder of transformers can")
