"""What a run says once about how it learns: less than others did, or its text by heart."""

from collections.abc import Callable
from dataclasses import dataclass, field

from model.training.data import TrainingData
from model.training.optimizer import OPTIMIZERS
from model.training.plan import RunPlan
from model.training.progress import Progress
from model.training.recipe import automatic_learning_rate

JUDGED_AFTER = 0.25  # of a run's tokens: before, the warm-up and the first steps decide
FAR_FROM_AUTO = 2.5  # times the rate that auto gives, either way
RISEN = 1.02  # times the lowest validation loss: more than evaluations of a run that still learns differ


@dataclass
class Hints:
    """Says each hint at most once.

    Args:
        plan: of the run.
        data: that it learns from; chats may be learned by heart.
        say: prints one line for the user.
    """

    plan: RunPlan
    data: TrainingData
    say: Callable[[str], None]
    _said: set[str] = field(default_factory=set)

    def after_evaluation(self, progress: Progress, measured: dict) -> dict[str, float]:
        """What other runs had by now, for metrics.jsonl; says what there is to say.

        Args:
            progress: which has counted the evaluation.
            measured: as metrics.jsonl has it.
        """
        by_heart = None
        if not self.data.is_chat and "val_loss" in measured:
            by_heart = by_heart_line(self.plan, progress, measured["val_loss"])
        self._say_once("by heart", by_heart)
        if self.plan.outlook is None or "bits_per_byte" not in measured:
            return {}
        tokens = self.plan.order.count_targets(progress.samples, self.data.train)
        if by_heart is None:  # which would explain it
            self._say_once("behind", behind_line(self.plan, progress, tokens, measured["bits_per_byte"]))
        expected = self.plan.outlook.after(tokens)
        return {"expected_bits_low": round(expected.low, 4), "expected_bits_high": round(expected.high, 4)}

    def _say_once(self, name: str, line: str | None) -> None:
        if line is not None and name not in self._said:
            self._said.add(name)
            self.say(line)


def by_heart_line(plan: RunPlan, progress: Progress, val_loss: float) -> str | None:
    """Where the validation loss rises while texts are read again: a line that says so, and what helps.

    Args:
        val_loss: of the evaluation that `progress` has counted last.
    """
    passes = progress.samples / plan.order.per_epoch
    if passes <= 1 or val_loss <= RISEN * progress.best_val_loss:
        return None
    return (
        f"step {progress.step:,}: after {passes:.1f} passes over the text the validation loss rises"
        f" ({progress.best_val_loss:.4f} to {val_loss:.4f}): it is being learned by heart. Fewer epochs, more text or a"
        " smaller model help; best_model.pth has the best weights (docs/training.md)"
    )


def behind_line(plan: RunPlan, progress: Progress, tokens: int, bits: float) -> str | None:
    """Where a run has learned clearly less than others by then: a line that says so, and what usually causes it.

    Args:
        tokens: trained on so far.
        bits: per byte of held-out text.
    """
    if plan.outlook is None or tokens < JUDGED_AFTER * plan.outlook.total_tokens:
        return None
    expected = plan.outlook.after(tokens)
    if bits <= expected.high:
        return None
    t = plan.training
    causes = ["validation text of another kind", "text that is not clean"]
    if OPTIMIZERS[t.optimizer_type].base_rate is not None:
        rate = automatic_learning_rate(t.optimizer_type, plan.active_parameters, plan.tokens_per_step)
        if not rate / FAR_FROM_AUTO < t.learning_rate < rate * FAR_FROM_AUTO:
            causes.insert(0, f"the learning rate, {t.learning_rate:g} where auto gives {rate:g}")
    return (
        f"step {progress.step:,}: {bits:.2f} bits per byte, where {expected} are expected after as many tokens;"
        f" what usually causes it: {', or '.join(causes)} (docs/training.md)"
    )
