"""What a run records: metrics.jsonl, TensorBoard's event file, curves.png, and what trackers are sent. None of it can
end or change a run."""

import contextlib
import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from model.errors import command_line
from model.runs.event_file import EventEncoder, event_files, next_event_file, withdraw
from model.runs.metrics_file import AppendedFile, end_of_step, read_metrics
from model.runs.tracker_process import TrackerProcess, close_trackers
from model.runs.trackers import TRACKERS, kept_run_id
from model.storage.files import replacing

FIRST_DRAWING = 10.0  # seconds after a run's start; a shorter run draws once, at its end
DRAWING_SHARE = 0.05  # of a run's time, at most, for its picture


class MetricsLog:
    """Appends one JSON object per event to `metrics.jsonl`, from which other processes send it to trackers, and its
    scalars to TensorBoard's event file.

    Nothing here raises: what the system refuses is reported once, and kept until it can be written.

    Args:
        out_dir: the run's folder.
        step: that the run resumes from; later events are dropped, since they come again.
        say: prints one line for the user; called from other threads too.
        began: Unix time at which the run began; None: now.
    """

    def __init__(self, out_dir: Path, step: int, say: Callable[[str], None], began: float | None = None) -> None:
        self.path = out_dir / "metrics.jsonl"
        self.curves = out_dir / "curves.png"
        self._say = say
        self._lines = AppendedFile(self.path, lambda: end_of_step(self.path, step), say)
        self._lines.append()
        self._encoder = EventEncoder(time.time() if began is None else began)
        self._events = self._start_event_file(out_dir, step)
        self._trackers: list[TrackerProcess] = []
        self._stale = False  # whether the picture lacks the latest evaluation
        self._not_drawn = False  # whether the last drawing failed, and was reported
        self._next_drawing = time.monotonic() + FIRST_DRAWING
        self._can_draw = importlib.util.find_spec("matplotlib") is not None
        if not self._can_draw:
            say("curves.png is not drawn: matplotlib is not installed (pip install matplotlib)")

    def _start_event_file(self, out_dir: Path, step: int) -> AppendedFile:
        """This session's file for TensorBoard, which begins with what metrics.jsonl holds, and so replaces the files of
        earlier sessions."""
        earlier, logged = event_files(out_dir), []
        events = AppendedFile(next_event_file(out_dir), lambda: 0, self._say, unit="events")
        with contextlib.suppress(OSError):
            logged = [event for event in read_metrics(self.path) if event["step"] <= step]
        events.append(self._encoder.head(), *map(self._encoder.record, logged))
        if logged and events.path.exists():
            withdraw(earlier)
        return events

    def start_tracker(self, name: str, project: str, run_name: str | None, settings: dict, folder: Path) -> None:
        """Send the events to a tracker from now on: to a new run there or, if this run was resumed, to the same.

        Args:
            name: one of `TRACKERS`.
            project, run_name: there; without a name the tracker chooses one.
            settings: of the run, to be shown there.
            folder: the run's, in which the tracker keeps its files.
        """
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name has no origin
            install = command_line("pip", "install", TRACKERS[name].package)
            self._say(f"{name}: not installed ({install}); the run continues without it")
            return
        run_id = kept_run_id(folder, name, self._say)
        options = {"project": project, "name": run_name, "config": settings, "dir": str(folder), "id": run_id}
        try:
            self._trackers.append(TrackerProcess(name, self.path, options, self._say))
        except OSError as error:
            self._say(f"{name}: its process cannot be started ({error}); the run continues without it")

    def write(self, event: dict) -> None:
        """Append one event, which must hold `step`. A number that is not finite becomes null: JSON has none."""
        event = {key: value if math.isfinite(value) else None for key, value in event.items()}
        self._lines.append(json.dumps(event).encode() + b"\n")
        self._events.append(self._encoder.record(event))

    def update_curves(self) -> None:
        """Draw `curves.png` if DRAWING_SHARE of the time allows it; `close` draws what this left out."""
        self._stale = True
        if time.monotonic() >= self._next_drawing:
            self.draw_curves()

    def draw_curves(self) -> None:
        """Draw `curves.png` from all events so far."""
        self._stale = False
        if not self._can_draw:
            return
        began = time.monotonic()
        try:
            draw_curves(read_metrics(self.path), self.curves)
            self._not_drawn = False
        except Exception as error:  # the disk's, and whatever matplotlib makes of it
            if not self._not_drawn:
                self._say(f"curves.png is not drawn: {error}; training continues")
            self._not_drawn = True
        now = time.monotonic()
        self._next_drawing = now + (now - began) / DRAWING_SHARE

    def close(self, is_whole: bool = True) -> None:
        """Write what is pending, draw the last curves and end the trackers' runs.

        Waits for the trackers at most `tracker_process.CLOSE_SECONDS`.

        Args:
            is_whole: as for `close_trackers`.
        """
        self._lines.close()
        self._events.close()
        if self._stale:
            self.draw_curves()
        trackers, self._trackers = self._trackers, []
        close_trackers(trackers, is_whole)


def draw_curves(events: list[dict], path: Path) -> None:
    """Draw loss, bits per byte, learning rate and speed over the steps, which all panels count from 0, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(name: str) -> tuple[list, list]:
        points = [(event["step"], event[name]) for event in events if event.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without pyplot's global state
    (loss, bits), (rate, speed) = figure.subplots(2, 2, sharex=True)
    loss.plot(*series("loss"), label="training", linewidth=1)
    loss.plot(*series("val_loss"), label="validation", marker="o", markersize=3)
    loss.set(title="Loss (nats per token)")
    loss.legend()
    bits.plot(*series("bits_per_byte"), label="validation", marker="o", markersize=3, color="tab:orange")
    if (low := series("expected_bits_low"))[0]:
        high = series("expected_bits_high")[1]
        bits.fill_between(*low, high, color="tab:gray", alpha=0.2, linewidth=0, label="expected")
        bits.legend()
    if (texts := series("text_bits_per_byte"))[0]:
        bits.plot(*texts, label="texts mixed in", marker="o", markersize=3, color="tab:purple")
        bits.legend()
    bits.set(title="Validation, bits per byte")
    if (pairs := series("val_accuracy"))[0]:
        bits.plot(*pairs, label="chosen above rejected", marker="o", markersize=3, color="tab:orange")
        bits.set(title="Validation, share of pairs with the chosen answer above", ylim=(0, 1.05))
        loss.set(title="Loss (nats per pair)")
    rate.plot(*series("lr"), color="tab:green")
    rate.set(title="Learning rate")
    speed.plot(*series("tokens_per_second"), color="tab:red", linewidth=1)
    speed.set(title="Tokens per second")
    speed.set_ylim(0, 1.1 * max([1e-9, *series("tokens_per_second")[1]]))
    loss.set_xlim(0, 1.02 * max([1, *(event["step"] for event in events)]))
    for axes in (loss, bits, rate, speed):
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
