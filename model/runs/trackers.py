"""Trackers that show a run's metrics: one class each. Each runs in a separate process, see `tracker_process`.

A tracker begins with options: `project`, `name` (or None), `config`, `dir` (the run's folder) and `id`; the same id
continues the same run. It may raise whatever its library raises.
"""

import contextlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from model.errors import InputError, command_line, first_line
from model.storage.files import write_json


class Wandb:
    """Weights & Biases, offline where there is no login or no network.

    Attributes:
        first_step: the first one that the tracker lacks, as far as it knows.
        is_offline: whether the user has to send what it keeps.
        where: to find the run, for the user.
    """

    package = "wandb"

    def __init__(self, options: dict) -> None:
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
        self.is_offline = bool(why) or getattr(self._run, "offline", False)
        self.where = getattr(self._run, "url", None) or "begun"
        if self.is_offline:
            kept = getattr(getattr(self._run, "settings", None), "sync_dir", None) or Path(options["dir"]) / "wandb"
            self.where = f"{why}the run is kept offline; send it later with: {command_line('wandb', 'sync', kept)}"

    def log(self, row: dict, step: int) -> None:
        """Send one step's numbers."""
        self._run.log(row, step=step)

    def finish(self, failed: bool) -> None:
        """Send the rest and end the run."""
        self._run.finish(exit_code=int(failed))

    @staticmethod
    def environment(options: Mapping) -> dict[str, str]:
        """What tells wandb that it watches the training and not the process that it runs in."""
        return {"WANDB_PROGRAM": sys.argv[0], "WANDB_X_STATS_PID": str(os.getpid())}

    @staticmethod
    def unsent(options: Mapping) -> list | None:
        """The command that sends what could not be sent in time; None: there is nothing on the disk yet."""
        runs = sorted(Path(options["dir"], "wandb").glob("*run-*"), key=lambda run: run.name.removeprefix("offline-"))
        return ["wandb", "sync", runs[-1]] if runs else None


class SwanLab:
    """SwanLab, offline where there is no key or no network. It is sent the metrics and settings, and nothing about the
    machine, the console or the code."""

    package = "swanlab>=0.10,<0.11"

    def __init__(self, options: dict) -> None:
        import swanlab

        probes = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")
        quiet = {"interactive": False, "terminal": {"proxy_type": "none"}, "probe": dict.fromkeys(probes, False)}
        log_dir = str(Path(options["dir"]) / "swanlab")
        given = {name: options[name] for name in ("project", "name", "config", "id")}
        begin = {**given, "log_dir": log_dir, "resume": "allow", "settings": swanlab.Settings(**quiet)}
        why = ""
        try:
            self._run = swanlab.init(**begin)
        except Exception as error:  # whatever swanlab raises
            why = f"{first_line(error).rstrip('. ')}; "
            self._run = swanlab.init(**begin, mode="offline")
        self.first_step = 0  # it does not say
        self.is_offline = self._run.mode == "offline"
        self.where = self._run.url if self._run.mode == "online" else "begun"
        if self.is_offline:
            self.where = f"{why}the run is kept offline; send it later with: {command_line(*self.unsent(options))}"

    def log(self, row: dict, step: int) -> None:
        """Send one step's numbers."""
        self._run.log(_without_step(row), step=step)

    def finish(self, failed: bool) -> None:
        """Send the rest and end the run; never returns where the server falls silent."""
        self._run.finish(state="crashed" if failed else "success")

    @staticmethod
    def environment(options: Mapping) -> dict[str, str]:
        """Nothing: all is given by `init`."""
        return {}

    @staticmethod
    def unsent(options: Mapping) -> list | None:
        """The command that sends what could not be sent in time; without an id it would open another run."""
        runs = sorted(Path(options["dir"], "swanlab").glob("run-*"))
        return ["swanlab", "sync", runs[-1], "--id", options["id"]] if runs else None


class Trackio:
    """trackio, in a database in the run's folder; in a Space where TRACKIO_SPACE_ID names one. A run there is known by
    its name, which must not be another run's."""

    package = "trackio"

    def __init__(self, options: dict) -> None:
        import trackio

        name = "-".join(filter(None, (options["name"], options["id"])))
        hardware = {"auto_log_gpu": False, "auto_log_cpu": False}
        self._run = trackio.init(
            options["project"], name, config=options["config"], resume="allow", private=True, embed=False, **hardware
        )
        self.first_step, self.is_offline = getattr(self._run, "_next_step", 0), False
        show = command_line("trackio", "show", "--project", options["project"])
        self.where = f"run {name} in {os.environ['TRACKIO_DIR']}; with TRACKIO_DIR set to that, see it with: {show}"
        if elsewhere := [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]:
            self.where = f"run {name} where {elsewhere[0]} says"

    def log(self, row: dict, step: int) -> None:
        """Send one step's numbers."""
        self._run.log(_without_step(row), step=step)

    def finish(self, failed: bool) -> None:
        """Write the rest and end the run."""
        self._run.finish()

    @staticmethod
    def environment(options: Mapping) -> dict[str, str]:
        """Where the database lies; read when the library is imported."""
        return {"TRACKIO_DIR": os.environ.get("TRACKIO_DIR") or str(Path(options["dir"]) / "trackio")}

    @staticmethod
    def unsent(options: Mapping) -> list | None:
        """None: what is not in the database is in metrics.jsonl alone."""
        return None


def _without_step(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "step"}


TRACKERS = {"wandb": Wandb, "swanlab": SwanLab, "trackio": Trackio}
RUN_FILES = tuple(f"{name}_run.json" for name in TRACKERS)  # the id of the run there, and the last step that was sent


def send_later(options: Mapping) -> str:
    """How to send what is in metrics.jsonl alone: a run that is resumed sends what its trackers lack."""
    return f"send the rest with: {command_line('python', 'train.py', '--resume', '--out_dir', options['dir'])}"


def kept_run_id(folder: Path, name: str, say: Callable[[str], None]) -> str:
    """The run's id in a tracker: the user's, the one kept in the run's folder, or a new one, which is kept there for
    the run's next sessions."""
    if name == "wandb" and os.environ.get("WANDB_RUN_ID"):
        return os.environ["WANDB_RUN_ID"]
    path = folder / f"{name}_run.json"
    run_id = _read_run(path).get("id")
    if isinstance(run_id, str) and re.fullmatch(r"[0-9A-Za-z_-]{1,64}", run_id):
        return run_id
    run_id = secrets.token_hex(4)  # a seeded generator would give every run the same
    try:
        write_json(path, {"id": run_id})
    except (InputError, OSError) as error:
        say(f"{name}: {error}; this run, when resumed, will be another one there")
    return run_id


class SentSteps:
    """Keeps, beside the run's id, the last step that a tracker was sent: a resumed run sends what comes after it.

    Args:
        path: `{name}_run.json`; a file that cannot be written costs a resumed run repeated rows.
        run_id: of the run there; what the file says of another one does not count.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path, self._id = path, run_id
        kept = _read_run(path)
        last = kept.get("sent") if kept.get("id") == run_id else None
        self.last = last if type(last) is int else -1  # -1: none

    def keep(self, step: int) -> None:
        """Note that all steps up to this one were sent."""
        if step > self.last:
            self.last = step
            with contextlib.suppress(InputError, OSError):
                write_json(self._path, {"id": self._id, "sent": step})


def _read_run(path: Path) -> dict:
    """The file's object; empty where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(content := json.loads(path.read_bytes()), dict):
            return content
    return {}
