"""What a checkpoint holds: all that training needs to resume exactly. Built, checked and restored here."""

import dataclasses
import math
import random
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import accelerator
from model.errors import InputError, first_line, shown
from model.experts import BIAS
from model.lora import adapters_of, checked_adapters, is_adapter
from model.storage.archive import is_finite
from model.training.data import ORDERS, TrainingData
from model.training.moving_average import MovingAverage
from model.training.optimizer import load_optimizer_state
from model.training.optimizer import state_problem as optimizer_problem
from model.training.plan import RunPlan
from model.training.progress import Progress
from model.training.settings import SECTIONS, Settings
from model.training.sharded_optimizer import SharedAverage
from model.weights.shapes import check_shapes, read_shape

CHECKPOINT_VERSION = 6
INDEX_VERSION = 7  # the same, but for tensors that lie in parts (model/storage/parts.py)
READABLE_VERSIONS = (2, 3, 4, 5, 6, 7)
NONE = type(None)
KINDS = {  # the keys of a checkpoint and what lies under them
    "format_version": int,
    "started": str,  # when the run started
    "settings": dict,  # all of them, as the user gave them
    "config": dict,  # LMConfig
    "context": int,  # tokens: positions that the weights know, at least max_seq_len
    "tokenizer_path": (str, NONE),
    "tokenizer_sha256": str,
    "chat": dict,  # of a tuning run: see `Weights.chat`; else empty
    "adapters": dict,  # of LoRA: see `lora.adapters_of`; else empty. `model` and `ema` then hold A and B too
    "data": dict,  # the training data: tokens, dtype, sha256, seq_len, sample_start, training_samples, order
    "validation": dict,  # the same of the validation data, with validation_samples
    "pace": dict,  # what total_steps was computed from: rows_per_step, epochs, max_steps
    "total_steps": int,
    "chosen": dict,  # the values that replaced `auto`, by setting
    "progress": dict,  # Progress
    "model": Mapping,  # state dicts
    "ema": (Mapping, NONE),
    "ema_updates": int,
    "optimizer": dict,
    "scaler": dict,
    "random_states": list,  # of each rank
    "environment": dict,  # versions, threads and ranks, on which equal bits depend
}
SCALER_STATE = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def checkpoint_content(
    *,
    started: str,
    settings: Settings,
    plan: RunPlan,
    data: TrainingData,
    context: int,
    environment: Mapping,
    progress: Progress,
    model: Mapping,
    ema: Mapping | None,
    ema_updates: int,
    optimizer: Mapping,
    scaler: torch.amp.GradScaler,
    random_states: list[dict],
) -> dict:
    """Everything in a checkpoint; the tensors are those in use, not copies, or described (`part_saving.split`).

    Args:
        started: when the run started.
        settings: as the user gave them.
        context: positions that the weights know, in tokens.
        environment: what equal bits depend on, see `resume.environment`.
        model, ema: state dicts of the weights and of their average.
        optimizer: its state dict.
        random_states: `determinism.random_state()` of each rank.
    """
    return {
        "format_version": CHECKPOINT_VERSION,
        "started": started,
        "settings": settings.as_dict(),
        "config": dataclasses.asdict(plan.config),
        "context": context,
        "tokenizer_path": settings.data.tokenizer_path,
        "tokenizer_sha256": data.tokenizer_sha256,
        "chat": data.chat,
        "adapters": adapters_of(plan.training),
        "data": data.fingerprint,
        "validation": data.validation,
        "pace": plan.pace,
        "total_steps": plan.total_steps,
        "chosen": plan.chosen,
        "progress": dataclasses.asdict(progress),
        "model": model,
        "ema": ema,
        "ema_updates": ema_updates,
        "optimizer": optimizer,
        "scaler": scaler.state_dict(),
        "random_states": random_states,
        "environment": environment,
    }


def add_defaults(content: dict) -> None:
    """Give a checkpoint of an earlier version, in place, what later ones added; this version's must hold all of it."""
    if content["format_version"] >= CHECKPOINT_VERSION:
        return
    content.setdefault("chosen", {})
    content.setdefault("chat", {})
    content.setdefault("adapters", {})
    if isinstance(content.get("config"), dict):
        content.setdefault("context", content["config"].get("max_seq_len"))
    later = (
        ("progress", "overflows_in_a_row", 0),
        ("data", "sample_start", "packed"),
        ("data", "order", "philox"),
        ("validation", "sample_start", "packed"),
    )
    for key, name, value in later:
        if isinstance(content.get(key), dict):
            content[key].setdefault(name, value)


