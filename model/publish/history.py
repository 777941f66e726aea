"""What a run's folder says of how its weights came about: data, tokens, hardware, held-out loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from model.errors import InputError
from model.runs.metrics_file import read_metrics
from model.runs.status import read_status
from model.token_file.manifest import Manifest, read_manifest
from model.training.token_files import find_token_files
from model.weights.weights import saved_step


@dataclass(frozen=True)
class Source:
    """One input of the training data."""

    name: str
    documents: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class History:
    """How weights came about; None, and empty: not recorded."""

    sources: list[Source] = field(default_factory=list)
    data_tokens: int | None = None  # in the training data, each counted once
    han_share: float | None = None  # of the characters of the texts
    tokens: int | None = None  # that the weights were trained on
    step: int | None = None
    bits_per_byte: float | None = None  # on texts that were held out
    val_loss: float | None = None
    seconds: float | None = None  # of training
    hardware: str | None = None
    base: str | None = None  # name of the weights that training began with


def read_history(weights: Path) -> History:
    """The history of a file of weights in a run's folder; what is missing or damaged is None.

    Args:
        weights: `best_model.pth` was saved where the loss was lowest, any other file at the end.
    """
    folder, path = weights.parent, weights.parent / "metrics.jsonl"
    events = read_metrics(path) if path.is_file() else []
    config = _config(folder / "config.yaml")
    evaluated = [event for event in events if event.get("val_loss") is not None]
    step = saved_step(weights)  # earlier versions recorded none
    of_weights = [event for event in evaluated if step in (None, event["step"])]
    lowest = min(of_weights, key=lambda event: event["val_loss"], default={})
    is_best = weights.name == "best_model.pth"
    held_out = lowest if is_best else (evaluated or [{}])[-1]
    saved = held_out if is_best and held_out else (events or [{}])[-1]
    status = read_status(folder) or {}
    base = (config.get("training") or {}).get("init_from")
    return History(
        **_data((config.get("data") or {}).get("train_data_path")),
        tokens=saved.get("tokens"),
        step=saved.get("step"),
        bits_per_byte=held_out.get("bits_per_byte"),
        val_loss=held_out.get("val_loss"),
        seconds=saved.get("elapsed"),
        hardware=_hardware(status),
        base=Path(base).name if isinstance(base, str) else None,
    )


def public_name(source: str) -> str:
    """The name of an input as strangers may read it: without the folders of this machine, and without options."""
    for hub in ("datasets:", "ms:"):
        if source.startswith(hub):
            name = source.removeprefix(hub).partition("?")[0]
            is_of_hub = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
            return hub + (name if is_of_hub else Path(name).name)
    path = Path(source)
    return f"{path.parent.name}/{path.name}" if path.name.startswith("*.txt") else path.name  # of many, their folder


def _config(path: Path) -> Mapping:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    sections = found if isinstance(found, dict) else {}
    return {name: section for name, section in sections.items() if isinstance(section, dict)}


def _data(train_data_path) -> dict:
    """What the manifests of the token files say, as far as they are still there."""
    manifests = [manifest for path in _token_files(train_data_path) if (manifest := _manifest(path)) is not None]
    sources, han_shares = [], []
    for manifest in manifests:
        statistics = manifest.processing.get("statistics")
        statistics = statistics if isinstance(statistics, dict) else {}
        counted = {about.get("name"): about for about in statistics.get("sources") or () if isinstance(about, dict)}
        for source in manifest.sources:
            name = str(source.get("name"))
            about = counted.get(name, {})
            sources.append(Source(public_name(name), about.get("documents"), about.get("tokens")))
        if isinstance(statistics.get("han_share"), int | float):
            han_shares.append(statistics["han_share"])
    return {
        "sources": sources,
        "data_tokens": sum(manifest.tokens for manifest in manifests) or None,
        "han_share": max(han_shares, default=None),
    }


def _token_files(train_data_path) -> list[str]:
    try:
        return sum(find_token_files(train_data_path), []) if train_data_path else []
    except (InputError, TypeError):
        return []


def _manifest(path: str) -> Manifest | None:
    try:
        return read_manifest(path)
    except InputError:
        return None


def _hardware(status: Mapping) -> str | None:
    device, processes = status.get("device"), status.get("world_size")
    if not isinstance(device, str):
        return None
    return f"{device}; {processes} processes" if isinstance(processes, int) and processes > 1 else device
