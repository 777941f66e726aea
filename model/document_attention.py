"""Attention within documents that stand one after another: FlashAttention's kernels for sequences of any lengths
(Dao, 2023), which skip what a mask would hide. The whole batch is one sequence of documents for them.

They are PyTorch's, for GPUs from Ampere on. A CPU computes the same, document by document, to compare with.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import first_line

MOST_OFF = 0.02  # of the norm, where bfloat16 rounds: of the outputs and gradients of `problem_on`'s trial


def document_starts(documents: Tensor, places: int = 0) -> Tensor:
    """Where the documents of a batch begin in all its tokens, and their end: int64 [B, T] -> int32 [N + 1].

    A row's end is the end of its last document. Places that are left over hold the end of all: documents without
    tokens, so that the batches of a run can have one shape.

    Args:
        documents: on the CPU; the number of each token's document, which never falls within a row.
        places: the N of an earlier batch; N is a larger power of two if that is too small.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    found = begins.flatten().nonzero().flatten()
    places = max(places, 1 << (2 * len(found) - 1).bit_length() if len(found) > places else 0)
    starts = torch.full((places + 1,), documents.numel(), dtype=torch.int32)
    starts[: len(found)] = found
    return starts


def document_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Position t sees 0 to t of its document: q [B, H, T, D], k and v [B, H_kv, T, D] -> [B, H, T, D], of v's type.

    Args:
        starts: int32 [N + 1], on the device; see `document_starts`.
    """
    batch, heads, tokens, size = q.shape
    packed = (x.transpose(1, 2).reshape(batch * tokens, -1, size).to(v.dtype) for x in (q, k, v))
    out, _ = _attention(*packed, starts, tokens)
    return out.view(batch, tokens, heads, size).transpose(1, 2)


@torch.library.custom_op("mateconv::document_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """q [N, H, D], k and v [N, H_kv, D] -> outputs [N, H, D] and the logarithms of the sums of exponentials, float32
    [H, N]. A custom operator, since `torch.compile` then leaves it whole.

    Args:
        longest: tokens that no document exceeds.
    """
    if q.device.type == "cpu":
        return _by_document(q, k, v, starts), q.new_zeros(q.shape[1], len(q), dtype=torch.float32)  # not needed
    lengths = starts, starts, longest, longest
    out, sums, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)
    return out, sums


@torch.library.custom_op("mateconv::document_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of the outputs."""
    if q.device.type == "cpu":
        return _gradients_by_document(grad, q, k, v, starts)
    lengths = starts, starts, longest, longest
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    found = q, k, v, out, sums
    return torch.ops.aten._flash_attention_backward(grad.contiguous(), *found, *lengths, 0.0, True, *no_dropout)


def _by_document(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """As `_attention`, one document after another."""
    done = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in _parts(starts, q, k, v)]
    return _joined(done)


def _gradients_by_document(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    """As `_attention_backward`: within an operator nothing is differentiated."""
    scale, groups, found = q.shape[-1] ** -0.5, (k.shape[1], -1), []
    for part_grad, queries, keys, values in _parts(starts, grad, q, k, v):
        tokens = queries.shape[1]
        part_grad, queries = (x.unflatten(0, groups) for x in (part_grad, queries))  # [H_kv, H / H_kv, T, D]
        keys, values = keys[:, None], values[:, None]
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = (queries @ keys.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
        by_weights = part_grad @ values.mT
        by_scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * scale
        of_keys, of_values = (by_scores.mT @ queries).sum(1), (weights.mT @ part_grad).sum(1)
        found.append(((by_scores @ keys).flatten(0, 1), of_keys, of_values))
    return tuple(map(_joined, zip(*found, strict=True)))


def _parts(starts: Tensor, *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The documents of tensors [N, heads, D], [heads, T, D] of each; without those that have no tokens."""
    lengths = [length for length in starts.diff().tolist() if length]
    yield from zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in packed), strict=True)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Documents [heads, T, D] one after another, [N, heads, D]."""
    return torch.cat(list(parts), dim=1).transpose(0, 1).contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor, grad_of_sums: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, starts, out, sums = ctx.saved_tensors
    return *_attention_backward(grad, q, k, v, out, sums, starts, ctx.longest), None, None


_attention.register_autograd(_backward, setup_context=_save)


def problem_on(device: torch.device, heads: int, kv_heads: int, head_dim: int) -> str | None:
    """Why the kernels can't be used on this device, after a trial on a few documents against the same in float32 on
    the CPU; None: they can."""
    numbers = torch.tensor([[0] * 40 + [1] * 24, [0] + [1] * 62 + [2]])
    starts, generator = document_starts(numbers), torch.Generator().manual_seed(0)
    shapes = [(2, count, 64, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def computed(on: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(on, dtype).requires_grad_() for x in (q, k, v)]
        out = document_attention(*inputs, starts.to(on))
        found = [out, *torch.autograd.grad(out, inputs, grad.to(on, dtype))]
        return [x.detach().float().cpu() for x in found]

    try:
        found = computed(device, torch.bfloat16)
    except (RuntimeError, TypeError, AttributeError) as error:
        return first_line(error)
    for name, own, right in zip(("outputs", "dq", "dk", "dv"), found, computed("cpu", torch.float32), strict=True):
        off = float((own - right).norm() / right.norm())
        if not off <= MOST_OFF:
            return f"its {name} are off by {off:.1%} of their norm"
    return None
