"""Causal attention, three ways that give the same numbers: PyTorch's kernel, a faster one for training on a CPU, and
one written out to be read.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # queries that are looked at together, and so the share of the square above the diagonal that is computed
HEADS = 16  # key heads that are: their scores (16 x 128 x 512 float32 are 4 MiB) stay in a CPU's cache
LONGEST = (
    1024  # the chunks keep their weights for the backward pass, T² / 2 numbers a head; longer, and PyTorch's serves
)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Position t sees 0 to t: q [B, H, T, D], k and v [B, H_kv, T, D] -> [B, H, T, D]."""
    trains = torch.is_grad_enabled() and q.requires_grad
    if trains and q.device.type == "cpu" and not dropout and CHUNK <= q.shape[2] <= LONGEST:
        return chunked_attention(q, k, v)[0]
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=k.shape[1] < q.shape[1]
    )


def attention_written_out(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """What `scaled_dot_product_attention` computes, step by step. q [B, H, T, D], k and v [B, H_kv, S, D]."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))  # [B, H, S, D]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, H, T, S]
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    weights = F.dropout(scores.float().softmax(-1).type_as(q), dropout_p)
    return weights @ v


# ------------------------------------------------------------------------------------------- in chunks, on a CPU


def _blocks(heads: int, grouped: int, tokens: int):
    """The pieces of the computation, one after another.

    Yields:
        slice of key heads, slice of queries, where their weights begin in what is kept, and the weights' shape:
        [key heads, grouped * queries, keys up to the last query].
    """
    begin = 0
    for head in range(0, heads, HEADS):
        some = min(HEADS, heads - head)
        for query in range(0, tokens, CHUNK):
            keys = min(query + CHUNK, tokens)
            shape = (some, grouped * (keys - query), keys)
            yield slice(head, head + some), slice(query, keys), begin, shape
            begin += math.prod(shape)


@torch.library.custom_op("mateconv::chunked_attention", mutates_args=())
def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention in pieces small enough for the cache, skipping what lies above the diagonal.

    An operator of its own: `torch.compile` takes it as a whole. Query heads of one key head are rows of one product.

    Returns:
        [B, H, T, D] and the attention weights, which the backward pass reads again.
    """
    batch, heads, tokens, size = q.shape
    kv_heads = k.shape[1]
    grouped = heads // kv_heads
    q = q.reshape(batch * kv_heads, grouped, tokens, size)
    k, v = k.reshape(-1, tokens, size), v.reshape(-1, tokens, size)
    out = torch.empty_like(q)
    kept = q.new_empty(_weights_kept(batch * kv_heads, grouped, tokens))
    hidden = q.new_full((CHUNK, CHUNK), -torch.inf).triu(1)  # what lies after the query
    for head, query, begin, shape in _blocks(batch * kv_heads, grouped, tokens):
        count = query.stop - query.start
        some = q[head, :, query].reshape(shape[0], shape[1], size)
        scores = torch.bmm(some, k[head, : query.stop].transpose(1, 2)).mul_(size**-0.5)
        scores.view(shape[0], grouped, count, -1)[..., query] += hidden[:count, :count]
        weights = kept[begin : begin + scores.numel()].view(shape)
        torch.softmax(scores, -1, out=weights)
        out[head, :, query] = torch.bmm(weights, v[head, : query.stop]).view(shape[0], grouped, count, size)
    return out.view(batch, heads, tokens, size), kept


def _weights_kept(heads: int, grouped: int, tokens: int) -> int:
    return (
        heads
        * grouped
        * sum((min(query + CHUNK, tokens) - query) * min(query + CHUNK, tokens) for query in range(0, tokens, CHUNK))
    )


@torch.library.custom_op("mateconv::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of the output [B, H, T, D]."""
    batch, heads, tokens, size = q.shape
    kv_heads = k.shape[1]
    grouped = heads // kv_heads
    q, grad = (t.reshape(batch * kv_heads, grouped, tokens, size) for t in (q, grad))
    k, v = k.reshape(-1, tokens, size), v.reshape(-1, tokens, size)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for head, query, begin, shape in _blocks(batch * kv_heads, grouped, tokens):
        some, some_grad = (t[head, :, query].reshape(shape[0], shape[1], size) for t in (q, grad))
        weights = kept[begin : begin + math.prod(shape)].view(shape)
        grad_v[head, : query.stop].baddbmm_(weights.transpose(1, 2), some_grad)
        grad_weights = torch.bmm(some_grad, v[head, : query.stop].transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_q[head, :, query] = torch.bmm(grad_scores, k[head, : query.stop]).view(shape[0], grouped, -1, size)
        grad_k[head, : query.stop].baddbmm_(grad_scores.transpose(1, 2), some, alpha=size**-0.5)
    return (
        grad_q.mul_(size**-0.5).view(batch, heads, tokens, size),
        grad_k.view(batch, kv_heads, tokens, size),
        grad_v.view(batch, kv_heads, tokens, size),
    )


@chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    kept = _weights_kept(batch * kv_heads, heads // kv_heads, tokens)
    return q.new_empty(q.shape), q.new_empty(kept)


@chunked_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, Tensor]:
    return chunked_attention_backward(grad, *ctx.saved_tensors)


chunked_attention.register_autograd(_backward, setup_context=_save)
