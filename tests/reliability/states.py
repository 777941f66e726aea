"""What a run left, compared by bits: the states in two checkpoints, and the lines of metrics.jsonl."""

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.runs.event_file import EVENT_FILES

if TYPE_CHECKING:
    from model.training.choices import FoundCheckpoint

# Not part of what training goes on from: when and where the run was, and with what settings for its place.
OUTSIDE_THE_STATE = {"started", "settings", "environment", "tokenizer_path", "format_version"}


def state_of(checkpoint: str | Path) -> dict:
    """The full state in a checkpoint, all but `OUTSIDE_THE_STATE` and the seconds; read as `--resume` reads it."""
    from model.runs.resume import load_checkpoint

    content = load_checkpoint(Path(checkpoint))
    state = {key: value for key, value in content.items() if key not in OUTSIDE_THE_STATE}
    state["progress"] = {key: value for key, value in content["progress"].items() if key != "seconds"}
    return state


def resumed_from(folder: str | Path) -> tuple["FoundCheckpoint | None", list[str]]:
    """The checkpoint that `--resume` takes in a folder, and what it says of those that it passes over.

    Raises:
        InputError: there are checkpoints, and none of them can be read.
    """
    from model.runs.resume import find_checkpoint
    from model.training.settings import TrainingSettings

    said = []
    return find_checkpoint(TrainingSettings(resume=True, out_dir=str(folder)), said.append), said


def fingerprint(checkpoint: str | Path) -> str:
    """SHA-256 over the full state of a checkpoint: equal exactly where every bit of it is."""
    digest = hashlib.sha256()
    _feed(digest, state_of(checkpoint))
    return digest.hexdigest()


def differences(first: str | Path, second: str | Path) -> list[str]:
    """The parts of two checkpoints' states that are not the same to the last bit."""
    a, b = state_of(first), state_of(second)
    return [key for key in sorted(a.keys() | b.keys()) if hash_of(a.get(key)) != hash_of(b.get(key))]


def hash_of(value) -> str:
    """SHA-256 of a value of a checkpoint, types and lengths included."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest, value) -> None:
    """Add a value to a hash, with the types and lengths that tell it from any other."""

    def add(kind: str, content: bytes) -> None:
        digest.update(kind.encode() + b" " + str(len(content)).encode() + b" " + content)

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        add(f"tensor {value.dtype} {tuple(value.shape)}", value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):  # a dict, or what is put together from several files
        add("dict", str(len(value)).encode())
        for key in sorted(value, key=repr):
            add("key", repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        add(type(value).__name__, str(len(value)).encode())
        for entry in value:
            _feed(digest, entry)
    elif isinstance(value, float):
        add("float", struct.pack("<d", value))  # infinities and the sign of zero included
    elif value is None or isinstance(value, (bool, int, str)):
        add(type(value).__name__, repr(value).encode())
    else:
        raise TypeError(f"a {type(value).__name__} in a checkpoint")


def events(out_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def logged(out_dir: Path) -> list[tuple]:
    """What metrics.jsonl says of each step and evaluation, but for what the clock decides: floats to the last bit."""
    clock = {"elapsed", "tokens_per_second", "mfu"}
    return [tuple(sorted((k, v) for k, v in event.items() if k not in clock)) for event in events(out_dir)]


def losses(out_dir: Path) -> dict[int, float]:
    """The training loss of each step."""
    return {event["step"]: event["loss"] for event in events(out_dir) if "loss" in event}


def file_names(out_dir: Path) -> set[str]:
    """The files in a run's folder, without those for TensorBoard, which have a time in their names."""
    return {path.name for path in out_dir.iterdir()} - {path.name for path in out_dir.glob(EVENT_FILES)}


def left_lying(out_dir: Path) -> list[str]:
    """Temporary files, and files moved aside, in a run's folder: there are none when all is well."""
    left = [path.name for path in out_dir.rglob("*.tmp")]
    return left + ([f"previous/{path.name}" for path in (out_dir / "previous").glob("*")])


def copy_run(out_dir: Path, target: Path) -> Path:
    """A copy of a run's folder, without its lock."""
    shutil.copytree(out_dir, target, ignore=shutil.ignore_patterns(".lock"))
    return target
