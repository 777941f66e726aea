"""A Transformer for generating on a CPU: the same computation on weights that are laid out for it.

A token reads each weight once and computes little with it, so what counts is how fast memory is read: matrices that
multiply the same vector are joined (query, key and value), and oneDNN holds each in the order in which it reads.
"""

import copy
import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import cached_attention
from model.errors import InputError, shown
from model.experts import ExpertsFeedForward
from model.feed_forward import FeedForward
from model.generation.compiled_step import CompiledAttention, kept_path
from model.generation.decode_step import quantized
from model.generation.trial import fastest_way
from model.kv_cache import KVCache
from model.LMConfig import NETWORK_FIELDS, LMConfig, refuse_unknown
from model.model import Transformer, TransformerBlock, turned

PACKED_FOR = 32  # rows that oneDNN lays a matrix out for; as fast for 1 or 512, where one laid out for 1 is not

ASKED = "MATECONV_LAYOUT"
WORTH_TRYING = 32 << 20  # bytes of weights; fewer are read from a cache, in no time

Attend = Callable[["_Layer", Tensor], Tensor]  # [B, T, (H + 2 H_kv) * D] -> [B, T, H * D]


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack matrices of this type on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class Matrix:
    """A weight [N, K] of x -> x Wᵀ + bias, packed by oneDNN where it can: a copy, up to three times as fast as
    F.linear.

    Attributes:
        packed: None where oneDNN cannot.
        plain: the weight as it was; None where it is not needed.
        plain_for_one: F.linear multiplies a single row, since it is faster there (see `InferenceModel.try_layouts`).
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        self.plain: Tensor | None = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain, PACKED_FOR) if packs(dtype) else None
        self.plain_for_one = False

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> x Wᵀ + bias [..., N]."""
        if self._is_packed_for(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.plain, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ + bias)."""
        if self._is_packed_for(x):
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "swish", [], "")
        return F.silu(self(x))

    def read_one_row(self, plain: bool) -> None:
        """Set `plain_for_one`."""
        self.plain_for_one = plain
        if not plain and self.packed is not None:
            self.plain = None  # frees its memory, if nothing else holds it

    def _is_packed_for(self, x: Tensor) -> bool:
        return self.packed is not None and not (self.plain_for_one and x.numel() == x.shape[-1])


class Int8Matrix(Matrix):
    """A weight as int8 with a scale for each of its N rows: a quarter of float32's bytes to read.

    Rounded to nearest, the largest of a row being 127 ("absmax" of LLM.int8, Dettmers et al., 2022, for the weights
    only). PyTorch's int8 product is fast for one row in bfloat16; other products use the same numbers as `dtype`.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        self.int8, scale = quantized(weight)
        self.scale = scale.to(dtype)
        super().__init__(self.int8.to(dtype) * self.scale[:, None], dtype, bias)
        self.read_one_row(plain=False)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]:
            y = torch._weight_int8pack_mm(x.view(1, -1), self.int8, self.scale).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().__call__(x)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x))


def compute_dtype(dtype: torch.dtype, int8: bool) -> torch.dtype:
    """Of activations, keys and values, given the dtype of the weights: int8 computes in bfloat16 where that is fast."""
    if not int8:
        return dtype
    return torch.bfloat16 if packs(torch.bfloat16) else torch.float32


