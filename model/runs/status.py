"""`out/status.json`: the state of a run, for whoever restarts it: the supervisor, a job script, a person.

Exit codes get lost: torchrun has its own, and a killed process has none. This file says the same in one place. A run
that was killed stays "running".
"""

import contextlib
import datetime
import json
import os
from pathlib import Path

from model.errors import InputError, TrainingDiverged, one_line
from model.storage.files import write_json

STATUS_FILE = "status.json"
STATES = ("running", "finished", "early_stopping", "time_limit", "interrupted", "diverged", "failed")
MAX_STATUS_BYTES = 1_000_000
MOST_OF_REASON = 1000  # characters of the message


class Status:
    """Writes the status of one run.

    Args:
        out_dir: the run's folder.
        world_size: processes that train together.
        total_steps: optimizer steps of the whole run.
        device: what rank 0 computes on, for people.
    """

    def __init__(self, out_dir: Path, world_size: int, total_steps: int, device: str | None = None) -> None:
        self.path = Path(out_dir) / STATUS_FILE
        self.world_size, self.total_steps, self.device = world_size, total_steps, device
        self.checkpoint: str | None = None  # name of the newest saved checkpoint
        self.problem: str | None = None  # why the last write failed, if it did

    def write(
        self,
        state: str,
        step: int,
        checkpoint: str | None = None,
        exit_code: int | None = None,
        message: str | None = None,
    ) -> None:
        """Replace the file atomically. Never raises: if it cannot be written, `problem` says why.

        Args:
            state: one of STATES.
            step: optimizer steps taken.
            checkpoint: name of the newest saved checkpoint; None: the same as before.
            exit_code: None while the run continues.
            message: what a person should know, such as why the run failed.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r} found, one of {', '.join(STATES)} expected")
        self.checkpoint = checkpoint or self.checkpoint
        content = {
            "state": state,
            "step": step,
            "total_steps": self.total_steps,
            "checkpoint": self.checkpoint,
            "exit_code": exit_code,
            "message": None if message is None else one_line(message)[:MOST_OF_REASON],
            "world_size": self.world_size,
            "device": self.device,
            "pid": os.getpid(),
            "updated": datetime.datetime.now().isoformat(timespec="seconds"),
        }
        try:
            write_json(self.path, content)
            self.problem = None
        except (InputError, OSError) as error:
            self.problem = str(error)
            if exit_code is not None:  # the last word: a full disk has no room for a second file
                with contextlib.suppress(OSError):
                    self.path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def outcome_of(error: BaseException) -> tuple[str, int, str]:
    """What a run that `error` ends has come to: state, exit code, and message."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130, "stopped at once, without saving; the steps after the last checkpoint are lost"
    state = "diverged" if isinstance(error, TrainingDiverged) else "failed"
    return state, getattr(error, "exit_code", 1), str(error) or type(error).__name__


def read_status(out_dir: Path) -> dict | None:
    """The status of the run in a folder; None if there is none, or it is damaged."""
    path = Path(out_dir) / STATUS_FILE
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(MAX_STATUS_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: not UTF-8, not JSON
        return None
    return content if isinstance(content, dict) and content.get("state") in STATES else None
