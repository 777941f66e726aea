"""`copy_to`: copies of what a run has saved, in a folder that may be slow, full or gone, such as a notebook's drive.

A thread copies the newest whole checkpoint, with what a resumed run needs beside it, and the weights. No failure there
reaches the training: each is a line, and the next save tries again.
"""

import contextlib
import hashlib
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError
from model.runs.folder import (
    COPIED_BESIDE,
    INTERRUPTED,
    checkpoints_by_step,
    leave_line,
    move_earlier_run,
    refuse_file,
    remove_stray_parts,
    remove_unfinished,
    remove_unless_open,
    started_at,
)
from model.storage.files import drop_from_cache, replacing
from model.token_file.manifest import file_sha256

CHECKPOINT = "checkpoint"  # the kind of a copy; of weights it is their name
FINISH_SECONDS = 300.0  # that the end of a run waits for its copies
CLOSE_SECONDS = 10.0  # that a run that fails waits for them
QUIET_SECONDS = 3.0  # of that waiting, before a line says so
BLOCK_BYTES = 8 << 20


def check_copy_folder(folder: Path) -> None:
    """Whether copies may go there, as far as can be said before anything is copied: the folder may be gone for now.

    Raises:
        InputError: it is a file, or what it holds would be taken for another run's.
    """
    refuse_file("copy_to", folder)
    try:
        others = [name for name in ("config.yaml", "metrics.jsonl") if (folder / name).exists()]
        is_of_run = started_at(folder) is not None
    except OSError:
        return
    if others and not is_of_run:
        raise InputError(f"copy_to: {folder} holds {' and '.join(others)} of no run; give a new or an empty folder")


