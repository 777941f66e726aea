"""Causal attention, three ways that give the same numbers: PyTorch's kernels, a faster one for training on a CPU, and
one written out to be read.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CHUNK = 64  # queries that are looked at together, and so the share of the square above the diagonal that is computed
HEADS = 16  # key heads that are: their scores (16 x 128 x 512 float32 are 4 MiB) stay in a CPU's cache
LONGEST = 1024  # tokens: chunks keep their weights for the backward pass, T² / 2 a head; PyTorch's keeps none


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Position t sees 0 to t: q [B, H, T, D], k and v [B, H_kv, T, D] -> [B, H, T, D].

    Args:
        documents: int64 [B, T], the number of each token's document, which never falls; t sees its own document only.
        mask: `document_mask(documents)`, where it is at hand already. PyTorch's flash kernels take no mask, so that a
            GPU computes all of the square; `torch.nn.attention.flex_attention` would skip the other documents there.
    """
    if in_chunks(q, q.shape[2], dropout):
        return chunked_attention(q, k, v, documents)[0]
    if mask is None and documents is not None:
        mask = document_mask(documents)
    return pytorch_attention(q, k, v, mask, dropout, is_causal=mask is None)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Attention of the newest tokens over all that a cache holds: q [B, H, T, D], k and v [B, H_kv, S, D] ->
    [B, H, T, D].

    Args:
        mask: bool [B or 1, 1, T, S], what each token may look at; None: all of it.
        is_causal: nothing was there before these tokens.
    """
    batch, _, tokens, head_dim = q.shape
    if tokens > 1:
        return pytorch_attention(q, k, v, mask, is_causal=is_causal)
    # The query heads of a group as if they were positions: a kernel then reads the group's keys once.
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)  # [B, H_kv, H / H_kv, D]
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


def pytorch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False
) -> Tensor:
    """`scaled_dot_product_attention` for q [B, H, T, D], k and v [B, H_kv, S, D]."""
    grouped = k.shape[1] < q.shape[1]
    if grouped and q.device.type == "cuda" and not (v.dtype == torch.bfloat16 and mask is None):
        # Of its fast kernels for GPUs only flash attention knows groups, which takes no mask and no float32, and needs
        # Ampere, as bfloat16 does. Otherwise PyTorch would compute and keep all T x S scores.
        k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).flatten(1, 2) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
    )


def kernels_for_any_length(device: torch.device) -> contextlib.AbstractContextManager:
    """Where a text grows token by token: without cuDNN's attention, which builds a plan for each new length, in up to
    half a second. PyTorch prefers it on Hopper and Blackwell GPUs from cuDNN 9.15.1 on, its own from version 2.11.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def in_chunks(x: Tensor, tokens: int, dropout: float) -> bool:
    """Whether attention over `tokens` tokens is computed in chunks: where its input `x` is trained on a CPU."""
    trains = torch.is_grad_enabled() and x.requires_grad
    return trains and x.device.type == "cpu" and not dropout and CHUNK <= tokens <= LONGEST


