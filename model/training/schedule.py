"""The learning rate as a function of the step: a linear rise, then a fall of a shape that `SHAPES` holds.

A new shape is one function and one entry there: settings, flags and documentation take its name from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from model.errors import InputError

DECAY_SHARE = 0.5  # of a run's steps after the warm-up: "wsd" stays at the highest rate before them


def cosine(progress: float) -> float:
    """Loshchilov & Hutter, 2017."""
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float) -> float:
    """A straight line."""
    return 1 - progress


def polynomial(progress: float) -> float:
    """A parabola that ends level."""
    return (1 - progress) ** 2


def wsd(progress: float) -> float:
    """Warm-up, stable, decay: the highest rate, then a straight line (Hu et al., 2024)."""
    return min(1.0, (1 - progress) / DECAY_SHARE)


# From 0, the end of the warm-up, to 1, the last step: the share of the fall that is left, 1 to 0.
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "polynomial": polynomial,
    "wsd": wsd,
}


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step of a run."""

    total_steps: int
    warmup_steps: int
    learning_rate: float  # after the rise
    min_lr: float  # of the last step
    lr_scheduler: str  # the shape of the fall, one of SHAPES

    def at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        falling = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / falling)
        remaining = SHAPES[self.lr_scheduler](progress)
        return self.min_lr + (self.learning_rate - self.min_lr) * remaining


class ScheduleSettings(Protocol):
    """The training settings that decide on the schedule, with every auto resolved."""

    learning_rate: float
    min_lr: float | None
    warmup_steps: int | Literal["auto"] | None
    lr_scheduler: str


def plan_schedule(training: ScheduleSettings, total_steps: int) -> Schedule:
    """The schedule that the settings ask for, with what they leave open: see `warmup_steps` and `min_lr` there.

    Raises:
        InputError: the warm-up is as long as the run.
    """
    warmup_steps = training.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(1000, total_steps // 50)
    elif warmup_steps >= total_steps:
        raise InputError(
            f"warmup_steps: {warmup_steps} leaves none of the {total_steps} steps of this run; give a smaller one"
        )
    min_lr = training.learning_rate / 10 if training.min_lr is None else training.min_lr
    return Schedule(total_steps, warmup_steps, training.learning_rate, min_lr, training.lr_scheduler)
