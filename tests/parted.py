"""Checkpoints in parts, made here as the ranks of a run write them together."""

from pathlib import Path

from model.runs.checkpoint import INDEX_VERSION
from model.runs.part_saving import split
from model.runs.saving import copy_to_cpu
from model.storage.archive import save_torch
from model.storage.part_names import part_name

SECTIONS = ("model", "ema", "optimizer")


def save_in_parts(path: Path, content: dict, ranks: int) -> list[Path]:
    """Write a checkpoint as so many ranks do that have all of it; returns the parts."""
    parts = []
    for rank in range(ranks):
        described, slices = split({section: content[section] for section in SECTIONS}, rank, ranks)
        part = path.with_name(part_name(path.stem, rank, ranks))
        sha256 = save_torch(part, copy_to_cpu({"tensors": [*slices.values()]}))
        parts.append(
            {"name": part.name, "sha256": sha256, "bytes": part.stat().st_size, "slices": [*map(list, slices)]}
        )
    save_torch(path, content | described | {"format_version": INDEX_VERSION, "parts": parts})
    return [path.with_name(part["name"]) for part in parts]


def in_dicts(content) -> object:
    """A checkpoint's content with plain dicts of tensors, to compare it."""
    if hasattr(content, "items"):
        return {key: in_dicts(value) for key, value in content.items()}
    return content
