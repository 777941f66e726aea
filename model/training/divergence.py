"""Whether loss, gradient and weights can be trusted, judged before the optimizer takes a step and at each save."""

import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

WINDOW = 128  # recent losses that a new one is compared with
MIN_WINDOW = 32  # fewer say too little
MAX_OVERFLOWS = 50  # float16 overflows in a row before a run ends: each halves the loss scale
WEIGHTS_TOLERANCE = 1e-4  # largest relative difference between the processes' norms of the weights


def fault_of_step(loss: float, grad_is_finite: bool, recent: list[float], spike_threshold: float) -> str | None:
    """Why a step must not be taken, or None.

    As in OLMo's SkipStepOptimizer (OLMo 2, 2024), a spike is a loss many standard deviations above the mean of the
    last ones. Only the loss is judged so, since gradients are clipped.

    Args:
        loss: of all processes' batches, nats per token.
        grad_is_finite: whether the gradient's norm is finite on every process.
        recent: losses of earlier steps, see `losses_to_compare`.
        spike_threshold: standard deviations; 0: spikes are not detected.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not grad_is_finite:
        return "the gradient is not finite"
    if loss > spike_limit(recent, spike_threshold):
        mean, deviation = np.mean(recent), np.std(recent)
        return f"the loss spiked to {loss:.3f}, {(loss - mean) / deviation:.0f} deviations above {mean:.3f}"
    return None


def spike_limit(recent: list[float], spike_threshold: float) -> float:
    """The highest loss that is no spike; infinite where none is. Arguments as `fault_of_step`'s."""
    if not spike_threshold or len(recent) < MIN_WINDOW or not (deviation := np.std(recent)):
        return math.inf
    return float(np.mean(recent) + spike_threshold * deviation)


def limit_reached(overflows: int, skipped: int, max_skipped_steps: int) -> str | None:
    """Why a run ends after this skipped step, or None. float16's overflows have a separate limit: a smaller loss scale
    cures most of them.

    Args:
        overflows, skipped: float16 overflows and other skipped steps since the last step taken, this one included.
    """
    if overflows > MAX_OVERFLOWS:
        return f"{MAX_OVERFLOWS} steps before it overflowed float16 too; lower learning_rate or set another dtype"
    if skipped > max_skipped_steps:
        before = f"{skipped - 1} step{' before it was' if skipped == 2 else 's before it were'}"
        return f"{before} skipped (max_skipped_steps); lower learning_rate or look at the data"
    return None


def remember(recent: list[float], loss: float) -> None:
    """Add the loss of a step that was taken."""
    recent.append(loss)
    del recent[:-WINDOW]


def losses_to_compare(recent: list[float], is_ahead: bool) -> list[float]:
    """What a step's loss is compared with, however it is launched: the losses of the steps taken before, but for the
    very last one, which is not known yet where steps are launched ahead.

    Args:
        recent: as `remember` has them when the step is launched.
        is_ahead: whether they lack the step before, which was launched and is not counted yet.
    """
    return recent[-(WINDOW - 1) :] if is_ahead else recent[:-1]


def norm_of(weights: Iterable[Tensor]) -> float:
    """The Euclidean norm of all of them."""
    return math.sqrt(sum(float(weight.detach().square().sum()) for weight in weights))


def difference_of_weights(norms: list[float], shards: int = 1) -> str | None:
    """What to say if the processes' weights have diverged, which exchange gradients and never weights; else None.

    Processors of different kinds may round differently, hence the tolerance; a memory fault is mostly larger.

    Args:
        norms: `norm_of` each rank's weights.
        shards: ranks among which one copy is divided; the ranks after them have the same shares.
    """
    for rank, norm in enumerate(norms):
        first = norms[rank % shards]
        if math.isfinite(first) and not abs(norm - first) <= WEIGHTS_TOLERANCE * first:
            return (
                f"the weights of rank {rank} (norm {norm:g}) differ from those of rank {rank % shards} ({first:g}),"
                " perhaps by a memory or hardware fault; --resume from the last checkpoint"
            )
    return None
