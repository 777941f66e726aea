"""The folder of a long job, which may be killed at any instant and, run again, ends with the same bytes.

For the output `X.bin` (or `X.jsonl`) it is `X.bin.parts/`, beside it:

    .lock               held while a process works on this output; the system frees it when the process dies
    plan.json           everything that the output depends on; a job resumes only if it is unchanged
    00000-0000012.npz   part 12 of source 0, and beside it its .payload (`model.corpus.part_file`)
    merged/             the finished files, while they are written
    publish.json        written once they are finished: the names they get; from then on only renames are left

The folder is removed once the output has its name. Half-written files in it are written again.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from model.errors import InputError
from model.storage.files import write_json

FILES_OF, SIZES = "the files of ", "the input's size"  # in the plan: the first of each source of many files
MOST_CHANGES = 5  # that a message names
ADDED_LATER = ("bos_id", "eos_id", "end_ids")  # to the plan, when the tokenizer.json alone no longer sufficed


class JobFolder:
    """Opens, locks, publishes and removes the folder.

    Args:
        output: the file that is being made.
        is_main: whether this process plans, merges and publishes; the others only add parts.

    Raises:
        InputError: another process makes the same output, or the folder cannot be written.
    """

    def __init__(self, output: Path, is_main: bool = True) -> None:
        self.output, self.is_main = output, is_main
        self.path = job_path(output)
        self.merged = self.path / "merged"
        self._plan, self._publish = self.path / "plan.json", self.path / "publish.json"
        self._lock = None
        if is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"{output} is in use: another process is making the same file; wait for it") from None

    def __enter__(self) -> "JobFolder":
        return self

    def __exit__(self, kind=None, *error) -> None:
        if self._lock is None:
            return
        if kind is not None and not self.is_finished and not self.has_parts:  # a wrong flag leaves nothing to resume
            with contextlib.suppress(OSError):  # what ended the job is told, not this
                self.clear()
            self._leave()
        else:
            self._release()

    def _release(self) -> None:
        self._lock.release()
        self._lock = None

    def _leave(self) -> None:
        """Remove the folder, which is empty but for the lock. From the moment that the lock is gone another job may
        begin here: what it puts there stays."""
        lock = Path(self._lock.lock_file)
        with contextlib.suppress(OSError):  # Windows removes no open file
            lock.unlink()
        self._release()
        with contextlib.suppress(OSError):
            if os.name == "nt":
                lock.unlink(missing_ok=True)  # fails where another job holds it
            self.path.rmdir()

    def planned(self) -> dict | None:
        """The plan that the job began with; None where there is none.

        Raises:
            InputError: it cannot be read.
        """
        if not self._plan.exists():
            return None
        try:
            return json.loads(self._plan.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._plan} is not a plan that this program can read; {self._remedy}") from error

    @property
    def _remedy(self) -> str:
        return f"start over with --resume false, or delete {self.path}"

    def clear(self, *kept: Path) -> None:
        """Remove everything except the lock and `kept`."""
        for path in self.path.iterdir():
            if path.name != ".lock" and path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def begin(self, plan: dict) -> bool:
        """Start with this plan, or resume it; returns whether it resumes.

        Raises:
            InputError: the folder was begun with another plan.
        """
        before = self.planned()
        if before is None or (before != plan and not self.has_parts and not self.output.exists()):
            before = None
            self.clear()
            write_json(self._plan, plan)
        elif changed := describe_changes(before, plan):
            raise InputError(
                f"{self.output} is half made, and this changed since: {changed}; change it back, or {self._remedy}"
            )
        for temporary in self.path.glob("*.tmp"):  # of workers that were killed
            temporary.unlink(missing_ok=True)
        return before is not None

    def part(self, source: int, index: int) -> Path:
        """Where part `index` of a source lies."""
        return self.path / f"{source:05d}-{index:07d}.npz"

    @property
    def has_parts(self) -> bool:
        """Whether anything was made yet."""
        return next(self.path.glob("*.npz"), None) is not None

    @property
    def is_finished(self) -> bool:
        """Whether only the renames are left to do."""
        return self._publish.exists()

    def start_merging(self) -> None:
        """Make `merged/` empty."""
        shutil.rmtree(self.merged, ignore_errors=True)
        self.merged.mkdir()

    def finish(self, made: list[str], gone: list[str]) -> None:
        """Mark the merged files as finished: only `publish` is left to do.

        Args:
            made: names of the files in `merged/`, in the order in which they move beside the output; a manifest comes
                after the file that it describes.
            gone: names that this job has no file for; what an earlier job left under them is removed.
        """
        write_json(self._publish, {"made": made, "gone": gone})

    def publish(self) -> None:
        """Give the finished files their names and remove the folder; resumes where an earlier call was killed."""
        names = json.loads(self._publish.read_text(encoding="utf-8"))
        waiting = [name for name in names["made"] if (self.merged / name).exists()]
        for name in [*names["gone"], *(name for name in waiting if name.endswith(".json"))]:
            self.output.with_name(name).unlink(missing_ok=True)  # an older manifest must not stand beside a newer file
        for name in waiting:
            os.replace(self.merged / name, self.output.with_name(name))
        self.remove()

    def remove(self) -> None:
        """Remove the folder; publish.json goes last, so that a removal that is cut short can resume."""
        self.clear(self._publish)
        self._publish.unlink(missing_ok=True)
        self._leave()


def job_path(output: Path) -> Path:
    """The job's folder beside its output."""
    return output.with_name(output.name + ".parts")


def describe_changes(before: dict, now: dict) -> str:
    """'the tokenizer (was 1a2b…, is 3c4d…), text_field (was text, is content)'; '' where nothing changed.

    Plans of earlier versions lack ADDED_LATER, which is taken as unchanged; and they have a source for each small .txt.
    """
    before = {name: now[name] for name in ADDED_LATER if name in now} | before
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    joined = {name for name in now.keys() - before.keys() if name.startswith(FILES_OF)}
    same_bytes = sum(before.get(SIZES) or ()) == sum(now.get(SIZES) or ())
    if joined and same_bytes and joined.issuperset({*changed} - {"input_path", SIZES, "weights"}):
        return "an earlier version read each small .txt as a source of its own, this one reads those of a folder as one"
    told = [f"{name} (was {_short(before.get(name))}, is {_short(now.get(name))})" for name in changed[:MOST_CHANGES]]
    more = [f"{len(changed) - MOST_CHANGES:,} more"] if len(changed) > MOST_CHANGES else []
    return ", ".join(told + more)


def _short(value) -> str:
    """A value of a plan in a few words: a list as its items, a hash as its first 12 digits."""
    if value is None:
        return "not set"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = text.lower() if isinstance(value, bool) else text or "none"
    return text if len(text) <= 24 else text[:12] + "…"