class InferenceModel:
    """A Transformer's forward pass, faster on a CPU. It copies the weights: make a new one when they change.

    Args:
        model: on the CPU.
        int8: hold the matrices as `Int8Matrix`, all else in `compute_dtype`.
    """

    def __init__(self, model: Transformer, int8: bool = False) -> None:
        self.config: LMConfig = model.config
        refuse_unknown(self.config, NETWORK_FIELDS, "the inference model")
        matrix = Int8Matrix if int8 else Matrix
        self.dtype = compute_dtype(model.dtype, int8)
        self.embedding = model.tok_embeddings.weight.detach().to(self.dtype)
        self.layers = [_Layer(layer, model.config, matrix, self.dtype) for layer in model.layers]
        self.norm = model.norm.weight.detach().to(self.dtype)
        self.output = matrix(model.output.weight.detach(), self.dtype)
        self.turns = torch.complex(model.rope_cos, model.rope_sin)  # complex64 [max_seq_len, D / 2]
        self.matrices = [self.output, *(matrix for layer in self.layers for matrix in layer.matrices)]
        self.kept_layout = kept_path("layout", model.config, self.dtype, int8)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def try_layouts(self, say: Callable[[str], None]) -> None:
        """Find out how one row is multiplied faster here, with plain or with packed weights; the environment's variable
        MATECONV_LAYOUT decides instead.

        Raises:
            InputError: it names neither.
        """
        asked, plain = os.environ.get(ASKED) or None, False
        if asked not in (None, "plain", "packed"):
            raise InputError(f"{ASKED}: {shown(asked)} found, plain or packed expected; or leave it unset")
        kept_plain = [matrix.plain for matrix in self.matrices if matrix.plain is not None]
        if packs(self.dtype) and sum(weight.nbytes for weight in kept_plain) >= WORTH_TRYING:
            inputs = [torch.ones(1, matrix.plain.shape[1], dtype=self.dtype) for matrix in self.matrices]

            def multiply(plain: bool) -> None:
                for matrix, x in zip(self.matrices, inputs, strict=True):
                    matrix.plain_for_one = plain
                    matrix(x)

            ways = {"packed": functools.partial(multiply, False), "plain": functools.partial(multiply, True)}

            def tell(way: str, times: str) -> None:
                say(f"weights: {way} ones read one text's row ({times}); kept in {self.kept_layout.parent}")

            with torch.inference_mode():
                plain = (asked or fastest_way(self.kept_layout, ways, tell)) == "plain"
        for matrix in self.matrices:
            matrix.read_one_row(plain)

    def hidden_states(self, tokens: Tensor, cache: KVCache, compiled: CompiledAttention | None = None) -> Tensor:
        """As Transformer.hidden_states: tokens int64 [B, T], which follow what the cache holds -> [B, T, dim].

        Args:
            compiled: attention for one token each of several texts.
        """
        attend = self._attention(tokens.shape[1], cache) if compiled is None else self._compiled(compiled, cache)
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, attend)
        cache.advance(tokens.shape[1])
        return F.rms_norm(x, x.shape[-1:], self.norm, self.config.norm_eps)

    def _attention(self, count: int, cache: KVCache) -> Attend:
        """Attention for `count` tokens of each row."""
        from_the_start = max(cache.lengths) == 0
        mask = None if from_the_start else cache.attention_mask(count)
        turns = self.turns[cache.positions(count)].unsqueeze(-2)  # [T, 1, D / 2] or [B, T, 1, D / 2]

        def attend(layer: "_Layer", qkv: Tensor) -> Tensor:
            q, k, v = layer.split(qkv)
            q = turned(q, turns).transpose(1, 2)  # [B, H, T, D]
            k, v = cache.append(layer.number, turned(k, turns).transpose(1, 2), v.transpose(1, 2))  # [B, H_kv, S, D]
            return cached_attention(q, k, v, mask, from_the_start).transpose(1, 2).flatten(2)

        return attend

    def _compiled(self, compiled: CompiledAttention, cache: KVCache) -> Attend:
        """Compiled attention for one token of each row."""
        positions = torch.tensor(cache.lengths)  # [B]
        turns = self.turns[positions][:, None, None]  # [B, 1, 1, D / 2]
        cos, sin, longest = turns.real.contiguous(), turns.imag.contiguous(), max(cache.lengths)

        def attend(layer: "_Layer", qkv: Tensor) -> Tensor:
            if layer.qk_norms:
                qkv = torch.cat(layer.split(qkv), dim=2).flatten(2)
            keys, values = cache.keys[layer.number], cache.values[layer.number]
            return compiled(qkv, cos, sin, positions, longest, keys, values)

        return attend


