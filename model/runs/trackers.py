"""Trackers that show a run's metrics: one class each. They run in a process of their own, see `tracker_process`."""

import contextlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from model.errors import InputError, first_line
from model.storage.files import write_json

WANDB_RUN = "wandb_run.json"  # the id of the run in wandb, beside metrics.jsonl


class Wandb:
    """Weights & Biases, offline where there is no login or no network.

    Args:
        options: `project`, `name`, `config`, `dir` and `id`, as for wandb.init; the same id continues the same run.
        tell: shows one line to the user.

    Attributes:
        first_step: the first one that the tracker lacks.
    """

    library, flag = "wandb", "use_wandb"

    def __init__(self, options: dict, tell: Callable[[str], None]) -> None:
        import wandb

        quiet, why = wandb.Settings(init_timeout=20, console="off"), ""
        try:
            if "WANDB_MODE" not in os.environ:
                wandb.login(prompt=False)
            self._run = wandb.init(**options, resume="allow", settings=quiet)
        except Exception as error:  # whatever wandb raises
            why = f"{first_line(error).rstrip('. ')}; "
            self._run = wandb.init(**options, mode="offline", settings=quiet)
        self.first_step = getattr(self._run, "starting_step", 0)
        if why or getattr(self._run, "offline", False):
            kept = getattr(getattr(self._run, "settings", None), "sync_dir", None) or Path(options["dir"]) / "wandb"
            tell(f"use_wandb: {why}the run is kept offline; send it later with: wandb sync {kept}")
        elif getattr(self._run, "url", None):
            tell(f"use_wandb: {self._run.url}")

    def log(self, row: dict, step: int) -> None:
        """Send one step's numbers."""
        self._run.log(row, step=step)

    def finish(self, failed: bool) -> None:
        """Send the rest and end the run."""
        self._run.finish(exit_code=int(failed))

    @staticmethod
    def environment() -> dict[str, str]:
        """What tells wandb that it watches the training and not the process that it runs in."""
        return {"WANDB_PROGRAM": sys.argv[0], "WANDB_X_STATS_PID": str(os.getpid())}

    @staticmethod
    def unsent(folder: Path) -> str:
        """How to send what could not be sent in time."""
        runs = sorted((folder / "wandb").glob("*run-*"), key=lambda path: path.name.removeprefix("offline-"))
        return f"send what it leaves with: wandb sync {runs[-1]}" if runs else "it has not started a run yet"


TRACKERS = {Wandb.library: Wandb}


def wandb_run_id(path: Path, say: Callable[[str], None]) -> str:
    """The id in the file, or a new one, which is kept there for the run's next sessions."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", found := json.loads(path.read_bytes())["id"]):
            return found
    run_id = secrets.token_hex(4)  # a seeded generator would give every run the same
    try:
        write_json(path, {"id": run_id})
    except (InputError, OSError) as error:
        say(f"use_wandb: {error}; this run, when resumed, will be another one in wandb")
    return run_id