def document_mask(documents: Tensor) -> Tensor:
    """Which keys each query sees: those before it in its document, and itself. int64 [B, T] -> bool [B, 1, T, T]."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


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


def _blocks(heads: int, grouped: int, tokens: int, documents: Tensor | None):
    """The pieces of the computation, one after another.

    Keys before the first document that any query of a piece belongs to are left out.

    Yields:
        slice of key heads, of queries and of keys, where their weights begin in what is kept, and the weights' shape:
        [key heads, grouped * queries, keys].
    """
    begin, first = 0, 0
    if documents is not None:  # [B, T]; where the document of each piece's first query begins, [B, chunks]
        firsts = torch.searchsorted(documents.contiguous(), documents[:, ::CHUNK].contiguous())
        kv_heads = heads // len(documents)
    for head in range(0, heads, HEADS):
        some = min(HEADS, heads - head)
        if documents is not None:
            earliest = firsts[head // kv_heads : (head + some - 1) // kv_heads + 1].amin(0).tolist()
        for query in range(0, tokens, CHUNK):
            stop = min(query + CHUNK, tokens)
            if documents is not None:
                first = earliest[query // CHUNK]
            shape = (some, grouped * (stop - query), stop - first)
            yield slice(head, head + some), slice(query, stop), slice(first, stop), begin, shape
            begin += math.prod(shape)


@torch.library.custom_op("mateconv::chunked_attention", mutates_args=())
def chunked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention in pieces small enough for the cache, skipping what lies above the diagonal.

    A custom operator, since `torch.compile` then leaves it whole. Query heads of one key head share one product.

    Args:
        documents: as `causal_attention` takes them.

    Returns:
        [B, H, T, D] and the attention weights, which the backward pass reads again.
    """
    batch, heads, tokens, size = q.shape
    kv_heads = k.shape[1]
    grouped = heads // kv_heads
    q = q.reshape(batch * kv_heads, grouped, tokens, size)
    k, v = k.reshape(-1, tokens, size), v.reshape(-1, tokens, size)
    out = q.new_empty(q.shape)  # contiguous, as the fake kernel says; q of a single batch row is a strided view
    kept = q.new_empty(_weights_kept(batch * kv_heads, grouped, tokens))
    hidden = q.new_full((CHUNK, CHUNK), -torch.inf).triu(1)  # what lies after the query
    if documents is not None:
        own = documents.repeat_interleave(kv_heads, 0)[:, None]  # [B * H_kv, 1, T]
    for head, query, key, begin, shape in _blocks(batch * kv_heads, grouped, tokens, documents):
        count = query.stop - query.start
        some = q[head, :, query].reshape(shape[0], shape[1], size)
        scores = torch.bmm(some, k[head, key].transpose(1, 2)).mul_(size**-0.5)
        by_query = scores.view(shape[0], grouped, count, -1)
        by_query[..., -count:] += hidden[:count, :count]
        if documents is not None:
            by_query.masked_fill_(own[head, :, query, None] != own[head, :, None, key], -torch.inf)
        weights = kept[begin : begin + scores.numel()].view(shape)
        torch.softmax(scores, -1, out=weights)
        out[head, :, query] = torch.bmm(weights, v[head, key]).view(shape[0], grouped, count, size)
    return out.view(batch, heads, tokens, size), kept


def _weights_kept(heads: int, grouped: int, tokens: int) -> int:
    """Numbers that all pieces' weights take at most, whatever the documents."""
    return sum(math.prod(shape) for *_, shape in _blocks(heads, grouped, tokens, None))


@torch.library.custom_op("mateconv::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of the output [B, H, T, D]."""
    batch, heads, tokens, size = q.shape
    kv_heads = k.shape[1]
    grouped = heads // kv_heads
    q, grad = (t.reshape(batch * kv_heads, grouped, tokens, size) for t in (q, grad))
    k, v = k.reshape(-1, tokens, size), v.reshape(-1, tokens, size)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)  # contiguous
    for head, query, key, begin, shape in _blocks(batch * kv_heads, grouped, tokens, documents):
        some, some_grad = (t[head, :, query].reshape(shape[0], shape[1], size) for t in (q, grad))
        weights = kept[begin : begin + math.prod(shape)].view(shape)
        grad_v[head, key].baddbmm_(weights.transpose(1, 2), some_grad)
        grad_weights = torch.bmm(some_grad, v[head, key].transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_q[head, :, query] = torch.bmm(grad_scores, k[head, key]).view(shape[0], grouped, -1, size)
        grad_k[head, key].baddbmm_(grad_scores.transpose(1, 2), some, alpha=size**-0.5)
    return (
        grad_q.mul_(size**-0.5).view(batch, heads, tokens, size),
        grad_k.view(batch, kv_heads, tokens, size),
        grad_v.view(batch, kv_heads, tokens, size),
    )


@chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    kept = _weights_kept(batch * kv_heads, heads // kv_heads, tokens)
    return q.new_empty(q.shape), q.new_empty(kept)


@chunked_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, Tensor, None]:
    return *chunked_attention_backward(grad, *ctx.saved_tensors), None


chunked_attention.register_autograd(_backward, setup_context=_save)
