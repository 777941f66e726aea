"""What a run writes down: metrics.jsonl, curves.png, and wandb if asked for."""

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from model.files import replacing


class MetricsLog:
    """Appends one JSON object an event to `metrics.jsonl`, and sends the same to wandb.

    Args:
        out_dir: the run's folder.
        step: where the run goes on; events after it were lost with a crash and are dropped, since they come again.
        say: prints one line for the user.
    """

    def __init__(self, out_dir: Path, step: int, say: Callable[[str], None]) -> None:
        self.path = out_dir / "metrics.jsonl"
        self.curves = out_dir / "curves.png"
        self._say = say
        self._wandb = None
        self._can_draw = importlib.util.find_spec("matplotlib") is not None
        if not self._can_draw:
            say("curves.png is not drawn: matplotlib is not installed (pip install matplotlib)")
        if self.path.exists():
            kept = [json.dumps(event) for event in read_metrics(self.path) if event["step"] <= step]
            with replacing(self.path) as file:
                file.write("".join(line + "\n" for line in kept).encode())

    def start_wandb(self, project: str, run_name: str | None, settings: dict, folder: Path) -> None:
        """Begin a wandb run; offline when there is no login or no network, so that training goes on either way."""
        if importlib.util.find_spec("wandb") is None:
            self._say("use_wandb: wandb is not installed (pip install wandb); the run goes on without it")
            return
        import wandb

        arguments = {"project": project, "name": run_name, "config": settings, "dir": str(folder)}
        quiet = wandb.Settings(init_timeout=20, console="off")
        try:
            if "WANDB_MODE" not in os.environ:
                wandb.login(prompt=False)
            self._wandb = wandb.init(**arguments, settings=quiet)
        except (wandb.errors.Error, OSError) as error:
            reason = str(error).splitlines()[0]
            self._say(f"use_wandb: {reason} The run is kept offline; send it later with: wandb sync")
            self._wandb = wandb.init(**arguments, mode="offline", settings=quiet)

    def write(self, event: dict) -> None:
        """Append one event; it must hold `step`. A number that is not finite, which JSON cannot hold, becomes null."""
        event = {key: value if math.isfinite(value) else None for key, value in event.items()}
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(event) + "\n")
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in event.items() if value is not None}, step=event["step"])

    def draw_curves(self) -> None:
        """Draw `curves.png` from all events so far."""
        if self._can_draw:
            draw_curves(read_metrics(self.path), self.curves)

    def close(self) -> None:
        """End the wandb run."""
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict]:
    """The events of a metrics.jsonl; a line that is none, such as a last one that a crash cut short, is left out."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and type(event.get("step")) is int and all(map(_is_number, event.values())):
            events.append(event)
    return events


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
