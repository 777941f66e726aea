"""Whether loss, gradient and weights can be trusted, judged before the optimizer takes a step and at each save."""

import math

import numpy as np
from torch import nn

WINDOW = 128  # losses that a leap is told by
MIN_WINDOW = 32  # fewer than these say too little
WEIGHTS_TOLERANCE = 1e-4  # by how much the norm of the weights may differ between processes, relatively


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


def weights_norm(model: nn.Module) -> float:
    """The Euclidean norm of all parameters."""
    return math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))


def difference_of_weights(norms: list[float]) -> str | None:
    """What is wrong where processes do not have the same weights any more: they exchange gradients, never weights.

    Processors of different kinds may round differently, hence the tolerance; a fault of memory is mostly larger.

    Args:
        norms: `weights_norm` of each rank.
    """
    for rank, norm in enumerate(norms):
        if math.isfinite(norms[0]) and not abs(norm - norms[0]) <= WEIGHTS_TOLERANCE * norms[0]:
            return (
                f"the weights of rank {rank} (norm {norm:g}) are not those of rank 0 ({norms[0]:g}): a fault of memory"
                " or hardware there? --resume from the last checkpoint"
            )
    return None
