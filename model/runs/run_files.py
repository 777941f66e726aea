"""What a run writes into its folder while it trains, by rank 0: checkpoints, weights, metrics, and how it stands."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from model.errors import OneLineError
from model.runs.folder import INTERRUPTED, begin_run, prune_checkpoints, step_checkpoint
from model.runs.metrics import MetricsLog
from model.runs.saving import BackgroundSaver
from model.runs.status import Status
from model.storage.archive import save_torch
from model.weights import Weights, save_weights

STATUS_SECONDS = 20  # between two writings of status.json, while nothing else happens


class RunFiles:
    """Claims the run's folder, sets aside what another run or line left in it, and writes this run's files.

    Args:
        out_dir: the folder.
        resumed_from: the checkpoint that the run goes on from; None where it starts from the beginning.
        step: the step that it goes on from.
        keep_last: step checkpoints to keep.
        status: of this run.
        say: prints one line for the user.
        waiting: called every second while training waits for saves.

    Raises:
        InputError: the folder cannot be written, or another process trains into it.
    """

    def __init__(
        self,
        out_dir: Path,
        resumed_from: Path | None,
        step: int,
        keep_last: int,
        status: Status,
        say: Callable[[str], None],
        waiting: Callable[[], None],
    ) -> None:
        self._waiting = waiting
        self.out_dir, self.keep_last, self._say = out_dir, keep_last, say
        self._lock, self.started = begin_run(out_dir, resumed_from, step, say)  # started: None where the run goes on
        self.metrics = MetricsLog(out_dir, step, say)
        self._saver = BackgroundSaver(say)
        self._status, self._told = status, 0.0
        self._saved = resumed_from.name if resumed_from else None  # the newest checkpoint that is on the disk
        self.tell("running", step)

    def save_checkpoint(self, content: dict, interrupted: bool = False) -> None:
        """Copy a checkpoint's content, for a thread to write it, read it back and then remove older ones.

        Raises:
            InputError, TrainingDiverged: of an earlier save; see `BackgroundSaver`.
        """
        step = content["progress"]["step"]
        path = self.out_dir / INTERRUPTED if interrupted else step_checkpoint(self.out_dir, step)

        def write(copied: dict) -> None:
            save_torch(path, copied)
            if not interrupted:
                prune_checkpoints(self.out_dir, self.keep_last, step)
            self._saved = path.name
            self._say(f"saved {path}")

        self._saver.submit("checkpoint", content, write, self._waiting)

    def save_weights(self, name: str, weights: Weights) -> None:
        """Copy weights, for a thread to write them and the JSON beside them.

        Raises:
            InputError, TrainingDiverged: of an earlier save; see `BackgroundSaver`.
        """
        path = self.out_dir / name

        def write(copied: dict) -> None:
            save_weights(path, weights.with_state(copied))

        self._saver.submit(name, weights.state_dict, write, self._waiting)

    def wait(self) -> None:
        """Wait until all is on the disk.

        Raises:
            InputError, TrainingDiverged: the last save failed.
        """
        self._saver.wait(self._waiting)

    def check(self, step: int) -> None:
        """Between two steps: raise what became of earlier saves, and keep status.json fresh.

        Raises:
            InputError, TrainingDiverged: as `BackgroundSaver.check`.
        """
        self._saver.check()
        if self._status.checkpoint != self._saved or time.monotonic() - self._told > STATUS_SECONDS:
            self.tell("running", step)

    def tell(self, state: str, step: int, exit_code: int | None = None, message: str | None = None) -> None:
        """Write status.json."""
        self._told = time.monotonic()
        self._status.write(state, step, self._saved, exit_code, message)

    def close(self) -> None:
        """Finish what is being written, and leave the folder to others."""
        self.metrics.close()
        with contextlib.suppress(OneLineError):  # it was told
            self._saver.wait()
        self._lock.release()