def restore_state(
    checkpoint: Mapping,
    load_weights: Callable[[Mapping[str, Tensor]], object],
    ema: MovingAverage | SharedAverage | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Put everything back to where `checkpoint_content` found it; returns the progress.

    Args:
        load_weights: takes the model's state dict.
    """
    load_weights(checkpoint["model"])
    load_optimizer_state(optimizer, checkpoint["optimizer"])
    if checkpoint["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(checkpoint["scaler"])
    if ema is not None:
        # A run without an average so far starts it from its present weights.
        ema.load_weights(checkpoint["ema"] or checkpoint["model"])
        ema.n_averaged.fill_(checkpoint["ema_updates"])
    return Progress(**checkpoint["progress"])


def state_problem(path: Path, content: Mapping) -> str | None:
    """What is wrong with a checkpoint, or None: a missing key, a wrong shape, a number that is not finite.

    Args:
        path: where it was read from; a name that gives a step must give the right one.
    """
    for key, kind in KINDS.items():
        if key not in content:
            return f"{key} is missing"
        if not isinstance(content[key], kind):
            return f"{key} is of type {type(content[key]).__name__}"
    if not all(isinstance(content["settings"].get(section), dict) for section in SECTIONS):
        return f"settings lacks a section, {', '.join(SECTIONS)} expected"
    return (
        _progress_problem(path, content["progress"])
        or _order_problem(content["data"])
        or _weights_problem(content)
        or _optimizer_problem(content)
        or _scaler_problem(content["scaler"])
        or _random_problem(content["random_states"])
        or (None if content["total_steps"] > 0 else f"total_steps is {content['total_steps']}")
        or (None if is_finite(content) else "it holds numbers that are not finite")
    )


def _progress_problem(path: Path, progress: Mapping) -> str | None:
    kinds = typing.get_type_hints(Progress)
    if progress.keys() != kinds.keys():
        return f"progress lacks or has too much of {', '.join(sorted(map(str, progress.keys() ^ kinds.keys())))}"
    for name, kind in kinds.items():
        value = progress[name]
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, list) != (name == "recent_losses") or not all(
            type(number) is int or (type(number) is float and kind is not int and not math.isnan(number))
            for number in numbers
        ):
            return f"progress.{name} is {shown(value)}"
        if kind is int and not (-1 if name == "last_evaluation" else 0) <= value < 2**63:
            return f"progress.{name} is {shown(value)}"
    named = re.fullmatch(r"checkpoint_step_(\d+)\.pth", path.name)
    if named and int(named[1]) != progress["step"]:
        return f"it is of step {progress['step']}, not of the step in its name"
    return None


def _order_problem(data: Mapping) -> str | None:
    order = data.get("order")
    return None if order in [*ORDERS] else f"data.order is {shown(order)}, one of {', '.join(ORDERS)} expected"


def _weights_problem(content: Mapping) -> str | None:
    try:
        config, (rank, _) = read_shape(content["config"], "its description"), checked_adapters(content["adapters"])
        read_shape(content["config"] | {"max_seq_len": content["context"]}, "its context")
        if content["context"] < config.max_seq_len:
            return f"context is {content['context']}, max_seq_len {config.max_seq_len}"
        for name in ("model", "ema") if content["ema"] is not None else ("model",):
            check_shapes(content[name], config, name, rank)
            if others := [key for key, weight in content[name].items() if weight.dtype != torch.float32]:
                return f"{name}: {others[0]} is {content[name][others[0]].dtype}, float32 expected"
    except (InputError, TypeError) as error:
        return shown(str(error))[1:-1] if isinstance(error, TypeError) else str(error)
    return None


def _optimizer_problem(content: Mapping) -> str | None:
    tied = {"output.weight"} if content["config"]["tie_embeddings"] else set()
    parameters = {
        name: weight for name, weight in content["model"].items() if name not in tied and not name.endswith(BIAS)
    }
    if content["adapters"]:
        parameters = {name: weight for name, weight in parameters.items() if is_adapter(name)}
    optimizer_type = content["settings"]["training"].get("optimizer_type")
    return optimizer_problem(optimizer_type, content["optimizer"], parameters, content["progress"]["step"] > 0)


def _scaler_problem(scaler: Mapping) -> str | None:
    if scaler and (scaler.keys() != SCALER_STATE or not all(type(v) in (int, float) for v in scaler.values())):
        return "scaler is not a gradient scaler's"
    return None


def _random_problem(states: list) -> str | None:
    """Whether every process's generators take the states: tried on generators that nobody uses."""
    try:
        for state in states:
            random.Random().setstate(state["python"])
            kind, keys, position, has_gauss, gauss = state["numpy"]
            np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
            torch.Generator().set_state(state["torch"])
            if not accelerator.are_random_states(state):
                return "random_states holds no states of a GPU"
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        return f"random_states cannot be used ({first_line(error)})"
    return None if states else "random_states is empty"
