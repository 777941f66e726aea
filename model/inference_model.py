"""A Transformer for generating on a CPU: the same computation on weights that are laid out for it.

Writing a token reads each weight once and computes little with it, so what counts is how fast memory is read. So
matrices that read the same vector are one (query, key and value), and oneDNN holds each in the order in which it reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_cache import KVCache
from model.LMConfig import LMConfig
from model.model import Transformer, TransformerBlock

PACKED_FOR = 32  # rows that oneDNN lays a matrix out for; as fast for 1 or 512, where one laid out for 1 is not


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can hold matrices of this type in an order of its own here."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class Matrix:
    """A weight [N, K] of x -> x Wᵀ, packed by oneDNN where it can: a copy, twice to three times as fast as F.linear."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        weight = weight.to(dtype)
        self.packed = packs(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> x Wᵀ [..., N]."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ)."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "swish", [], "")
        return F.silu(self(x))


class Int8Matrix(Matrix):
    """A weight as int8 with a scale for each of its N rows: a quarter of float32's bytes to read.

    Rounding is to nearest, the largest of a row being 127 ("absmax" of LLM.int8, Dettmers et al., 2022, for the weights
    only). PyTorch's int8 product is fast for one row in bfloat16; all others use the same numbers as `dtype`.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.int8, scale = quantized(weight)
        self.scale = scale.to(dtype)
        super().__init__(self.int8.to(dtype) * self.scale[:, None], dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]:
            return torch._weight_int8pack_mm(x.view(1, -1), self.int8, self.scale).view(*x.shape[:-1], -1)
        return super().__call__(x)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and float32 [N], whose product comes nearest to it."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class InferenceModel:
    """What `Rows` asks of a Transformer, faster. It copies the weights: make a new one when they change.

    Args:
        model: on the CPU.
        int8: hold the matrices as `Int8Matrix`; all else is bfloat16 then, or float32 where that is not fast.
    """

    def __init__(self, model: Transformer, int8: bool = False) -> None:
        self.config: LMConfig = model.config
        matrix = Int8Matrix if int8 else Matrix
        self.dtype = model.dtype
        if int8:
            self.dtype = torch.bfloat16 if packs(torch.bfloat16) else torch.float32
        self.embedding = model.tok_embeddings.weight.detach().to(self.dtype)
        self.layers = [_Layer(layer, model.config, matrix, self.dtype) for layer in model.layers]
        self.norm = model.norm.weight.detach().to(self.dtype)
        self.output = matrix(model.output.weight.detach(), self.dtype)
        self.turns = torch.complex(model.rope_cos, model.rope_sin)  # complex64 [max_seq_len, D / 2]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def hidden_states(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """As Transformer.hidden_states: tokens int64 [B, T], which go on from what the cache holds -> [B, T, dim]."""
        count, eps = tokens.shape[1], self.config.norm_eps
        from_the_start = max(cache.lengths) == 0
        mask, positions = None if from_the_start else cache.attention_mask(count), cache.positions(count)
        turns = self.turns[positions].unsqueeze(-2)  # [T, 1, D / 2] or [B, T, 1, D / 2]
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer.attend(x, turns, mask, from_the_start, cache, eps)
            x = layer.feed_forward(x, eps)
        cache.advance(count)
        return F.rms_norm(x, x.shape[-1:], self.norm, eps)


class _Layer:
    """A TransformerBlock's weights and what is computed with them."""

    def __init__(self, block: TransformerBlock, config: LMConfig, matrix: type[Matrix], dtype: torch.dtype) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.layer = attention.layer
        self.heads = (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)  # of queries, keys and values
        self.head_dim = attention.head_dim
        norms = (attention.q_norm, attention.k_norm) if config.qk_norm else ()
        self.qk_norms = [norm.weight.detach().to(dtype) for norm in norms]
        self.attention_norm = block.attention_norm.weight.detach().to(dtype)
        self.ffn_norm = block.ffn_norm.weight.detach().to(dtype)
        wqkv = torch.cat([linear.weight.detach() for linear in (attention.wq, attention.wk, attention.wv)])
        self.wqkv = matrix(wqkv, dtype)
        self.wo = matrix(attention.wo.weight.detach(), dtype)
        self.w1 = matrix(feed_forward.w1.weight.detach(), dtype)
        self.w2 = matrix(feed_forward.w2.weight.detach(), dtype)
        self.w3 = matrix(feed_forward.w3.weight.detach(), dtype)

    def attend(
        self, x: Tensor, turns: Tensor, mask: Tensor | None, is_causal: bool, cache: KVCache, eps: float
    ) -> Tensor:
        """x + attention(norm(x)), x [B, T, dim]."""
        batch, tokens, dim = x.shape
        qkv = self.wqkv(F.rms_norm(x, (dim,), self.attention_norm, eps))
        q, k, v = qkv.view(batch, tokens, -1, self.head_dim).split(self.heads, dim=2)  # [B, T, H or H_kv, D]
        if self.qk_norms:
            q, k = (F.rms_norm(x, x.shape[-1:], gain, eps) for x, gain in zip((q, k), self.qk_norms, strict=True))
        q = _turned(q, turns).transpose(1, 2)  # [B, H, T, D]
        k, v = cache.append(self.layer, _turned(k, turns).transpose(1, 2), v.transpose(1, 2))  # [B, H_kv, S, D]
        heads = _attention(q, k, v, mask, is_causal).transpose(1, 2).reshape(batch, tokens, dim)
        return x + self.wo(heads)

    def feed_forward(self, x: Tensor, eps: float) -> Tensor:
        """x + w2(silu(w1 x) * w3 x) of the normalised x [B, T, dim]."""
        normed = F.rms_norm(x, x.shape[-1:], self.ffn_norm, eps)
        return x + self.w2(self.w1.silu(normed) * self.w3(normed))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """As `apply_rope`: x [B, T, H, D], turns complex64 [T, 1, D / 2] or [B, T, 1, D / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """q [B, H, T, D], k and v [B, H_kv, S, D] -> [B, H, T, D]."""
    batch, heads, tokens, head_dim = q.shape
    if tokens > 1:
        grouped = k.shape[1] < heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
    # The query heads of a group as if they were positions: PyTorch's kernel then reads the group's keys once.
    grouped = q.view(batch, k.shape[1], -1, head_dim)  # [B, H_kv, H / H_kv, D]
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(q.shape)