class _Layer:
    """A TransformerBlock with its weights laid out for the CPU."""

    def __init__(self, block: TransformerBlock, config: LMConfig, matrix: type[Matrix], dtype: torch.dtype) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.number, self.eps = attention.layer, config.norm_eps
        self.heads = (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)  # of queries, keys and values
        self.head_dim = attention.head_dim
        norms = (attention.q_norm, attention.k_norm) if config.qk_norm else ()
        self.qk_norms = [norm.weight.detach().to(dtype) for norm in norms]
        self.attention_norm = block.attention_norm.weight.detach().to(dtype)
        self.ffn_norm = block.ffn_norm.weight.detach().to(dtype)
        linears = (attention.wq, attention.wk, attention.wv)
        bias = torch.cat([linear.bias.detach() for linear in linears]) if config.qkv_bias else None
        self.wqkv = matrix(torch.cat([linear.weight.detach() for linear in linears]), dtype, bias)
        self.wo = matrix(attention.wo.weight.detach(), dtype)
        self.feed_forward = (_Experts if config.n_experts else _SwiGLU)(feed_forward, matrix, dtype)
        self.matrices = (self.wqkv, self.wo, *self.feed_forward.matrices)

    def __call__(self, x: Tensor, attend: Attend) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        normed = F.rms_norm(x, x.shape[-1:], self.attention_norm, self.eps)
        x = x + self.wo(attend(self, self.wqkv(normed)))
        normed = F.rms_norm(x, x.shape[-1:], self.ffn_norm, self.eps)
        return x + self.feed_forward(normed)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [B, T, (H + 2 H_kv) * D] -> queries [B, T, H, D], keys and values [B, T, H_kv, D]."""
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if self.qk_norms:
            q, k = (F.rms_norm(x, x.shape[-1:], gain, self.eps) for x, gain in zip((q, k), self.qk_norms, strict=True))
        return q, k, v


class _SwiGLU:
    """A FeedForward."""

    def __init__(self, module: FeedForward, matrix: type[Matrix], dtype: torch.dtype) -> None:
        weights = (module.w1.weight, module.w2.weight, module.w3.weight)
        self.w1, self.w2, self.w3 = self.matrices = [matrix(weight.detach(), dtype) for weight in weights]

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        return self.w2(self.w1.silu(x) * self.w3(x))


class _Expert:
    """One of the experts of a layer. It is narrow, so its two matrices that multiply the same vector are joined."""

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor, matrix: type[Matrix], dtype: torch.dtype) -> None:
        self.w13, self.w2 = self.matrices = [matrix(torch.cat((w1, w3)), dtype), matrix(w2, dtype)]

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, dim] -> [N, dim]."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class _Experts:
    """An ExpertsFeedForward. One row reads the weights of its own experts alone."""

    def __init__(self, module: ExpertsFeedForward, matrix: type[Matrix], dtype: torch.dtype) -> None:
        self.router = copy.deepcopy(module.router).float()
        stacks = (module.experts.w1.detach(), module.experts.w2.detach(), module.experts.w3.detach())
        self.experts = [_Expert(*weights, matrix, dtype) for weights in zip(*stacks, strict=True)]
        self.shared = None if module.shared is None else _SwiGLU(module.shared, matrix, dtype)
        parts = [*self.experts, *([] if self.shared is None else [self.shared])]
        self.matrices = [matrix for part in parts for matrix in part.matrices]

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        rows = x.flatten(0, 1)
        chosen, weights = self.router.choose(self.router.scores(F.linear(rows.float(), self.router.weight)))
        if len(rows) == 1:
            fed = torch.cat([self.experts[expert](rows) for expert in chosen[0].tolist()])[None]
        else:
            fed = self._by_expert(rows, chosen)
        y = (weights[:, None] @ fed.float()).type_as(x).view_as(x)  # [N, 1, K] @ [N, K, dim]
        return y if self.shared is None else y + self.shared(x)

    def _by_expert(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """rows [N, dim] and their experts, int64 [N, K] -> the experts' outputs [N, K, dim]; a product for each expert
        of all rows that chose it."""
        order = chosen.flatten().argsort(stable=True)  # [N * K]: the rows of expert 0, then those of expert 1, …
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        groups = zip(self.experts, rows[order // chosen.shape[1]].split(counts), strict=True)
        fed = torch.cat([expert(group) for expert, group in groups if len(group)])
        return fed[order.argsort()].view(*chosen.shape, -1)
