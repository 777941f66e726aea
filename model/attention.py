"""Causal attention in ways that give the same numbers: PyTorch's kernels, in chunks for training on a CPU, both mixed,
and written out to be read.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.accelerator import kind_of, size_step
from model.document_attention import document_attention

WAYS = ("chunks", "mixed", "pytorch")  # mixed: PyTorch's forward pass, and the backward pass in chunks
VARLEN = "varlen"  # documents by kernels for sequences of any lengths, on a GPU: see `document_attention.py`
CHUNK_BYTES = 256  # of one row of queries that are looked at together: 64 in float32, 128 in 16 bits
PIECE_BYTES = 2 * 2**20  # that the scores of one piece take for each thread: they stay in a CPU's caches
SHORTEST = 64  # tokens: below, PyTorch's kernel


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
    way: str = "pytorch",
    starts: Tensor | None = None,
) -> Tensor:
    """Position t sees 0 to t: q [B, H, T, D], k and v [B, H_kv, T, D] -> [B, H, T, D].

    Args:
        documents: int64 [B, T], the number of each token's document, which never falls; t sees its own document only.
        mask: `document_mask(documents)`, where it is at hand already. PyTorch's flash kernels take no mask, so that a
            GPU computes all of the square.
        way: one of WAYS; all but PyTorch's for a CPU, without dropout.
        starts: `document_starts(documents)`: they are told apart by these, without mask and dropout.
    """
    if starts is not None:
        return document_attention(q, k, v, starts)
    if way != "pytorch":
        return chunked_attention(q, k, v, documents, way == "mixed")
    if mask is None and documents is not None:
        mask = document_mask(documents)
    return pytorch_attention(q, k, v, mask, dropout, is_causal=mask is None)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Attention of the newest tokens over all that a cache holds: q [B, H, T, D], k and v [B, H_kv, S, D] ->
    [B, H, T, D].

    Args:
        mask: bool [B or 1, 1, T, S], what each token may look at, or what is added to the scores; None: all of it.
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
    if grouped and kind_of(q.device).has_flash_kernels and not (v.dtype == torch.bfloat16 and mask is None):
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
    if not kind_of(device).has_flash_kernels:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def has_ways(flash_attn: bool, device: torch.device, tokens: int, dropout: float) -> bool:
    """Whether training on `tokens` tokens there can go any of WAYS; else there is no choice."""
    return flash_attn and device.type == "cpu" and not dropout and tokens >= SHORTEST


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
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    weights = F.dropout(scores.float().softmax(-1).type_as(q), dropout_p)
    return weights @ v


# ------------------------------------------------------------------------------------------- in chunks, on a CPU


def _pieces(q: Tensor, documents: Tensor | None):
    """The pieces of the computation, one after another, for queries [B * H_kv, H / H_kv, T, D].

    Keys before the first document that any query of a piece belongs to are left out, as many as `size_step` allows.

    Yields:
        slices of key heads, of queries and of keys.
    """
    heads, grouped, tokens, _ = q.shape
    chunk, begin = _chunk(q), 0
    if documents is not None:  # [B, T]; where the document of each piece's first query begins, a list of chunks a row
        firsts = torch.searchsorted(documents.contiguous(), documents[:, ::chunk].contiguous()).tolist()
        kv_heads, step = heads // len(documents), size_step(q)
    for number, query in enumerate(range(0, tokens, chunk)):
        end = min(query + chunk, tokens)
        most = max(1, _scores_at_once(q) // (grouped * (end - query) * end))
        together = -(-heads // -(-heads // most))  # as evenly as it goes
        for head in range(0, heads, together):
            last = min(head + together, heads)
            if documents is not None:
                begin = min(row[number] for row in firsts[head // kv_heads : (last - 1) // kv_heads + 1])
                begin -= begin % step
            yield slice(head, last), slice(query, end), slice(begin, end)


def _chunk(q: Tensor) -> int:
    """Queries of a head that are looked at together, at most."""
    return min(CHUNK_BYTES // q.element_size(), q.shape[2])


def _scores_at_once(q: Tensor) -> int:
    return torch.get_num_threads() * PIECE_BYTES // q.element_size()


def _room_for_scores(q: Tensor) -> Tensor:
    """Memory that any piece's scores fit into: allocated once, it stays in the cache."""
    grouped, tokens = q.shape[1:3]
    return q.new_empty(max(_scores_at_once(q), grouped * _chunk(q) * tokens))


def _in_room(room: Tensor, queries: Tensor, key: slice) -> Tensor:
    """The beginning of `room` as scores [heads, grouped * queries, keys]."""
    shape = (*queries.shape[:2], key.stop - key.start)
    return room[: math.prod(shape)].view(shape)


