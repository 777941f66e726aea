"""The loss of a language model: cross-entropy over the vocabulary, without ever holding all logits on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # a target with this id counts in no loss
CHUNK_BYTES = 8 << 20  # of logits, computed at once: they stay in a CPU's cache


def bits_per_byte(nats: float, byte_count: float) -> float:
    """A summed loss as bits per byte of text: comparable between tokenizers."""
    return nats / math.log(2) / max(1, byte_count)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the targets that are not IGNORE_INDEX (float32, 0-dimensional).

    On a GPU `torch.compile` fuses the loss; on a CPU, where training waits for memory there, it is computed in chunks.

    Args:
        hidden: [B, T, dim], what the output layer reads.
        weight: [vocab_size, dim], the output layer.
        targets: int64 [B, T].
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    trains = torch.is_grad_enabled() and hidden.requires_grad
    if hidden.device.type != "cpu" or not trains:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return chunked_cross_entropy(hidden, weight, targets, weight.requires_grad)[0]


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target, 0 where none counts: float32 [B, T].

    Unless compiled, the output layer runs only where a target counts.

    Args:
        hidden, weight, targets: as of `cross_entropy`.
    """
    if torch.compiler.is_compiling():
        logits = F.linear(hidden, weight).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view_as(targets)
    counts = targets != IGNORE_INDEX
    losses = F.cross_entropy(F.linear(hidden[counts], weight).float(), targets[counts], reduction="none")
    return losses.new_zeros(targets.shape).masked_scatter(counts, losses)


@torch.library.custom_op("mateconv::chunked_cross_entropy", mutates_args=())
def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, trains_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss together with its gradients: both need the softmax, which is then computed once and not kept.

    A custom operator, since `torch.compile` then leaves it whole. The idea is Liger's (Hsu et al., 2024).

    Args:
        hidden: [N, dim]
        weight: [vocab_size, dim]
        targets: int64 [N], IGNORE_INDEX where none is predicted.
        trains_weight: whether `weight` needs a gradient.

    Returns:
        the summed loss, float32 [], and its gradients by `hidden` and by `weight`, which is empty if not needed.
    """
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = weight.new_zeros(weight.shape if trains_weight else 0, dtype=torch.float32)
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for begin in range(0, len(hidden), rows):
        some, target = hidden[begin : begin + rows], targets[begin : begin + rows, None]
        counts = target != IGNORE_INDEX  # [rows, 1]
        target = target.where(counts, 0)
        log_probabilities = torch.log_softmax(F.linear(some, weight).float(), -1)  # [rows, vocab_size]
        loss -= (log_probabilities.gather(1, target) * counts).sum()
        grad = log_probabilities.exp_()
        grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
        if not counts.all():
            grad *= counts
        grad = grad.to(weight.dtype)
        torch.mm(grad, weight, out=grad_hidden[begin : begin + rows])
        if not trains_weight:
            continue
        if weight.dtype == torch.float32:
            grad_weight.addmm_(grad.t(), some)
        else:
            grad_weight += grad.t() @ some
    return loss, grad_hidden, grad_weight.to(weight.dtype)


@chunked_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, trains_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = weight.new_empty(weight.shape if trains_weight else 0)
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden), grad_weight


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.trains_weight = inputs[3]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, *_) -> tuple[Tensor, Tensor | None, None, None]:
    grad_hidden, grad_weight = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
    return grad_hidden, grad_weight if ctx.trains_weight else None, None, None


chunked_cross_entropy.register_autograd(_backward, setup_context=_save)
