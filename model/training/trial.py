"""Which way to compute the same trains fastest here."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from model import accelerator
from model.trial import fastest_of, times_text

SECONDS = 0.1  # of the trial, at most, unless a few rounds take longer
CLEARLY = 1.1  # times faster another way must be than the usual one


def seconds_of_passes(compute: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], times: int = 1) -> float:
    """How long so many forward and backward passes take."""
    start = time.perf_counter()
    for _ in range(times):
        outputs = compute()
        torch.autograd.grad(outputs, inputs, [output.detach() for output in outputs])
    accelerator.synchronize(inputs[0].device)
    return time.perf_counter() - start


def fastest_way(ways: Sequence[str], seconds_of: Callable[[str], float], usual: str, what: str) -> tuple[str, str]:
    """The fastest of some ways, as `fastest_of` finds it, and why.

    Args:
        seconds_of: computes one way; returns how long that took.
        what: is computed, for the reason.
    """
    fastest, least = fastest_of({way: partial(seconds_of, way) for way in ways}, usual, CLEARLY, SECONDS)
    if fastest is None:
        return usual, "the machine is too busy to try others"
    return fastest, f"tried with {what}: {times_text(least)}"
