"""A checkpoint that several processes wrote: an index, and beside it a part of each.

The index is a checkpoint like any other, but each tensor that lies in the parts is replaced by a description
(`slices.describe`), and "parts" lists, for each part, its file name, SHA-256, bytes, and slices. A part is a file of
`save_torch` with its slices' elements in the same order. The index is written last, so its rename makes the checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import InputError, shown
from model.storage.archive import DAMAGE, digest_is_right, load_torch, recorded_digest
from model.storage.part_names import PART, index_name, is_part
from model.storage.slices import Slice, SlicedTensors, dtype_of, is_description

CONTENT, LIST = "tensors", "parts"  # the one key of a part; the index's key of the list of them


class Part(NamedTuple):
    """What an index says of a part."""

    name: str  # of the file, beside the index
    sha256: str  # hex, as at its end
    bytes: int  # of the file
    slices: list[Slice]  # in the order of the tensors in the file


def load_parted(path: str | Path, own: bool = False) -> dict:
    """`load_torch`, also of a checkpoint in several parts, of which every byte is checked too.

    The parts are mapped into memory and not read into it: what is in them comes as `SlicedTensors`.

    Args:
        own: as for `load_torch`.

    Raises:
        InputError: as `load_torch`; or a part is missing, damaged, or another than the index was written with.
    """
    path = Path(path)
    if is_part(path):
        raise InputError(f"{path}: one part of a checkpoint; give {path.with_name(index_name(path))}")
    content = load_torch(path, own)
    if not isinstance(content.get(LIST), list) or "progress" not in content:
        return content
    try:
        parts = [_listed(entry) for entry in content.pop(LIST)]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its list of parts cannot be understood ({error!r}); use an older file") from error
    slices: dict[str, list[tuple[int, Tensor]]] = {}
    for part in parts:
        for (key, start, _), elements in zip(part.slices, _open(path, part), strict=True):
            slices.setdefault(key, []).append((start, elements))
    for found in slices.values():
        found.sort(key=lambda item: item[0])
    return {key: _sliced(path, value, slices) for key, value in content.items()}


def _listed(entry: Mapping) -> Part:
    part = Part(**entry)
    if not PART.fullmatch(part.name) or type(part.sha256) is not str or type(part.bytes) is not int:
        raise ValueError(shown(part.name))
    slices = [Slice(*found) for found in part.slices]
    if not all(type(s.key) is str and type(s.start) is type(s.end) is int and 0 <= s.start <= s.end for s in slices):
        raise ValueError(f"slices of {part.name}")
    return part._replace(slices=slices)


def _open(index: Path, part: Part) -> list[Tensor]:
    """A part's tensors, each [elements], mapped into memory."""
    path = index.with_name(part.name)
    if not path.is_file():
        raise InputError(f"{path}: missing, but {index.name} needs it beside it; put it there, or use an older file")
    if (size := path.stat().st_size) != part.bytes:
        raise InputError(f"{path}: {size:,} bytes found, {part.bytes:,} expected by {index.name}; use an older file")
    if recorded_digest(path) != part.sha256:
        raise InputError(f"{path}: damaged, or not the part that {index.name} was written with; use an older file")
    tensors = load_torch(path, own=True, mmap=True).get(CONTENT)
    if not isinstance(tensors, list) or [_length(t) for t in tensors] != [s.end - s.start for s in part.slices]:
        raise InputError(f"{path}: its tensors are not those that {index.name} lists; use an older file")
    return tensors


def _length(tensor) -> int | None:
    return len(tensor) if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.is_contiguous() else None


def _sliced(path: Path, value, slices: Mapping[str, list[tuple[int, Tensor]]], levels: int = 1):
    """A dict that holds descriptions, or whose dicts do, as `SlicedTensors`; other values as they are.

    Args:
        levels: of dicts in which to look for such a dict.
    """
    if not _is_dict(value):
        return value
    inner = [leaf for held in value.values() if _is_dict(held) for leaf in held.values()]
    descriptions = [leaf for leaf in (*value.values(), *inner) if is_description(leaf)]
    if not descriptions:
        return {key: _sliced(path, held, slices, levels - 1) for key, held in value.items()} if levels else value
    if any(map(_is_dict, inner)):
        raise InputError(f"{path}: its tensors cannot be understood; use an older file")
    for description in descriptions:
        _check(path, description, slices)
    return SlicedTensors(value, slices)


def _is_dict(value) -> bool:
    return isinstance(value, dict) and not is_description(value)


def _check(path: Path, description: Mapping, slices: Mapping[str, list[tuple[int, Tensor]]]) -> None:
    """Check that slices make up a tensor, each element once.

    Raises:
        InputError: naming the tensor.
    """
    key = description["in_parts"]
    try:
        dtype, shape, found = dtype_of(description), description["shape"], slices.get(key, [])
        ends = [0, *(start + len(elements) for start, elements in found)]
        starts = [*(start for start, _ in found), torch.Size(shape).numel()]
        fits = starts == ends and min(shape, default=0) >= 0 and {elements.dtype for _, elements in found} <= {dtype}
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        raise InputError(f"{path}: its parts do not make up {shown(key)}; use an older file")


def part_names(index: Path) -> list[str] | None:
    """The parts that a checkpoint consists of beside its own file; none of one in a single file, or of a damaged one.

    Nothing is checked: for what copies or removes files.

    Returns:
        None where the file could not be read, which says nothing about its parts.
    """
    try:
        try:
            content = torch.load(index, weights_only=True, mmap=True, map_location="cpu")
            return [entry["name"] for entry in content.get(LIST, []) if PART.fullmatch(entry["name"])]
        except (OSError, MemoryError):
            return None
        except DAMAGE:  # or the system's answer, which torch hides in a RuntimeError: then the bytes are right
            return None if digest_is_right(index) else []
    except OSError:
        return None
