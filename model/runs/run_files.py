"""What rank 0 writes into a run's folder while it trains: checkpoints, weights, metrics, and the status."""

import contextlib
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model import accelerator
from model.errors import OneLineError, counted
from model.runs.copying import CHECKPOINT, CLOSE_SECONDS, FINISH_SECONDS, Copier, check_copy_folder
from model.runs.folder import (
    BEST,
    INTERRUPTED,
    begin_run,
    check_space,
    claim,
    is_within,
    prune_checkpoints,
    remove_stray_parts,
    step_checkpoint,
    unix_time,
    write_config,
)
from model.runs.metrics import MetricsLog
from model.runs.part_saving import PartsBeingSaved
from model.runs.saving import BackgroundSaver, check_finite
from model.runs.status import Status
from model.storage.archive import save_torch
from model.training.choices import FoundCheckpoint
from model.training.plan import RunPlan
from model.training.settings import Settings
from model.weights import Weights, save_weights

STATUS_SECONDS = 20  # between two writings of status.json, while nothing else happens


def device_name(device: torch.device) -> str:
    """What people call a device: "NVIDIA H200", "CPU (x86_64), 8 threads"."""
    if device.type == "cpu":
        return f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"
    return accelerator.name(device)


class RunFiles:
    """Claims the run's folder, checks its space, sets aside what another run left in it, and writes this run's files.

    Args:
        settings: as the user gave them.
        plan: of this run.
        resumed: the checkpoint that the run resumes from; None: it starts from the beginning.
        say: prints one line for the user.
        waiting: called every second while training waits for saves.

    Raises:
        InputError: the folder cannot be written or has no room, or another process trains into it; or copy_to is no
            folder for copies.
    """

    def __init__(
        self,
        settings: Settings,
        plan: RunPlan,
        resumed: FoundCheckpoint | None,
        say: Callable[[str], None],
        waiting: Callable[[], None],
    ) -> None:
        self.out_dir = Path(settings.training.out_dir)
        self._keep_last, self._say, self._waiting = plan.training.keep_last, say, waiting
        same_folder = resumed is not None and resumed.path.resolve().parent == self.out_dir.resolve()
        check_space(self.out_dir, plan.space, resumes=same_folder)
        if settings.training.copy_to is not None:
            check_copy_folder(Path(settings.training.copy_to))
        self._lock = claim(self.out_dir)
        try:
            self._begin(settings, plan, resumed)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, settings: Settings, plan: RunPlan, resumed: FoundCheckpoint | None) -> None:
        path = resumed.path if resumed is not None else None
        copy_to = settings.training.copy_to
        had_best = path is not None and (path.parent / BEST).exists()
        new_run, moved = begin_run(self.out_dir, path, plan.steps_done, copy_to, self._say)
        self.left_best = had_best and not (self.out_dir / BEST).exists()  # the best weights were another line's
        source = settings.training.init_from
        is_moved = moved is not None and source is not None and is_within(source, self.out_dir)
        if is_moved and (place := moved / Path(source).name).is_file():
            # It was read before it was moved. Its new place is recorded, for a restart before the first checkpoint.
            settings.training.init_from = plan.training.init_from = str(place)
            self._say(f"init_from: {source} is now {settings.training.init_from}")
        self.started = new_run or resumed.content["started"]  # when the run started
        device = device_name(plan.hardware.device)
        self._status, self._told = Status(self.out_dir, plan.world_size, plan.total_steps, device), 0.0
        self.metrics = MetricsLog(self.out_dir, plan.steps_done, self._say, unix_time(self.started))
        self._saver = BackgroundSaver(self._say)
        self._saved = path.name if path is not None else None  # the newest checkpoint on the disk
        self.tell("running", plan.steps_done)
        write_config(self.out_dir, self.started, plan.resolved(settings))
        self._copier: Copier | None = None
        if copy_to is not None:
            self._copier = Copier(self.out_dir, Path(copy_to), self.started, plan.steps_done, self._say)

    def start_trackers(self, settings: Settings) -> None:
        """Send the metrics to the trackers that are set."""
        log = settings.logging
        for name in log.trackers:
            self.metrics.start_tracker(name, log.wandb_project, log.wandb_run_name, settings.as_dict(), self.out_dir)

    def save_checkpoint(self, content: dict, parts: PartsBeingSaved | None = None, interrupted: bool = False) -> None:
        """Copy a checkpoint's content, for a thread to write it, read it back and then remove older ones.

        Args:
            parts: that the ranks write; None: all of it is in `content`.

        Raises:
            InputError, ProcessLost, TrainingDiverged: of an earlier save; see `BackgroundSaver`.
        """
        step = content["progress"]["step"]
        path = self.out_dir / INTERRUPTED if interrupted else step_checkpoint(self.out_dir, step)

        def write(copied: dict) -> None:
            check_finite(copied)
            names = []
            if parts is None:
                save_torch(path, copied)
            else:
                names = parts.write_index(path, copied)
            if self._copier is not None:
                self._copier.offer(CHECKPOINT, *names, path.name)
            if interrupted:
                remove_stray_parts(self.out_dir)  # of the interrupted checkpoint that this one replaces
            else:
                prune_checkpoints(self.out_dir, self._keep_last, step)
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
            check_finite(copied)
            save_weights(path, weights.with_state(copied))
            if self._copier is not None:
                self._copier.offer(name, path.with_suffix(".json").name, name)

        self._saver.submit(name, weights.state_dict, write, self._waiting)

    def save_final(self, name: str, weights: Weights, best_loss: float) -> None:
        """Write the final weights and, where there are no best ones, these as the best; returns once they are written.

        Args:
            best_loss: the best validation loss; infinite where nothing was evaluated.

        Raises:
            InputError, TrainingDiverged: a save failed.
        """
        self.save_weights(name, weights)
        self.wait()
        if not (self.out_dir / BEST).exists():
            self.save_weights(BEST, weights)
            lost = f"those of loss {best_loss:.4f} are missing" if math.isfinite(best_loss) else "nothing was evaluated"
            self._say(f"{BEST}: the final weights, since {lost}")
            self.wait()
        self._say(f"saved {self.out_dir / name}")

    def wait(self) -> None:
        """Wait until all is on the disk.

        Raises:
            InputError, TrainingDiverged: the last save failed.
        """
        self._saver.wait(self._waiting)

    def check(self, step: int) -> None:
        """Between two steps: raise the errors of earlier saves, and keep status.json fresh.

        Raises:
            InputError, TrainingDiverged: as `BackgroundSaver.check`.
        """
        self._saver.check()
        if self._status.checkpoint != self._saved or time.monotonic() - self._told > STATUS_SECONDS:
            self.tell("running", step)

    def seconds_to_save(self) -> float:
        """What the end of a session needs, judged by its longest save and copy so far."""
        copying = 0.0 if self._copier is None else min(self._copier.longest, FINISH_SECONDS)
        return self._saver.longest + copying

    def finish_copies(self) -> None:
        """Wait, for a limited time, until what was saved is copied to copy_to, and say what is not."""
        if self._copier is not None:
            self._copier.finish(self._waiting)

    def tell(self, state: str, step: int, exit_code: int | None = None, message: str | None = None) -> None:
        """Write status.json."""
        self._state, self._told = state, time.monotonic()
        self._status.write(state, step, self._saved, exit_code, message)

    def close(self) -> None:
        """Finish the writes under way, and release the folder."""
        self.metrics.close(is_whole=self._state not in ("interrupted", "time_limit"))
        with contextlib.suppress(OneLineError):  # it was reported
            self._saver.wait()
        self._saver.close()
        if self._copier is not None:  # nothing is left to copy unless the run failed
            self._copier.finish(seconds=CLOSE_SECONDS)
        self._lock.release()
