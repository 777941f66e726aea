"""Which checkpoint a run resumes from, and whether it belongs to this model, tokenizer and data."""

import dataclasses
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from model.errors import InputError, command_line, shown
from model.lora import adapters_of
from model.runs.checkpoint import READABLE_VERSIONS, add_defaults, state_problem
from model.runs.folder import INTERRUPTED, all_checkpoints, started_at
from model.storage.parts import load_parted
from model.training.choices import FoundCheckpoint
from model.training.data import TrainingData, fingerprint_text
from model.training.settings import TrainingSettings
from model.weights.shapes import read_shape

MOST_DIFFERENCES = 4  # shown; the rest is counted
NO_ADAPTERS = {"lora_rank": 0, "lora_alpha": None}
# Settings that may change on resuming without being reported: those of the place, and what was read at the beginning.
MAY_CHANGE = {
    "resume", "resume_from", "out_dir", "copy_to", "max_hours", "device", "ddp", "shard", "checkpoint_writers",
    "init_from",
}  # fmt: skip


def load_checkpoint(path: Path) -> dict:
    """Read a training checkpoint.

    Raises:
        InputError: the file is missing, damaged, of another version, incomplete, or no training checkpoint.
    """
    content = load_parted(path, own=path.name.startswith("checkpoint_"))
    if "progress" not in content:
        raise InputError(f"{path}: holds weights only; --resume needs a checkpoint_step_*.pth or {INTERRUPTED}")
    version = content.get("format_version")
    if not isinstance(version, int) or version not in READABLE_VERSIONS:
        readable = f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}"
        raise InputError(f"{path}: a checkpoint of version {shown(version)}; this program reads {readable}")
    add_defaults(content)
    if (problem := state_problem(path, content)) is not None:
        raise InputError(f"{path}: not a whole checkpoint ({problem}); use an older file")
    content["config"] = dataclasses.asdict(read_shape(content["config"], path))  # earlier versions knew fewer fields
    return content


def _newest_whole(folder: Path, run: str | None) -> tuple[FoundCheckpoint | None, list[str]]:
    """The whole checkpoint with the most steps, and what was wrong with those passed over.

    Args:
        run: when the run started whose checkpoints count; None: any run's.
    """
    passed_over = []
    for _, path in sorted(all_checkpoints(folder), reverse=True):
        try:
            content = load_checkpoint(path)
            if run is not None and content["started"] != run:
                raise InputError(f"{path}: of the run that started {content['started']}, not of this one, {run}")
            return FoundCheckpoint(path, content), passed_over
        except (InputError, OSError) as error:
            passed_over.append(str(error))
    return None, passed_over


def _none_whole(place: str | Path, passed_over: list[str]) -> InputError:
    found = "; ".join(problem.removesuffix("; use an older file") for problem in passed_over)  # there is none
    return InputError(f"no whole checkpoint in {place}: {found}; begin again without --resume")


def find_checkpoint(training: TrainingSettings, say: Callable[[str], None]) -> FoundCheckpoint | None:
    """The checkpoint that the settings ask to resume from; None: start from the beginning.

    Without a whole one in `out_dir`, its copies in `copy_to` count.
    """
    if training.resume_from is not None:
        path = Path(training.resume_from)
        return FoundCheckpoint(path, load_checkpoint(path))
    if not training.resume:
        return None
    out_dir, where = Path(training.out_dir), training.out_dir
    found, passed_over = _newest_whole(out_dir, started_at(out_dir))
    if found is None and training.copy_to is not None:
        run = started_at(out_dir) if passed_over else None  # copies of another run do not continue this one
        found, more = _newest_copy(Path(training.copy_to), run)
        passed_over, where = passed_over + more, f"{where} or {training.copy_to}"
    if found is None and passed_over:
        raise _none_whole(where, passed_over)
    for problem in passed_over:
        say(f"resume: passed over {problem}")
    return found


