"""The files that a run leaves in its folder, and what becomes of those of an earlier run."""

import contextlib
import datetime
import errno
import itertools
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout  # a requirement of torch itself

from model.errors import InputError, shown
from model.runs.event_file import EVENT_FILES
from model.runs.trackers import RUN_FILES
from model.storage.archive import DAMAGE, digest_is_right
from model.storage.files import TEMPORARY_SUFFIX, free_bytes, is_abandoned, replacing, size_text
from model.storage.newest_weights import BEST, FINAL
from model.storage.part_names import PARTS, index_name, is_part, step_of_part
from model.storage.parts import part_names
from model.training.plan import RunSpace
from model.weights.weights import saved_step

INTERRUPTED = "checkpoint_interrupted.pth"
TIME_FORMAT = "%Y%m%dT%H%M%S"
STARTED = "# started "  # the first line of out/config.yaml
CHECKPOINTS = ("checkpoint_step_*.pth", INTERRUPTED, PARTS)
COPIED_BESIDE = ("metrics.jsonl", *RUN_FILES)  # with each checkpoint that is copied (`copy_to`): the run's history
WEIGHTS = (*FINAL, BEST)
RESULTS = (
    *WEIGHTS, *(name.replace(".pth", ".json") for name in WEIGHTS),
    "metrics.jsonl", "curves.png", EVENT_FILES, *RUN_FILES, "status.json",
)  # fmt: skip


def begin_run(
    out_dir: Path, resumed_from: Path | None, step: int, copy_to: str | None, say: Callable[[str], None]
) -> tuple[str | None, Path | None]:
    """Set aside what another run, or another line of this one, left in a claimed folder.

    Args:
        resumed_from: the checkpoint that the run resumes from; None where it starts from the beginning.
        step: the step that it resumes at.
        copy_to: the folder of this run's copies.

    Returns:
        when the run started: None where it resumes the run in this folder, or its copy; and where the files of an
        earlier run are now: None where there were none.
    """
    if resumed_from is not None and is_in(resumed_from, out_dir):
        if (moved := leave_line(out_dir, step)) is not None:
            say(f"out_dir: what is past step {step:,}, and a copy of the other results, is now in {moved}")
        return None, None
    if (moved := move_earlier_run(out_dir)) is not None:
        say(f"out_dir: {out_dir} held another run; its files are now in {moved}")
    if resumed_from is None:
        return now(), moved
    is_copy = is_in(resumed_from, copy_to)
    best = [resumed_from.parent / BEST, (resumed_from.parent / BEST).with_suffix(".json")]
    goes_past = any(its_step > step for its_step, _ in all_checkpoints(resumed_from.parent))
    later = _weights_past(resumed_from.parent, step) if goes_past else []
    if all(path.is_file() and path not in later for path in best):  # the best so far come along into the new folder
        for path in best:
            shutil.copy2(path, out_dir / path.name)
    for name in COPIED_BESIDE if is_copy else ():
        if (resumed_from.parent / name).exists():
            shutil.copy2(resumed_from.parent / name, out_dir / name)
    return None if is_copy else now(), moved


def is_in(file: Path, folder: str | Path | None) -> bool:
    """Whether a file lies in a folder, however the folder is written; False without one."""
    return folder is not None and file.resolve().parent == Path(folder).resolve()


def is_within(path: str | Path, out_dir: Path) -> bool:
    """Whether a path is a run's folder, or a file in it: what a new run there moves away."""
    place = Path(path).expanduser().resolve()
    return out_dir.resolve() in (place, place.parent)


def recorded_source(out_dir: Path) -> str | None:
    """The `init_from` of the run that started in this folder, as its config.yaml has it; None: it has none."""
    if started_at(out_dir) is None:
        return None
    try:
        found = yaml.safe_load((out_dir / "config.yaml").read_text(encoding="utf-8"))["training"]["init_from"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) and Path(found).exists() else None


def write_config(out_dir: Path, started: str, settings: dict) -> None:
    """Write `out/config.yaml`: when the run started, and its settings as resolved."""
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    with replacing(out_dir / "config.yaml") as file:
        file.write(f"{STARTED}{started}\n{text}".encode())


