"""Checkpoints that all ranks write at once: each its part, in a thread; then rank 0 the index, which makes them one.

A rank tells rank 0 how its part has ended by the store that all ranks share, so no rank's training waits for another's
disk. Until the index is there, the parts are leftovers, which the next start removes; so whatever is killed when, the
newest checkpoint is whole.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from model.errors import InputError, OneLineError, ProcessLost, TrainingDiverged
from model.runs.checkpoint import INDEX_VERSION
from model.runs.folder import interrupted_stem, step_checkpoint
from model.runs.processes import Processes
from model.runs.saving import BackgroundSaver, check_finite
from model.runs.watchdog import FAREWELL_SECONDS
from model.storage.archive import recorded_digest, save_torch
from model.storage.part_names import part_name
from model.storage.parts import CONTENT, LIST
from model.storage.slices import Slice, describe
from model.training.sharding import InPieces, share_out

POLL_SECONDS = 0.05  # between two looks for the other ranks' reports
LOOK_SECONDS = 1.0  # between two looks whether the other ranks are alive
VISIBLE_SECONDS = 10.0  # that a shared file system may take to show a file that another machine has written


def split(state: Mapping, rank: int, ranks: int) -> tuple[dict, dict[Slice, Tensor]]:
    """Divide the tensors of a checkpoint among the ranks that write it.

    What every rank has is cut into equal ranges, what has two names once. Of what is in pieces, a rank writes those
    that it gives.

    Args:
        state: nested dicts of tensors and `InPieces`, alike on every rank but for what the pieces hold.

    Returns:
        the state with a description (`slices.describe`) in the place of each tensor, the same on every rank; and what
        this rank writes: views [elements].
    """
    keys: dict[object, str] = {}  # by what tells a tensor from others
    whole: dict[str, Tensor] = {}
    own: dict[Slice, Tensor] = {}

    def described(path: str, value):
        if isinstance(value, Tensor):
            place = value.data_ptr() or path  # on a device that tells no addresses, its own
            key = keys.setdefault((value.device, place, value.shape, value.stride(), value.dtype), path)
            if key == path:
                whole[key] = value
        elif isinstance(value, InPieces):
            key = keys.setdefault(id(value), path)
            if key == path:
                own.update({Slice(key, start, end): part for (start, end), part in value.given.items()})
        elif isinstance(value, Mapping):
            return {key: described(f"{path}/{key}" if path else str(key), inner) for key, inner in value.items()}
        else:
            return value
        return describe(key, value.shape, value.dtype)

    content = described("", state)
    for piece in share_out(whole, lambda name, tensor: True, ranks)[rank]:
        own[Slice(piece.name, piece.start, piece.end)] = piece.flat(whole[piece.name].detach())
    return content, own


class PartSaver:
    """Writes this rank's parts of checkpoints in a thread. Every rank has one.

    Args:
        out_dir: the run's folder, the same for all ranks.
        processes: the ranks, two at least.
        say: prints one line for the user.
    """

    def __init__(self, out_dir: Path, processes: Processes, say: Callable[[str], None]) -> None:
        self._out_dir, self._processes = out_dir, processes
        self._saver, self._saves = BackgroundSaver(say), 0
        self._store = processes.store_for_threads("parts")

    def save(
        self, state: Mapping, step: int, interrupted: bool, waiting: Callable[[], None]
    ) -> tuple[dict, "PartsBeingSaved"]:
        """Copy this rank's slices, for a thread to write them. Every rank must call it.

        Args:
            state: what is divided, see `split`.
            step: of the checkpoint.
            waiting: called every second while this rank waits for earlier saves.

        Returns:
            the state as described; and what rank 0 waits for.

        Raises:
            Exception: a fault of the thread in an earlier save. What its disk refuses, rank 0 reports.
        """
        rank, ranks = self._processes.rank, self._processes.world_size
        stem = step_checkpoint(self._out_dir, step).stem
        if interrupted:
            stem = self._processes.decided(lambda: interrupted_stem(self._out_dir, step))
        described, slices = split(state, rank, ranks)
        self._saves += 1
        keys = [f"{self._saves}/{writer}" for writer in range(ranks)]
        write = functools.partial(self._write, keys[rank], self._out_dir / part_name(stem, rank, ranks), [*slices])
        self._saver.submit("part", {CONTENT: [*slices.values()]}, write, waiting)
        return described, PartsBeingSaved(self._out_dir, keys, self._store, self._processes)

    def _write(self, key: str, path: Path, slices: list[Slice], content: Mapping) -> None:
        try:
            check_finite(content)
            sha256 = save_torch(path, content)
            report = {"name": path.name, "sha256": sha256, "bytes": path.stat().st_size, "slices": slices}
        except (OneLineError, OSError) as error:
            report = {"error": str(error), "diverged": isinstance(error, TrainingDiverged)}
        self._store.set(key, json.dumps(report))

    def check(self) -> None:
        """Raise a fault of the thread."""
        self._saver.check()

    def close(self) -> None:
        """End the thread, once it has written everything."""
        self._saver.close()


@dataclass(frozen=True)
class PartsBeingSaved:
    """The parts of one checkpoint, which the ranks write; rank 0 waits for them in a thread."""

    out_dir: Path
    keys: list[str]  # of the ranks' reports in the store, by rank
    store: object  # torch.distributed's
    processes: Processes

    def write_index(self, path: Path, content: Mapping) -> list[str]:
        """Wait for the parts and write the index; returns the parts' names.

        Args:
            content: with descriptions, as `split` returns it.

        Raises:
            InputError: a part or the index cannot be written, or a part is not in this rank's folder. The parts that
                were written are removed.
            TrainingDiverged: what a rank was to write is not finite.
            ProcessLost: a rank ended before it had written its part.
        """
        reports = self._wait_for_reports()
        parts = [report for report in reports if "error" not in report]
        try:
            for rank, report in enumerate(reports):
                if "error" in report:
                    kind = TrainingDiverged if report["diverged"] else InputError
                    raise kind(f"rank {rank}: {report['error']}")
                self._check_visible(rank, report)
            save_torch(path, {**content, "format_version": INDEX_VERSION, LIST: parts})
        except OneLineError:
            for part in parts:
                with contextlib.suppress(OSError):
                    (self.out_dir / part["name"]).unlink(missing_ok=True)
            raise
        return [part["name"] for part in parts]

    def _wait_for_reports(self) -> list[dict]:
        lost, give_up, next_look = None, math.inf, time.monotonic() + LOOK_SECONDS
        while not self.store.check(self.keys):
            time.sleep(POLL_SECONDS)
            if (now := time.monotonic()) > give_up:
                raise ProcessLost(lost)
            if lost is None and now > next_look:
                lost, next_look = self.processes.lost_one(), time.monotonic() + LOOK_SECONDS
                give_up = math.inf if lost is None else now + FAREWELL_SECONDS  # those that live may still be writing
        reports = [json.loads(self.store.get(key)) for key in self.keys]
        for key in self.keys:
            self.store.delete_key(key)
        return reports

    def _check_visible(self, rank: int, part: Mapping) -> None:
        path, end = self.out_dir / part["name"], time.monotonic() + VISIBLE_SECONDS
        while not _is_there(path, part):
            if time.monotonic() > end:
                raise InputError(
                    f"{path}: rank {rank} has written it, but rank 0 does not see it; give all ranks one out_dir on a"
                    " shared file system, or use --checkpoint_writers one"
                )
            time.sleep(POLL_SECONDS)


def _is_there(path: Path, part: Mapping) -> bool:
    """Whether a file is the part that was reported, as far as its size and the SHA-256 at its end tell."""
    try:
        return path.stat().st_size == part["bytes"] and recorded_digest(path) == part["sha256"]
    except OSError:
        return False