def _newest_copy(folder: Path, run: str | None) -> tuple[FoundCheckpoint | None, list[str]]:
    """As `_newest_whole`, for a folder that may not be readable: to begin anew would then lose the run.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        if folder.name in os.listdir(folder.parent):
            os.listdir(folder)  # `glob` may find nothing where nothing can be read
        return _newest_whole(folder, run or started_at(folder))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"copy_to: {folder} cannot be read ({reason}); mount it, or omit --resume to begin a new run"
        ) from error


def check_checkpoint(
    found: FoundCheckpoint,
    training: TrainingSettings,
    data: TrainingData,
    environment: Mapping,
    say: Callable[[str], None],
) -> None:
    """Check that a checkpoint belongs to this model, tokenizer and data; report what has changed otherwise.

    Raises:
        InputError: it belongs to others.
    """
    path, checkpoint = found
    mine = {
        "config": dataclasses.asdict(data.config),
        "data": data.fingerprint,
        "tokenizer": {"sha256": data.tokenizer_sha256},
        "adapters": NO_ADAPTERS | adapters_of(training),
    }
    check_fits(path, checkpoint, mine, training.optimizer_type)
    say(f"resuming from {path} at step {checkpoint['progress']['step']:,}")
    if changed := changed_settings(checkpoint, training):
        say(f"resuming with other settings than before: {', '.join(changed)}")
    if changed := changed_environment(checkpoint, environment):
        say(f"resuming, but not with the same bits: {', '.join(changed)}")


def check_fits(path: Path, checkpoint: Mapping, mine: Mapping[str, Mapping], optimizer_type: str) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        mine: this run's `config`, `data`, `tokenizer` and `adapters`, to compare with the checkpoint's.

    Raises:
        InputError: naming what differs.
    """
    new_run = f"begin a new run with its weights: {command_line('--init_from', path)}, another --out_dir, no --resume"
    remedies = {
        "config": "change the shape back, or omit --resume to begin a new run",
        "data": f"give the same data, or {new_run}",
        "tokenizer": "give the same tokenizer_path, or omit --resume to begin a new run",
        "adapters": f"change it back, or {new_run}",
    }
    its = {
        "config": checkpoint["config"],
        "data": checkpoint["data"],
        "tokenizer": {"sha256": checkpoint["tokenizer_sha256"]},
        "adapters": NO_ADAPTERS | checkpoint["adapters"],
    }
    titles = {
        "config": "another model",
        "data": "other data",
        "tokenizer": "another tokenizer",
        "adapters": "other LoRA",
    }
    for name, title in titles.items():
        there, here = its[name], mine[name]
        unknown = {key for key in here if key.endswith("sha256") and None in (here[key], there.get(key))}
        different = [
            f"{fingerprint_text(key, here) if name == 'data' else key} {_short(there.get(key))} there,"
            f" {_short(here[key])} here"
            for key in here
            if here[key] != there.get(key) and key not in unknown
        ]
        if different:
            more = f"; and {len(different) - MOST_DIFFERENCES:,} more" if len(different) > MOST_DIFFERENCES else ""
            found = "; ".join(different[:MOST_DIFFERENCES]) + more
            raise InputError(f"{path} was made with {title}: {found}; {remedies[name]}")
    before = checkpoint["settings"]["training"]["optimizer_type"]
    if before != optimizer_type:
        raise InputError(
            f"{path} was made with optimizer_type {before}, not {optimizer_type}; change it back, or {new_run}"
        )


def _short(value) -> str:
    text = "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text


def changed_settings(checkpoint: Mapping, training: TrainingSettings) -> list[str]:
    """'learning_rate 0.0003 -> 0.0001' for each setting of training that is not what it was."""
    before, now = checkpoint["settings"]["training"], dataclasses.asdict(training)
    names = [name for name in before if name in now and name not in MAY_CHANGE and now[name] != before[name]]
    return [f"{name} {before[name]} -> {now[name]}" for name in names]


def environment(world_size: int, dtype: torch.dtype, device: torch.device, shards: int = 1) -> dict:
    """What equal bits depend on, besides data, settings and state.

    Args:
        shards: ranks among which one copy of the weights is divided: it decides the order of sums over the ranks, of
            which two have only one.
    """
    return {
        "torch": str(torch.__version__),  # plain text, not torch's own class
        "python": platform.python_version(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "device": device.type,
        "weight_shards": shards if world_size > 2 else 1,
    }


def changed_environment(checkpoint: Mapping, now: Mapping) -> list[str]:
    """'threads 2 -> 8' for each thing on which equal bits depend and that is not what it was."""
    before = {"weight_shards": 1} | checkpoint["environment"]  # which earlier versions did not know
    return [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