class Copier:
    """Copies files of a run into another folder, in a thread.

    Args:
        out_dir: the run's folder, which holds its config.yaml.
        folder: for the copies; its parent must be there, so that a drive that is not mounted is noticed.
        started: when the run started; what another run left in the folder is moved aside.
        step: that the run resumes from; so are checkpoints of later steps, which come again.
        say: prints one line for the user; called from the thread.

    Attributes:
        longest: seconds that copying one checkpoint took at most.
    """

    def __init__(self, out_dir: Path, folder: Path, started: str, step: int, say: Callable[[str], None]) -> None:
        self.out_dir, self.folder, self.longest = out_dir, folder, 0.0
        self._started, self._step, self._say = started, step, say
        self._is_prepared = False
        self._is_finished = False  # nothing more is offered: the thread ends with what waits
        self._changed = threading.Condition()  # guards the three below; each maps a kind to the names of its files
        self._waiting: dict[str, tuple[str, ...]] = {}
        self._copying: dict[str, tuple[str, ...]] = {}
        self._failed: dict[str, tuple[str, ...]] = {}
        self._thread = threading.Thread(target=self._work, name="copier", daemon=True)
        self._thread.start()

    def offer(self, kind: str, *names: str) -> None:
        """Copy these files of the run's folder next; they take the place of those of their kind that still wait."""
        with self._changed:
            self._failed.pop(kind, None)
            self._waiting[kind] = names
            self._changed.notify_all()

    def finish(self, every_second: Callable[[], None] = lambda: None, seconds: float | None = None) -> None:
        """The run ends: try again what has failed, wait until everything is copied, and say what is not. Once.

        Args:
            every_second: called while waiting.
            seconds: to wait at most; None: FINISH_SECONDS.
        """
        if self._is_finished:
            return
        seconds = FINISH_SECONDS if seconds is None else seconds
        with self._changed:
            self._is_finished = True
            self._waiting, self._failed = self._failed | self._waiting, {}
            self._changed.notify_all()
        begin, is_told = time.monotonic(), False
        while self._unfinished() and (waited := time.monotonic() - begin) < seconds:
            if waited > QUIET_SECONDS and not is_told:
                self._say(f"copy_to: copying to {self.folder}, for at most {seconds:g} s")
                is_told = True
            with self._changed:
                self._changed.wait_for(lambda: not (self._waiting or self._copying), timeout=min(1.0, seconds))
            every_second()
        with self._changed:
            left = [name for names in (self._copying | self._failed | self._waiting).values() for name in names]
            self._waiting, self._failed = {}, {}
        if left:
            self._say(f"copy_to: {self.folder} lacks {', '.join(left)}; copy them from {self.out_dir}")
        else:
            self._thread.join()

    def _unfinished(self) -> bool:
        with self._changed:
            return bool(self._waiting or self._copying)

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # a mount that is broken: the first copy says how
            if missing := self._missing():
                self._say(f"copy_to: {missing} Nothing is copied until it is there.")
        while True:
            with self._changed:
                self._copying = {}
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_finished)
                if not self._waiting:
                    return
                kind = next(iter(self._waiting))
                names = self._waiting.pop(kind)
                self._copying = {kind: names}
            try:
                self._copy(kind, names)
            except (InputError, OSError) as error:
                with self._changed:
                    is_latest = kind not in self._waiting  # else the older file may be gone, and nobody needs it
                    if is_latest:
                        self._failed[kind] = names
                if is_latest:
                    again = "" if self._is_finished else "; the next save tries again"
                    self._say(f"copy_to: {names[-1]} is not copied: {error}{again}")

    def _copy(self, kind: str, names: tuple[str, ...]) -> None:
        self._prepare()
        begin = time.monotonic()
        beside = [name for name in COPIED_BESIDE if (self.out_dir / name).exists()] if kind == CHECKPOINT else []
        for name in (*beside, *names):
            copy_checked(self.out_dir / name, self.folder / name)
        if kind == CHECKPOINT:
            self.longest = max(self.longest, time.monotonic() - begin)
            self._prune(self.folder / names[-1])

    def _missing(self) -> str | None:
        parent = self.folder.parent
        return None if parent.is_dir() else f"there is no folder {parent}; is the drive mounted?"

    def _prepare(self) -> None:
        """Make the folder this run's, once, and again where it has vanished."""
        if missing := self._missing():
            raise InputError(missing)
        self.folder.mkdir(exist_ok=True)
        if self._is_prepared and started_at(self.folder) == self._started:
            return
        remove_unfinished(self.folder)
        is_own = started_at(self.folder) == self._started
        moved = leave_line(self.folder, self._step) if is_own else move_earlier_run(self.folder)
        if moved is not None:
            self._say(f"copy_to: what {self.folder} held of {'later steps' if is_own else 'another run'} is in {moved}")
        copy_checked(self.out_dir / "config.yaml", self.folder / "config.yaml")
        self._is_prepared = True

    def _prune(self, newest: Path) -> None:
        """Keep the newest checkpoint and the one before."""
        others = [path for _, path in checkpoints_by_step(self.folder) if path != newest]
        for path in others[:-1]:
            remove_unless_open(path)
        if newest.name != INTERRUPTED:
            remove_unless_open(self.folder / INTERRUPTED)
        remove_stray_parts(self.folder)


def _opened(source: Path) -> BinaryIO:
    """A file to read from. Weights are read at once: Windows replaces no file that is open, and the next best weights
    must not wait for a slow folder. A checkpoint has a name that no other one takes."""
    return open(source, "rb") if source.name.startswith("checkpoint_") else io.BytesIO(source.read_bytes())


def copy_checked(source: Path, target: Path) -> None:
    """Copy a file under another name, read the copy back, and only then give it its name.

    Raises:
        InputError: the copy cannot be written, or reads back differently; what was there before stays.
        OSError: the source cannot be read.
    """
    sha256 = hashlib.sha256()

    def check(written: Path) -> None:
        drop_from_cache(written)
        if file_sha256(written) != sha256.hexdigest():
            raise InputError(f"{target}: what was read back is not what was written")

    with _opened(source) as original, replacing(target, source.stat().st_size, check) as copy:
        while block := original.read(BLOCK_BYTES):
            sha256.update(block)
            copy.write(block)
