"""The files that a run leaves in its folder: which checkpoint is the newest, what becomes of an earlier run's."""

import datetime
import pickle
import re
from pathlib import Path

import torch

from model.checkpoint import load_torch
from model.errors import InputError
from model.files import TEMPORARY_SUFFIX

INTERRUPTED = "checkpoint_interrupted.pth"
TIME_FORMAT = "%Y%m%dT%H%M%S"
STARTED = "# started "  # the first line of out/config.yaml
RUN_FILES = (
    "checkpoint_*.pth", "pretrain_*.pth", "pretrain_*.json", "best_model.pth", "best_model.json",
    "metrics.jsonl", "curves.png", "config.yaml",
)  # fmt: skip


def step_checkpoint(out_dir: Path, step: int) -> Path:
    """`out/checkpoint_step_{N}.pth`."""
    return out_dir / f"checkpoint_step_{step}.pth"


def checkpoints_by_step(out_dir: Path) -> list[tuple[int, Path]]:
    """Every step checkpoint in the folder with its step, oldest first."""
    found = []
    for path in out_dir.glob("checkpoint_step_*.pth"):
        if match := re.fullmatch(r"checkpoint_step_(\d+)\.pth", path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def newest_checkpoint(out_dir: Path) -> tuple[Path, dict, list[str]] | None:
    """The checkpoint with the most steps that is whole: (path, content, what was wrong with those passed over)."""
    passed_over = []
    for _, path in sorted(_all_checkpoints(out_dir), reverse=True):
        try:
            return path, load_checkpoint(path), passed_over
        except InputError as error:
            passed_over.append(str(error))
    if passed_over:
        raise InputError(f"no whole checkpoint in {out_dir}: " + "; ".join(passed_over))
    return None


def _all_checkpoints(out_dir: Path) -> list[tuple[float, Path]]:
    interrupted = out_dir / INTERRUPTED
    extra = [(_step_inside(interrupted), interrupted)] if interrupted.is_file() else []
    return checkpoints_by_step(out_dir) + extra


def _step_inside(path: Path) -> float:
    """The step of a checkpoint whose name does not tell; a damaged one is tried first, and then reported."""
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")["progress"]["step"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        return float("inf")


def load_checkpoint(path: Path) -> dict:
    """Read a training checkpoint.

    Raises:
        InputError: the file is missing, damaged or no training checkpoint.
    """
    content = load_torch(path)
    if "progress" not in content:
        raise InputError(f"{path}: holds weights only; --resume needs a checkpoint_step_*.pth or {INTERRUPTED}")
    return content


def prune_checkpoints(out_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` step checkpoints."""
    for _, path in checkpoints_by_step(out_dir)[:-keep_last]:
        path.unlink(missing_ok=True)


def remove_leftovers(out_dir: Path) -> None:
    """Remove temporary files of a process that was killed while it wrote one."""
    for path in out_dir.glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def move_earlier_run(out_dir: Path) -> Path | None:
    """Move an earlier run's files to `out_dir/previous/{when it started}/`; None where there are none."""
    files = sorted({path for pattern in RUN_FILES for path in out_dir.glob(pattern) if path.is_file()})
    if not files:
        return None
    return _move(files, out_dir / "previous" / _started(out_dir, files))


def move_newer_checkpoints(out_dir: Path, step: int) -> Path | None:
    """Move checkpoints past `step` to `out_dir/previous/{now}/`: a run that goes on from `step` leaves their line.

    Left in place, they would be taken for its own by the next `--resume`. Damaged ones that were passed over go too.
    """
    files = [path for its_step, path in _all_checkpoints(out_dir) if its_step > step]
    return _move(files, out_dir / "previous" / _now()) if files else None


def _move(files: list[Path], target: Path) -> Path:
    unused, number = target, 2
    while unused.exists():
        unused, number = target.with_name(f"{target.name}_{number}"), number + 1
    unused.mkdir(parents=True)
    for path in files:
        path.rename(unused / path.name)
    return unused


def _now() -> str:
    return datetime.datetime.now().strftime(TIME_FORMAT)


def _started(out_dir: Path, files: list[Path]) -> str:
    config = out_dir / "config.yaml"
    if config.is_file():
        with open(config, encoding="utf-8", errors="replace") as file:
            first = file.readline().rstrip()
        if re.fullmatch(re.escape(STARTED) + r"\d{8}T\d{6}", first):
            return first.removeprefix(STARTED)
    oldest = min(path.stat().st_mtime for path in files)
    return datetime.datetime.fromtimestamp(oldest).strftime(TIME_FORMAT)
