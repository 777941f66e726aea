"""What a run records: metrics.jsonl, curves.png, and wandb if set. None of it can end or change a run."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from model.runs.metrics_file import append_lines, end_of_step, read_metrics
from model.runs.tracker_process import TrackerProcess
from model.runs.trackers import WANDB_RUN, wandb_run_id
from model.storage.files import replacing

FIRST_DRAWING = 10.0  # seconds after a run's start; a shorter run draws once, at its end
DRAWING_SHARE = 0.05  # of a run's time, at most, for its picture


class MetricsLog:
    """Appends one JSON object per event to `metrics.jsonl`, from which another process sends it to a tracker.

    Nothing here raises: what the system refuses is reported once, and lines are kept until they can be written.

    Args:
        out_dir: the run's folder.
        step: that the run resumes from; later events are dropped, since they come again.
        say: prints one line for the user; called from another thread too.
    """

    def __init__(self, out_dir: Path, step: int, say: Callable[[str], None]) -> None:
        self.path = out_dir / "metrics.jsonl"
        self.curves = out_dir / "curves.png"
        self._say = say
        self._step = step
        self._end: int | None = None  # bytes of the file that count; None: unknown yet
        self._pending: list[bytes] = []  # lines that are not in the file yet
        self._refused = self._not_drawn = False  # whether the last attempt failed, and was reported
        self._tracker: TrackerProcess | None = None
        self._stale = False  # whether the picture lacks the latest evaluation
        self._next_drawing = time.monotonic() + FIRST_DRAWING
        self._can_draw = importlib.util.find_spec("matplotlib") is not None
        if not self._can_draw:
            say("curves.png is not drawn: matplotlib is not installed (pip install matplotlib)")
        self._append_pending()

    def start_wandb(self, project: str, run_name: str | None, settings: dict, folder: Path) -> None:
        """Send the events to wandb from now on: to a new run there or, if this run was resumed, to the same."""
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a mere folder of that name has no origin
            self._say("use_wandb: wandb is not installed (pip install wandb); the run continues without it")
            return
        run_id = os.environ.get("WANDB_RUN_ID") or wandb_run_id(folder / WANDB_RUN, self._say)
        options = {"project": project, "name": run_name, "config": settings, "dir": str(folder), "id": run_id}
        try:
            self._tracker = TrackerProcess("wandb", self.path, options, folder, self._say)
        except OSError as error:
            self._say(f"use_wandb: its process cannot be started ({error}); the run continues without it")

    def write(self, event: dict) -> None:
        """Append one event, which must hold `step`. A number that is not finite becomes null: JSON has none."""
        event = {key: value if math.isfinite(value) else None for key, value in event.items()}
        self._pending.append(json.dumps(event).encode() + b"\n")
        self._append_pending()

    def _append_pending(self) -> None:
        """Write all pending lines, or none of them if the system refuses one."""
        try:
            if self._end is None:
                self._end = end_of_step(self.path, self._step)
            if self._pending or self.path.exists():
                self._end = append_lines(self.path, self._end, b"".join(self._pending))
        except OSError as error:
            if not self._refused:
                reason = error.strerror or str(error)
                self._say(
                    f"{self.path}: cannot be written ({reason}); training continues, and its lines are kept for later"
                )
            self._refused = True
            return
        if self._refused:
            self._say(f"{self.path}: can be written again; the {len(self._pending)} lines kept so far are in it")
        self._refused = False
        self._pending.clear()

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

    def close(self) -> None:
        """Write the pending lines, draw the last curves and end the tracker's run.

        Waits for the tracker at most `tracker_process.CLOSE_SECONDS`.
        """
        if self._pending:
            self._append_pending()
        if self._pending:
            self._say(f"{self.path}: still cannot be written; its last {len(self._pending)} lines are lost")
        if self._stale:
            self.draw_curves()
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close()


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