class _Weights:
    """Computes the attention weights of one piece after another, the same in the forward and in the backward pass.

    Args:
        q: scaled queries [B * H_kv, H / H_kv, T, D].
        k: keys [B * H_kv, T, D].
        documents: int64 [B, T] or None.
    """

    def __init__(self, q: Tensor, k: Tensor, documents: Tensor | None) -> None:
        self._q, self._k, self._room = q, k, _room_for_scores(q)
        self._hidden = q.new_full((_chunk(q), _chunk(q)), -torch.inf).triu(1)  # what lies after the query
        self._own = None  # each token's document for every key head, [B * H_kv, 1, T]
        if documents is not None:
            self._own = documents.repeat_interleave(len(k) // len(documents), 0)[:, None]

    def of(self, head: slice, query: slice, key: slice) -> tuple[Tensor, Tensor]:
        """The piece's queries [heads, grouped * queries, D] and weights [heads, grouped * queries, keys]; these are
        overwritten by the next call."""
        queries = self._q[head, :, query].flatten(1, 2)
        count = query.stop - query.start
        weights = _in_room(self._room, queries, key)
        torch.bmm(queries, self._k[head, key].transpose(1, 2), out=weights)
        by_query = weights.unflatten(1, (-1, count))
        by_query[..., -count:] += self._hidden[:count, :count]
        if self._own is not None:
            by_query.masked_fill_(self._own[head, :, query, None] != self._own[head, :, None, key], -torch.inf)
        return queries, torch.softmax(weights, -1, out=weights)


def _by_key_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, D] -> [B * H_kv, H / H_kv, T, D]; k and v [B, H_kv, T, D] -> [B * H_kv, T, D]."""
    batch, heads, tokens, size = q.shape
    kv_heads = k.shape[1]
    queries = q.reshape(batch * kv_heads, heads // kv_heads, tokens, size)
    return queries, k.reshape(-1, tokens, size), v.reshape(-1, tokens, size)


@torch.library.custom_op("mateconv::chunked_attention", mutates_args=())
def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, pytorch_forward: bool = False
) -> Tensor:
    """Causal attention in pieces small enough for the cache, skipping what lies above the diagonal.

    The backward pass computes the weights again, which takes less time than reading T² / 2 numbers a head from memory.
    A custom operator, since `torch.compile` then leaves it whole. Query heads of one key head share one product.

    Args:
        documents: as `causal_attention` takes them.
        pytorch_forward: PyTorch's kernel computes the forward pass, where there are no documents.

    Returns:
        [B, H, T, D]
    """
    if pytorch_forward and documents is None:
        return pytorch_attention(q, k, v, is_causal=True).contiguous()
    shape = q.shape
    q, k, v = _by_key_head(q, k, v)
    q = q * shape[-1] ** -0.5
    out = q.new_empty(q.shape)  # contiguous, as the fake kernel says; q of a single batch row is a strided view
    weights = _Weights(q, k, documents)
    for head, query, key in _pieces(q, documents):
        _, piece = weights.of(head, query, key)
        out[head, :, query] = torch.bmm(piece, v[head, key]).unflatten(1, (-1, query.stop - query.start))
    return out.view(shape)


@torch.library.custom_op("mateconv::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of the output [B, H, T, D]."""
    shape, kv_shape, scale = q.shape, k.shape, q.shape[-1] ** -0.5
    q, k, v = _by_key_head(q, k, v)
    q, grad = q * scale, grad.reshape(q.shape)
    grad_q = q.new_empty(q.shape)  # contiguous
    # Sums over all pieces: in 16 bits each would round.
    grad_k, grad_v = (t.new_zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
    weights, room = _Weights(q, k, documents), _room_for_scores(q)
    for head, query, key in _pieces(q, documents):
        queries, piece = weights.of(head, query, key)
        piece_grad = grad[head, :, query].flatten(1, 2)
        grad_v[head, key] += torch.bmm(piece.transpose(1, 2), piece_grad)
        scores_grad = torch.bmm(piece_grad, v[head, key].transpose(1, 2), out=_in_room(room, queries, key))
        torch.ops.aten._softmax_backward_data.out(scores_grad, piece, -1, piece.dtype, grad_input=scores_grad)
        grad_q[head, :, query] = torch.bmm(scores_grad, k[head, key]).unflatten(1, (-1, query.stop - query.start))
        grad_k[head, key] += torch.bmm(scores_grad.transpose(1, 2), queries)
    return grad_q.mul_(scale).view(shape), grad_k.to(k.dtype).view(kv_shape), grad_v.to(v.dtype).view(kv_shape)


@chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, pytorch_forward: bool = False) -> Tensor:
    return q.new_empty(q.shape)


@chunked_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *chunked_attention_backward(grad, *ctx.saved_tensors), None, None


chunked_attention.register_autograd(_backward, setup_context=_save)
