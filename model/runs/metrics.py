"""What a run writes down: metrics.jsonl, curves.png, and wandb if asked for. None of it can end or change a run."""

import contextlib
import importlib.util
import json
import math
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from model.children import OWN_GROUP
from model.errors import InputError
from model.storage.files import replacing, write_json

WANDB_RUN = "wandb_run.json"  # the id of the run in wandb, beside metrics.jsonl
CLOSE_SECONDS = 3.0  # that the end of a training waits for wandb


class MetricsLog:
    """Appends one JSON object an event to `metrics.jsonl`, from which another process sends it to wandb.

    Nothing here raises: what the system refuses is told once, and lines are kept until they can be written.

    Args:
        out_dir: the run's folder.
        step: where the run goes on; events after it were lost with a crash and are dropped, since they come again.
        say: prints one line for the user; called from another thread too.
    """

    def __init__(self, out_dir: Path, step: int, say: Callable[[str], None]) -> None:
        self.path = out_dir / "metrics.jsonl"
        self.curves = out_dir / "curves.png"
        self._say = say
        self._step = step
        self._end: int | None = None  # bytes of the file that count; None: not known yet
        self._pending: list[bytes] = []  # lines that are not in the file yet
        self._refused = self._not_drawn = False  # whether the last attempt failed, which was told then
        self._wandb: WandbProcess | None = None
        self._can_draw = importlib.util.find_spec("matplotlib") is not None
        if not self._can_draw:
            say("curves.png is not drawn: matplotlib is not installed (pip install matplotlib)")
        self._append_pending()

    def start_wandb(self, project: str, run_name: str | None, settings: dict, folder: Path) -> None:
        """Send the events to wandb from now on: to a new run there or, where this run was resumed, to the same."""
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a mere folder of that name has no origin
            self._say("use_wandb: wandb is not installed (pip install wandb); the run goes on without it")
            return
        run_id = os.environ.get("WANDB_RUN_ID") or _wandb_run_id(folder / WANDB_RUN, self._say)
        arguments = {"project": project, "name": run_name, "config": settings, "dir": str(folder), "id": run_id}
        try:
            self._wandb = WandbProcess({"metrics": str(self.path), "arguments": arguments}, self._say)
        except OSError as error:
            self._say(f"use_wandb: its process cannot be started ({error}); the run goes on without it")

    def write(self, event: dict) -> None:
        """Append one event; it must hold `step`. A number that is not finite, which JSON cannot hold, becomes null."""
        event = {key: value if math.isfinite(value) else None for key, value in event.items()}
        self._pending.append(json.dumps(event).encode() + b"\n")
        self._append_pending()

    def _append_pending(self) -> None:
        """Write all lines that are due, or none of them where the system refuses one."""
        try:
            if self._end is None:
                self._end = _end_of_step(self.path, self._step)
            if self._pending or self.path.exists():
                self._end = _append(self.path, self._end, b"".join(self._pending))
        except OSError as error:
            if not self._refused:
                reason = error.strerror or str(error)
                self._say(
                    f"{self.path}: cannot be written ({reason}); training goes on, and its lines are kept for later"
                )
            self._refused = True
            return
        if self._refused:
            self._say(f"{self.path}: can be written again; the {len(self._pending)} lines kept so far are in it")
        self._refused = False
        self._pending.clear()

    def draw_curves(self) -> None:
        """Draw `curves.png` from all events so far."""
        if not self._can_draw:
            return
        try:
            draw_curves(read_metrics(self.path), self.curves)
            self._not_drawn = False
        except Exception as error:  # the disk's, and whatever matplotlib makes of it
            if not self._not_drawn:
                self._say(f"curves.png is not drawn: {error}; training goes on")
            self._not_drawn = True

    def close(self) -> None:
        """End the wandb run, for which this waits at most `CLOSE_SECONDS`."""
        if self._pending:
            self._append_pending()
        if self._pending:
            self._say(f"{self.path}: still cannot be written; its last {len(self._pending)} lines are lost")
        wandb, self._wandb = self._wandb, None
        if wandb is not None:
            wandb.close()


