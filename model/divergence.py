"""Whether a step's loss and gradient can be trusted, judged before the optimizer takes the step."""

import math

import numpy as np

WINDOW = 128  # losses that a leap is told by
MIN_WINDOW = 32  # fewer than these say too little


def fault_of_step(loss: float, grad_is_finite: bool, recent: list[float], spike_threshold: float) -> str | None:
    """Why a step must not be taken; None where nothing speaks against it.

    As OLMo's SkipStepOptimizer (OLMo 2, 2024) a leap is told by its distance from the mean of the last losses in
    standard deviations; only the loss is judged so, since gradients are clipped.

    Args:
        loss: of all processes' batches, nats a token.
        grad_is_finite: whether the norm of the gradient is, on every process.
        recent: losses of the last steps, `remember`ed.
        spike_threshold: standard deviations; 0: leaps are not looked for.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not grad_is_finite:
        return "the gradient is not finite"
    if spike_threshold and len(recent) >= MIN_WINDOW:
        mean, deviation = np.mean(recent), np.std(recent)
        if deviation and loss > mean + spike_threshold * deviation:
            return f"the loss leapt to {loss:.3f}, {(loss - mean) / deviation:.0f} deviations above {mean:.3f}"
    return None


def remember(recent: list[float], loss: float) -> None:
    """Add the loss of a step that was taken."""
    recent.append(loss)
    del recent[:-WINDOW]
