"""Tensors that lie in slices, as in a checkpoint that several processes wrote, and are put together when asked for."""

import functools
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DESCRIPTION = {"in_parts", "shape", "dtype"}


class Slice(NamedTuple):
    """A range of a tensor's flattened elements."""

    key: str  # of the tensor: the keys that lead to it, "optimizer/state/3/exp_avg"
    start: int
    end: int


def describe(key: str, shape: Sequence[int], dtype: torch.dtype) -> dict:
    """What stands in the place of a tensor whose contents lie elsewhere, as plain values.

    Args:
        key: of its slices.
    """
    return {"in_parts": key, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def is_description(value: object) -> bool:
    """Whether this is what `describe` returned, as far as its keys tell."""
    return isinstance(value, dict) and value.keys() == DESCRIPTION


def dtype_of(description: Mapping) -> torch.dtype:
    """The dtype that a description names.

    Raises:
        ValueError: torch has no such dtype.
    """
    dtype = getattr(torch, str(description["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {description['dtype']!r}")
    return dtype


class SlicedTensors(Mapping):
    """A dict of tensors, or of dicts of them, each of which is put together when it is asked for, as a new tensor.

    None is kept, so no more memory is taken than by those in use; while it is in use, a tensor under two keys is one.

    Args:
        described: the dict, with a description in the place of each tensor.
        slices: by the descriptions' keys: (start, elements [end - start]), which make up each tensor in this order.
    """

    def __init__(self, described: Mapping, slices: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
        self._described, self._slices = described, slices
        self._in_use = weakref.WeakValueDictionary()  # by key

    def __getitem__(self, key):
        return self._filled(self._described[key])

    def __iter__(self) -> Iterator:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def _filled(self, value):
        if is_description(value):
            key = value["in_parts"]
            if (whole := self._in_use.get(key)) is None:
                size = torch.Size(value["shape"]).numel()
                whole = self._in_use[key] = self._range(value, 0, size).view(value["shape"])
            return whole
        return {key: self._filled(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    def _range(self, description: Mapping, start: int, end: int) -> Tensor:
        found = torch.empty(end - start, dtype=dtype_of(description))
        for at, elements in self._slices[description["in_parts"]]:
            low, high = max(start, at), min(end, at + len(elements))
            if low < high:
                found[low - start : high - start] = elements[low - at : high - at]
        return found

    def flat_range(self, keys: Sequence, start: int, end: int) -> Tensor:
        """See `flat_range` below."""
        return self._range(functools.reduce(operator.getitem, keys, self._described), start, end)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The slices as they are stored, each with its tensor's key; nothing is put together."""
        waiting = [*self._described.values()]
        while waiting:
            value = waiting.pop()
            if is_description(value):
                yield from ((value["in_parts"], elements) for _, elements in self._slices[value["in_parts"]])
            elif isinstance(value, dict):
                waiting += value.values()


def flat_range(tensors: Mapping, keys: Sequence, start: int, end: int) -> Tensor:
    """Elements [start, end) of a flattened tensor in nested dicts; of a sliced one no others are read.

    Args:
        keys: that lead to the tensor.
    """
    if isinstance(tensors, SlicedTensors):
        return tensors.flat_range(keys, start, end)
    return functools.reduce(operator.getitem, keys, tensors).reshape(-1)[start:end]


@torch.no_grad()
def copy_by_name(saved: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy each tensor into the one of its name, one at a time: torch's `load_state_dict` asks for all of them first.

    Raises:
        KeyError: a target's name is missing.
    """
    for name, target in targets.items():
        target.copy_(saved[name])