class WandbProcess:
    """Another Python process, in which `model/runs/wandb_sender.py` follows metrics.jsonl.

    Why not a thread: wandb, in the same process, shares the global random generators, adds hooks to the exit that may
    wait for the network, and takes down what it runs in when it crashes.

    Args:
        order: what `wandb_sender.send` needs.
        say: prints one line for the user.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, order: dict, say: Callable[[str], None]) -> None:
        self._say, self._left = say, False
        self._folder = Path(order["arguments"]["dir"]) / "wandb"
        code = f"import sys; sys.path[:] = {sys.path!r}; from model.runs.wandb_sender import main; main()"
        about_us = {"WANDB_PROGRAM": sys.argv[0], "WANDB_X_STATS_PID": str(os.getpid())}
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | about_us, stdin=pipe, stdout=pipe, stderr=nowhere, bufsize=0, **OWN_GROUP,
        )  # fmt: skip
        self._tell(json.dumps(order, default=str))
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a process that has ended; `_pass_on` says so
            self._process.stdin.write(line.encode() + b"\n")

    def _pass_on(self) -> None:
        """Show the lines of the process to the user, and its end if it says nothing about that."""
        for line in self._process.stdout:
            if not self._left:
                self._say(line.decode(errors="replace").rstrip())
        if (code := self._process.wait()) and not self._left:
            self._say(f"use_wandb: its process ended with code {code}; the run goes on without wandb")

    def close(self) -> None:
        """Wait until all is sent, at most `CLOSE_SECONDS`; a process that needs longer is left to end by itself."""
        self._tell("finish")
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._reader.join(CLOSE_SECONDS)
        self._left = True
        if self._reader.is_alive():
            runs = sorted(self._folder.glob("*run-*"), key=lambda path: path.name.removeprefix("offline-"))
            rest = f"send what it leaves with: wandb sync {runs[-1]}" if runs else "so far it has not begun a run"
            self._say(
                f"use_wandb: not finished after {CLOSE_SECONDS:g} s; it gets half a minute more by itself; {rest}"
            )


def _wandb_run_id(path: Path, say: Callable[[str], None]) -> str:
    """The id that the file holds, or a new one, which is then kept there for the run's next sessions."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", found := json.loads(path.read_bytes())["id"]):
            return found
    run_id = secrets.token_hex(4)  # not from a seeded generator, which would give every run the same
    try:
        write_json(path, {"id": run_id})
    except (InputError, OSError) as error:
        say(f"use_wandb: {error}; this run, when resumed, will be another one in wandb")
    return run_id


def _end_of_step(path: Path, step: int) -> int:
    """How many bytes of a metrics.jsonl hold events up to `step`; 0 where there is no file."""
    end = position = 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            position += len(line)
            event = parse_event(line)
            if event is not None and event["step"] > step:
                break
            if event is not None and line.endswith(b"\n"):  # half a line, or the zeros after a power cut, are no event
                end = position
    return end


def _append(path: Path, end: int, lines: bytes) -> int:
    """Append to a file of which `end` bytes count, dropping what is behind them; returns how many count now.

    Raises:
        OSError: the system refuses it; nothing half-written stays.
    """
    with open(path, "ab", buffering=0) as file:  # without a buffer, which would write its rest at closing
        size = file.tell()
        if size > end:
            file.truncate(end)
        end = min(size, end)
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    return end + len(lines)


def parse_event(line: bytes) -> dict | None:
    """The event in a line of metrics.jsonl; None where it is none, such as a last line that a crash cut short."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and type(event.get("step")) is int and all(map(_is_number, event.values()))
    return event if is_event else None


def read_metrics(path: Path) -> list[dict]:
    """The events of a metrics.jsonl."""
    return [event for line in path.read_bytes().split(b"\n") if (event := parse_event(line)) is not None]


def _is_number(value) -> bool:
    return value is None or type(value) in (int, float)


def draw_curves(events: list[dict], path: Path) -> None:
    """Draw loss, bits per byte, learning rate and speed over the steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(name: str) -> tuple[list, list]:
        points = [(event["step"], event[name]) for event in events if event.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without pyplot's global state
    (loss, bits), (rate, speed) = figure.subplots(2, 2)
    loss.plot(*series("loss"), label="training", linewidth=1)
    loss.plot(*series("val_loss"), label="validation", marker="o", markersize=3)
    loss.set(title="Loss (nats a token)")
    loss.legend()
    bits.plot(*series("bits_per_byte"), marker="o", markersize=3, color="tab:orange")
    bits.set(title="Validation, bits per byte")
    rate.plot(*series("lr"), color="tab:green")
    rate.set(title="Learning rate")
    speed.plot(*series("tokens_per_second"), color="tab:red", linewidth=1)
    speed.set(title="Tokens per second")
    speed.set_ylim(bottom=0)
    for axes in (loss, bits, rate, speed):
        axes.grid(alpha=0.3)
        axes.set_xlabel("step")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