def claim(out_dir: Path) -> FileLock:
    """Make the folder and lock it for this run; the system frees the lock of a process that dies.

    Raises:
        InputError: the folder cannot be written, another process trains into it, or its config.yaml is no run's.
    """
    refuse_file("out_dir", out_dir)
    try:
        if (out_dir / "config.yaml").is_file() and started_at(out_dir) is None:
            raise InputError(f"out_dir: {out_dir / 'config.yaml'} was not written by a run; give another folder")
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"out_dir: another process is training into {out_dir}; give another folder") from None
    except OSError as error:
        raise InputError(f"out_dir: cannot write to {out_dir} ({error.strerror})") from error
    remove_unfinished(out_dir)
    return lock


def refuse_closed(out_dir: Path) -> None:
    """Refuse a folder that certainly cannot be written, before anything takes time; it need not exist.

    Raises:
        InputError: naming it.
    """
    refuse_file("out_dir", out_dir)
    there = next(path for path in (out_dir, *out_dir.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # others may be over when it is written
            raise InputError(f"out_dir: cannot write to {out_dir} ({error.strerror})") from error


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a process left which was killed while it wrote them, and parts of checkpoints
    without the rest. Files of others stay. Nobody may be saving into the folder."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):  # another process was faster, or has it open
            if not path.is_dir() and is_abandoned(path):
                path.unlink(missing_ok=True)
    remove_stray_parts(folder)


def remove_stray_parts(folder: Path, before_step: float = math.inf) -> None:
    """Remove the parts that belong to no checkpoint: their index is missing, or is an interrupted one and names others.
    What a copy of an index names stays, under whatever name the copy is kept; all stay while an index can't be read.

    Args:
        before_step: those of later steps stay, since they may be written just now.
    """
    files = list(folder.glob("*.pth"))  # one listing: what it lacks is missing, and not only hard to read
    names = {path.name for path in files}
    doubtful = [
        part
        for part in filter(is_part, files)
        if step_of_part(part) < before_step and (index_name(part) == INTERRUPTED or index_name(part) not in names)
    ]
    found = [part_names(path) for path in files if not is_part(path)] if doubtful else []
    if None in found:  # a file that cannot be read now may name any of them
        return
    named = set().union(*found)
    for part in doubtful:
        if part.name not in named:
            remove_unless_open(part)


def remove_unless_open(path: Path) -> None:
    """Remove a checkpoint or a part; on Windows one that is being read stays, and the next save removes it."""
    with contextlib.suppress(PermissionError):
        path.unlink(missing_ok=True)


def refuse_file(name: str, folder: Path) -> None:
    """Refuse a path where a file is, or below one, in words of their own: the system's would be "File exists".

    Args:
        name: of the setting.

    Raises:
        InputError: naming the file.
    """
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError):  # a name that no file system takes
            if path.is_file():
                raise InputError(f"{name}: {path} is a file, a folder expected; give the name of a folder")


def started_at(out_dir: Path) -> str | None:
    """When the run in this folder started, as its config.yaml says; None where there is no such line."""
    config = out_dir / "config.yaml"
    if not config.is_file():
        return None
    with open(config, encoding="utf-8", errors="replace") as file:
        first = file.readline().rstrip()
    return first.removeprefix(STARTED) if re.fullmatch(re.escape(STARTED) + r"\d{8}T\d{6}", first) else None


def now() -> str:
    """The time as runs write it."""
    return datetime.datetime.now().strftime(TIME_FORMAT)


def unix_time(written: str) -> float | None:
    """Seconds since 1970 of a time as runs write it; None where it is none."""
    try:
        return datetime.datetime.strptime(written, TIME_FORMAT).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def step_checkpoint(out_dir: Path, step: int) -> Path:
    """`out/checkpoint_step_{N}.pth`."""
    return out_dir / f"checkpoint_step_{step}.pth"


def interrupted_stem(out_dir: Path, step: int) -> str:
    """What the names of the parts of an interrupted checkpoint begin with. No part that is there has such a name, so
    the interrupted checkpoint that this one replaces stays whole until then."""
    stems = (f"checkpoint_interrupted_{step}" + (f"_{number}" if number else "") for number in itertools.count())
    return next(stem for stem in stems if not any(out_dir.glob(f"{stem}.part-*")))


def checkpoints_by_step(out_dir: Path) -> list[tuple[float, Path]]:
    """Every step checkpoint in the folder with its step, oldest first."""
    found = []
    for path in out_dir.glob(CHECKPOINTS[0]):
        if match := re.fullmatch(r"checkpoint_step_(\d+)\.pth", path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def all_checkpoints(out_dir: Path) -> list[tuple[float, Path]]:
    """The step checkpoints and the interrupted one, each with its step."""
    interrupted = out_dir / INTERRUPTED
    extra = [(_step_inside(interrupted), interrupted)] if interrupted.is_file() else []
    return checkpoints_by_step(out_dir) + extra


def _step_inside(path: Path) -> float:
    """The step of a checkpoint whose name does not tell; a damaged one is tried first, and then reported."""
    try:
        if digest_is_right(path):
            return int(torch.load(path, weights_only=True, mmap=True, map_location="cpu")["progress"]["step"])
    except DAMAGE:
        pass
    return float("inf")


def prune_checkpoints(out_dir: Path, keep_last: int, verified: int) -> None:
    """Remove all but the newest `keep_last` step checkpoints, and the interrupted one, which the run has passed.

    Args:
        verified: step of the checkpoint that was just written and read back. It stays, and so does all that is newer.
    """
    old = [path for step, path in checkpoints_by_step(out_dir) if step < verified]
    for path in old[: max(0, len(old) - (keep_last - 1))]:
        remove_unless_open(path)
    remove_unless_open(out_dir / INTERRUPTED)
    remove_stray_parts(out_dir, before_step=verified)


def check_space(out_dir: Path, space: RunSpace, resumes: bool) -> None:
    """Check, before a run starts, that everything it will write has room.

    Args:
        resumes: the run has files there already, which new ones replace.

    Raises:
        InputError: with how much is free, and how much is needed; or there can be no such folder.
    """
    refuse_file("out_dir", out_dir)
    try:
        free = free_bytes(out_dir)
        there = _files(out_dir, *CHECKPOINTS, BEST) if resumes else []
        taken = sum(path.stat().st_size for path in there)
    except OSError as error:  # a name that no file system takes
        raise InputError(f"out_dir: cannot write to {shown(str(out_dir))} ({error.strerror})") from error
    needed = space.most - taken
    if needed > free:
        raise InputError(
            f"out_dir: {size_text(free)} are free in {out_dir}, but this run needs {size_text(needed)}"
            f" ({space.checkpoints} checkpoints of {size_text(space.checkpoint_bytes)} and one being written, weights"
            f" of {size_text(space.weights_bytes)}); free some, give another folder, or lower keep_last"
        )


def move_earlier_run(out_dir: Path) -> Path | None:
    """Move an earlier run's files to `out_dir/previous/{when it started}/`; None where there are none."""
    files = _files(out_dir, *CHECKPOINTS, *RESULTS, "config.yaml")
    if not files:
        return None
    oldest = min(path.stat().st_mtime for path in files)
    started = started_at(out_dir) or datetime.datetime.fromtimestamp(oldest).strftime(TIME_FORMAT)
    target = _new_folder(out_dir / "previous" / started)
    for path in files:
        path.rename(target / path.name)
    return target


def leave_line(out_dir: Path, step: int) -> Path | None:
    """Set aside what a run has past `step`, where another line of it now begins; None where there is nothing.

    Its newer checkpoints are moved to `out_dir/previous/{now}/`: left in place, they would be taken for the new line's
    by the next `--resume`; so are weights of later steps. Its other results are copied there, since the new line will
    write over them.
    """
    newer = [path for its_step, path in all_checkpoints(out_dir) if its_step > step]
    if not newer:
        return None
    later = _weights_past(out_dir, step)
    target = _new_folder(out_dir / "previous" / now())
    for path in newer:
        for part in filter(is_part, out_dir.glob(PARTS)):
            if index_name(part) == path.name:
                part.rename(target / part.name)
        path.rename(target / path.name)
    for path in _files(out_dir, *RESULTS):
        if path in later:
            path.rename(target / path.name)
        else:
            shutil.copy2(path, target / path.name)
    for name in RUN_FILES:  # trackers take no step twice: they see the new line as a new run
        (out_dir / name).unlink(missing_ok=True)
    return target


def _weights_past(folder: Path, step: int) -> list[Path]:
    """The weights, with their descriptions, that a run saved past `step`; those of unknown steps too."""
    steps = {path: saved_step(path) for path in _files(folder, *WEIGHTS)}
    later = [path for path, saved in steps.items() if saved is None or saved > step]
    return [*later, *(path.with_suffix(".json") for path in later)]


def _files(out_dir: Path, *patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in out_dir.glob(pattern) if path.is_file()})


def _new_folder(wanted: Path) -> Path:
    unused, number = wanted, 2
    while unused.exists():
        unused, number = wanted.with_name(f"{wanted.name}_{number}"), number + 1
    unused.mkdir(parents=True)
    return unused
