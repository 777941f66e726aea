"""Where a run is: what each step did, and what all of them add up to. Checkpoints hold it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from model.training.divergence import remember


@dataclass(frozen=True)
class StepResult:
    """What one step of the optimizer did; the same on all ranks, except a `grad_norm` that is not finite."""

    samples: int  # read by all ranks
    read: int  # tokens of them
    terms: int  # of the loss: predicted tokens, or pairs
    loss: float  # mean of the terms: nats per token
    measured: Mapping[str, float]  # what the objective measures beside the loss
    grad_norm: float  # before clipping
    lr: float
    fault: str | None  # why the weights were not updated; None: they were
    overflow: bool  # the fault is a float16 overflow, which a smaller loss scale cures
    stop_asked: bool  # on any rank, by a signal


@dataclass
class Progress:
    """Where a run is. Everything else about its position follows from it."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # samples read by all processes, over all epochs: the position in the data
    best_val_loss: float = math.inf
    evaluations_without_gain: int = 0
    last_evaluation: int = -1  # step of the last finished evaluation
    skipped_steps: int = 0  # steps whose loss or gradient could not be used
    skipped_in_a_row: int = 0  # those since the last step taken, without float16's overflows
    overflows_in_a_row: int = 0  # float16's overflows since the last step taken
    recent_losses: list[float] = field(default_factory=list)  # nats per token, to detect a spike
    window_loss: float = 0.0  # summed over the terms since the last log line
    window_tokens: int = 0  # these terms
    seconds: float = 0.0  # spent training, over all sessions

    def count_step(self, result: StepResult) -> None:
        """Count a step. A skipped one uses up its samples but does not advance `step`."""
        self.samples += result.samples
        if result.fault is not None:
            self.skipped_steps += 1
            self.overflows_in_a_row += int(result.overflow)
            self.skipped_in_a_row += int(not result.overflow)
            return
        self.step += 1
        self.skipped_in_a_row = self.overflows_in_a_row = 0
        remember(self.recent_losses, result.loss)
        self.window_loss += result.loss * result.terms
        self.window_tokens += result.terms

    def take_loss(self) -> float:
        """The mean loss since the last call; the next call starts here."""
        loss = self.window_loss / self.window_tokens
        self.window_loss, self.window_tokens = 0.0, 0
        return loss

    def count_evaluation(self, val_loss: float) -> bool:
        """Count an evaluation at this step; returns whether its loss is the lowest so far."""
        is_best = val_loss < self.best_val_loss
        self.last_evaluation = self.step
        self.best_val_loss = min(val_loss, self.best_val_loss)
        self.evaluations_without_gain = 0 if is_best else self.evaluations_without_gain + 1
        return is_best

    def forget_evaluations(self) -> None:
        """As if nothing had been evaluated: the validation data are others now, or the best weights are gone."""
        self.best_val_loss, self.evaluations_without_gain, self.last_evaluation = math.inf, 0, -1
