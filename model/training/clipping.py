"""Clipping of gradients, also of those that are divided among ranks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.accelerator import kind_of


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], most: float, sum_over_ranks: Callable[[Tensor], None]) -> Tensor:
    """Scale gradients, in place, so that the norm of all of them is at most `most`; returns their norm before.

    As `torch.nn.utils.clip_grad_norm_`, but squares are added up in float64, where the device has it: rounded to
    float32, their sum is then the same however the gradients are divided among ranks, and so is every bit that follows.

    Args:
        gradients: float32, on one device; where ranks hold shares of them, this rank's.
        most: infinity: they are not scaled.
        sum_over_ranks: adds a tensor up, in place, over the ranks that hold shares.

    Returns:
        float32 scalar, on the device.
    """
    wide = torch.float64 if kind_of(gradients[0].device).has_float64 else torch.float32
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=wide))
    squares = norms.square().sum()
    sum_over_ranks(squares)
    norm = squares.sqrt().float()
    if most < math.inf:
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
