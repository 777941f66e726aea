"""The code that is compiled for generating on a CPU: the whole decode step for one text, the attention for several.

The decode step becomes one C++ function, so that a token costs little beyond reading the weights. Each product is
written as a multiplication and a sum over a row of the weight: torch.compile's C++ backend turns each into a loop that
streams the weight from memory, and puts all loops of the step into one parallel region. In eager PyTorch the same
would need a temporary as large as the weight. A few texts share each loop, in groups of a fixed size: left open, the
size would end up as the innermost loop. For more texts oneDNN's products are faster; what PyTorch lacks there is a fast
kernel for the attention of many short queries.

All are compiled for a shape, not for its weights, which they find in the model's own memory: `compiled_step.py`
keeps and runs the result.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.experts import TINY, ExpertsFeedForward
from model.feed_forward import FeedForward
from model.kv_cache import SPARE
from model.LMConfig import NETWORK_FIELDS, LMConfig, refuse_unknown
from model.model import Transformer, TransformerBlock, apply_rope

OPTIONS = {
    "realize_reads_threshold": 0,  # what several loops read is computed once, not in each of their iterations
    "aot_inductor.package_constants_in_so": False,  # the weights stay out of the file
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and the sum it goes into are one instruction
}


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and a scale float32 [N] for each row; their product is the nearest to the weight."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def _loads_bytes_slowly() -> bool:
    """Compiled code for AVX2 loads eight numbers of 8 bits by way of memory, which takes ten times as long as what they
    are loaded for; AVX-512 has masks for it."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def in_words(weight: Tensor) -> Tensor:
    """int8 [N, K] -> float32 [N, K / 4] that are never computed with: byte j of word k, from the lowest, is column
    j K / 4 + k. Floats are loaded whole, and shifts take the bytes out."""
    rows, columns = weight.shape
    return weight.view(rows, 4, columns // 4).transpose(1, 2).contiguous().view(torch.float32).view(rows, -1)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()


def _weighted(scores: Tensor, values: Tensor) -> Tensor:
    """softmax(scores) values, [..., S] and [..., S, D] -> [..., D]; divided at the end, not in the loop over S."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights[..., None] * values).sum(-2) / weights.sum(-1, keepdim=True)


class _Matrix(nn.Module):
    """x [K] or [G, K] -> x Wᵀ + bias [N] or [G, N] in float32, of weights of any type."""

    def __init__(self, weight: Tensor, int8: bool, bias: Tensor | None = None) -> None:
        super().__init__()
        weight, scale = weight.detach(), None
        if int8:
            weight, scale = quantized(weight)
        self.has_words = int8 and _loads_bytes_slowly() and weight.shape[1] % 4 == 0
        self.register_buffer("weight", in_words(weight) if self.has_words else weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 1:
            y = self.products(self.weight, x)
        else:  # a sum for each text, in one loop over the weight
            y = torch.stack([self._rows(self.weight, x[row]) for row in range(len(x))])
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias.float()

    def products(self, weight: Tensor, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """weight [N, K] and x [K] -> their products [N], without scale and bias.

        Args:
            chosen: int64 [C], of a weight [E, N, K] the matrices that are read; x is [K] or [C, K], the result [C, N].
        """
        # What is read once is computed where it is read, for every row of the weight again; so x is read twice. The
        # chosen matrices are read once, in two halves: read twice, they would be copied.
        halves = weight.tensor_split(2, dim=-2)
        read = halves if chosen is None else [half[chosen] for half in halves]
        return torch.cat([self._rows(half, x) for half in read], dim=-1)

    def _rows(self, weight: Tensor, x: Tensor) -> Tensor:
        """weight [N, K] and x [K] -> [N]; or [C, N, K] and [K] or [C, K] -> [C, N]. As words, the weight's last side is
        K / 4."""
        if not self.has_words:
            return (weight.float() * x[..., None, :]).sum(-1)
        words, parts = weight.view(torch.int32), x.unflatten(-1, (4, 1, -1)).unbind(-3)
        first, second, third, fourth = parts  # [..., 1, K / 4]
        y = ((words << 24) >> 24).float() * first + ((words << 16) >> 24).float() * second
        return (y + ((words << 8) >> 24).float() * third + (words >> 24).float() * fourth).sum(-1)


class _SwiGLU(nn.Module):
    """A FeedForward."""

    def __init__(self, module: FeedForward, int8: bool) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (_Matrix(linear.weight, int8) for linear in (module.w1, module.w2, module.w3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _Stack(nn.Module):
    """A matrix of each expert; those of some experts are read where they are."""

    def __init__(self, stack: Tensor, int8: bool) -> None:
        super().__init__()
        self.n_experts = len(stack)
        self.matrix = _Matrix(stack.detach().flatten(0, 1), int8)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [columns], or [K, columns] with one row for each expert; chosen int64 [K] -> [K, rows]."""
        y = self.matrix.products(self.matrix.weight.unflatten(0, (self.n_experts, -1)), x, chosen)
        return y if self.matrix.scale is None else y * self.matrix.scale.unflatten(0, (self.n_experts, -1))[chosen]


class _Experts(nn.Module):
    """An ExpertsFeedForward; a text reads the weights of its own experts alone."""

    def __init__(self, module: ExpertsFeedForward, int8: bool) -> None:
        super().__init__()
        router = module.router
        self.n_active, self.normalize, self.scores = router.n_active, router.normalize, router.scores
        self.by_logits = router.score == "softmax" and router.bias is None  # softmax keeps their order
        self.router = _Matrix(router.weight, int8=False)
        # As a matrix, since torch.compile copies the numbers of a vector of up to eight into the code.
        self.register_buffer("bias", None if router.bias is None else router.bias[None])
        stacks = (module.experts.w1, module.experts.w2, module.experts.w3)
        self.w1, self.w2, self.w3 = (_Stack(stack, int8) for stack in stacks)
        self.shared = None if module.shared is None else _SwiGLU(module.shared, int8)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            y = torch.stack([self._fed(row) for row in x.unbind()])
        else:
            y = self._fed(x)
        return y if self.shared is None else y + self.shared(x)

    def _fed(self, x: Tensor) -> Tensor:
        """x [dim] -> [dim]."""
        chosen, weights = self._choose(self.router(x))
        hidden = F.silu(self.w1(x, chosen)) * self.w3(x, chosen)  # [K, h]
        return (self.w2(hidden, chosen) * weights[:, None]).sum(0)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As Router.choose, for one token: logits [E] -> int64 and float32 [K].

        Threads wait for each other after each loop, which takes longer than these do. So there are few: one counts the
        experts that come before each, another finds those in the first K places; `topk` would be a call between them.
        """
        scores = logits if self.by_logits else self.scores(logits)
        preferred = scores if self.bias is None else scores + self.bias[0]
        numbers, last = torch.arange(len(scores)), len(scores) - 1
        own, others = preferred[:, None], preferred[None]
        before = (others > own) | ((others == own) & (numbers < numbers[:, None]))  # [E, E]
        found = before.sum(1) == torch.arange(self.n_active)[:, None]  # [K, E]
        chosen = torch.where(found, numbers, 0).sum(1).clamp(max=last)  # of logits that are no numbers, all are first
        weights = torch.where(found, scores, 0.0).sum(1)
        if self.by_logits:
            highest, logits_of_chosen = weights[:1], weights
            weights = (logits_of_chosen - highest).exp()
            total = weights if self.normalize else (logits - highest).exp()
            return chosen, weights / total.sum()
        return chosen, weights / weights.sum().clamp(min=TINY) if self.normalize else weights


class _Layer(nn.Module):
    """A TransformerBlock for one token each of one text [dim] or of a group [G, dim]."""

    def __init__(self, block: TransformerBlock, config: LMConfig, int8: bool) -> None:
        super().__init__()
        self.config = config
        for name in ("wq", "wk", "wv", "wo"):
            linear = getattr(block.attention, name)
            self.add_module(name, _Matrix(linear.weight, int8, linear.bias))
        self.feed_forward = (_Experts if config.n_experts else _SwiGLU)(block.feed_forward, int8)
        self.register_buffer("attention_norm", block.attention_norm.weight.detach())
        self.register_buffer("ffn_norm", block.ffn_norm.weight.detach())
        if config.qk_norm:
            self.register_buffer("q_norm", block.attention.q_norm.weight.detach())
            self.register_buffer("k_norm", block.attention.k_norm.weight.detach())

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x float32 -> the same shape; `attend` takes queries [..., H, D], keys and values [..., H_kv, D]."""
        eps, head_dim = self.config.norm_eps, self.config.head_dim
        h = _normed(x, self.attention_norm, eps)
        q, k, v = (matrix(h).unflatten(-1, (-1, head_dim)) for matrix in (self.wq, self.wk, self.wv))
        if self.config.qk_norm:
            q, k = _normed(q, self.q_norm, eps), _normed(k, self.k_norm, eps)
        x = x + self.wo(attend(q, k, v))
        h = _normed(x, self.ffn_norm, eps)
        return x + self.feed_forward(h)


class _Network(nn.Module):
    """A Transformer's weights, which it shares with the model.

    Args:
        int8: hold the matrices, except the embedding, as int8 (a copy).
    """

    def __init__(self, model: Transformer, int8: bool = False) -> None:
        super().__init__()
        self.config = model.config
        refuse_unknown(self.config, NETWORK_FIELDS, "the compiled step")
        self.layers = nn.ModuleList(_Layer(block, model.config, int8) for block in model.layers)
        self.output = _Matrix(model.output.weight, int8)
        self.register_buffer("embedding", model.tok_embeddings.weight.detach())
        self.register_buffer("norm", model.norm.weight.detach())
        self.register_buffer("rope_cos", model.rope_cos)
        self.register_buffer("rope_sin", model.rope_sin)

    def logits(self, x: Tensor) -> Tensor:
        """What the last layer gives, [dim] or [G, dim] -> float32 [V] or [G, V]."""
        return self.output(_normed(x, self.norm, self.config.norm_eps))


class _Cache(nn.Module):
    """One layer's keys and values of one text, float32, the keys with the slots last."""

    def __init__(self, config: LMConfig, device: torch.device) -> None:
        super().__init__()
        slots = config.max_seq_len + SPARE
        self.register_buffer("keys", torch.zeros(config.n_kv_heads, config.head_dim, slots, device=device))
        self.register_buffer("values", torch.zeros(config.n_kv_heads, slots, config.head_dim, device=device))


class DecodeStep(_Network):
    """The Transformer for the next token of one text; activations, keys and values in float32."""

    def __init__(self, model: Transformer, int8: bool = False) -> None:
        super().__init__(model, int8)
        self.caches = nn.ModuleList(_Cache(model.config, model.norm.weight.device) for _ in model.layers)

    def forward(self, token: Tensor, position: Tensor, places: Tensor) -> Tensor:
        """The logits that follow a token, float32 [V]. Its keys and values go into the caches.

        Args:
            token, position: int64 [1].
            places: any tensor with one number per token of the text, this one included: a length as a Python
                number would be compiled in.
        """
        x = self.embedding[token][0].float()
        cos, sin = self.rope_cos[position], self.rope_sin[position]  # [1, D / 2]
        kv_heads, head_dim, tokens = self.config.n_kv_heads, self.config.head_dim, places.shape[0]
        for layer, cache in zip(self.layers, self.caches, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, cache: _Cache = cache) -> Tensor:
                q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
                cache.keys.index_copy_(2, position, k[:, :, None])
                cache.values.index_copy_(1, position, v[:, None])
                q = q.view(kv_heads, -1, head_dim, 1) * head_dim**-0.5  # [H_kv, H / H_kv, D, 1]
                scores = (cache.keys[:, None, :, :tokens] * q).sum(2)  # [H_kv, H / H_kv, S]
                return _weighted(scores, cache.values[:, None, :tokens]).flatten()  # of [H_kv, H / H_kv, D]

            x = layer(x, attend)
        return self.logits(x)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, places: Tensor, keys: Tensor,
    values: Tensor,
) -> Tensor:  # fmt: skip
    """The heads' outputs [B, H * D] for a token each of several texts; the new keys and values go into the caches.

    Args:
        q: float32 [B, 1, H, D]
        k, v: float32 [B, 1, H_kv, D]
        cos, sin: float32 [B, 1, 1, D / 2], of the positions.
        positions: int64 [B], of the tokens.
        places: int64 [S], 0 to the largest position.
        keys, values: [B, H_kv, C, D], C more than S.
    """
    rows, tokens, kv_heads, head_dim = q.shape[0], places.shape[0], k.shape[2], k.shape[3]
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    row = torch.arange(rows)
    keys[row, :, positions] = k[:, 0].type_as(keys)
    values[row, :, positions] = v[:, 0].type_as(values)

    q = q.view(rows, kv_heads, -1, 1, head_dim) * head_dim**-0.5  # [B, H_kv, H / H_kv, 1, D]
    scores = (keys[:, :, None, :tokens].float() * q).sum(-1)  # [B, H_kv, H / H_kv, S]
    scores = torch.where(places <= positions[:, None, None, None], scores, -torch.inf)
    heads = _weighted(scores, values[:, :, None, :tokens].float())  # [B, H_kv, H / H_kv, D]
    return heads.view(rows, -1)


class GroupStep(_Network):
    """The Transformer for the next token of each of a fixed number of texts; keys and values in caches of any type."""

    def forward(self, tokens: Tensor, positions: Tensor, places: Tensor, caches: list[Tensor]) -> Tensor:
        """The logits that follow, float32 [G, V]. The tokens' keys and values go into the caches.

        Args:
            tokens, positions: int64 [G]. A position past the context: a row without a text.
            places: int64 [S], 0 to the largest position of a text.
            caches: keys and values [G, H_kv, C, D] of each layer in turn.
        """
        x = self.embedding[tokens].float()
        turns = positions.clamp(max=self.config.max_seq_len - 1)
        cos, sin = (table[turns][:, None, None] for table in (self.rope_cos, self.rope_sin))  # [G, 1, 1, D / 2]
        for layer, keys, values in zip(self.layers, caches[::2], caches[1::2], strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                return _attended(q[:, None], k[:, None], v[:, None], cos, sin, positions, places, keys, values)

            x = layer(x, attend)
        return self.logits(x)


class BatchAttention(nn.Module):
    """The attention of one layer for the next token of several texts, which may stand at different positions."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        refuse_unknown(config, NETWORK_FIELDS, "the compiled attention")
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim

    def forward(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, places: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """The heads' outputs [B, 1, H * D]; the new keys and values go into the caches.

        Args:
            qkv: [B, 1, (H + 2 H_kv) * D], without qk_norm.
            cos, sin, positions, places, keys, values: as `_attended` takes them.
        """
        q, k, v = qkv.float().view(qkv.shape[0], 1, -1, self.head_dim).split(self.heads, dim=2)
        return _attended(q, k, v, cos, sin, positions, places, keys, values)[:, None].type_as(qkv)


def compile_step(config: LMConfig, dtype: torch.dtype, int8: bool, path: Path) -> None:
    """Compile the step of all models of that shape into a file, in half a minute or so.

    Args:
        dtype: of the weights.
        int8: hold the matrices, except the embedding, as int8 instead.

    Raises:
        Exception: of PyTorch or of the C++ compiler.
        OSError: the file cannot be written.
    """
    with torch.device("meta"):
        step = DecodeStep(Transformer(config).to(dtype), int8)
    token, position = (torch.zeros(1, dtype=torch.int64) for _ in range(2))  # one tensor twice would be one input
    tokens = torch.export.Dim("tokens", min=2, max=config.max_seq_len)
    _compile(step.to_empty(device="cpu"), (token, position, torch.zeros(9)), (None, None, {0: tokens}), path)


def compile_group(
    config: LMConfig, dtype: torch.dtype, int8: bool, cache_dtype: torch.dtype, rows: int, path: Path
) -> None:
    """The same for a group of texts, which takes longer.

    Args:
        dtype, int8: as above.
        cache_dtype: of the keys and values.
        rows: texts of the group.
    """
    with torch.device("meta"):
        step = GroupStep(Transformer(config).to(dtype), int8)
    shape = (rows, config.n_kv_heads, config.max_seq_len + SPARE, config.head_dim)
    caches = [torch.zeros(shape, dtype=cache_dtype) for _ in range(2 * config.n_layers)]
    tokens, positions = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
    example = (tokens, positions, torch.arange(min(9, config.max_seq_len)), caches)
    by_token = {0: torch.export.Dim("tokens", min=2, max=config.max_seq_len)}
    _compile(step.to_empty(device="cpu"), example, (None, None, by_token, [None] * len(caches)), path)


def compile_attention(config: LMConfig, dtype: torch.dtype, path: Path) -> None:
    """The same for the attention of several texts.

    Args:
        dtype: of queries, keys and values, and of those in the caches.
    """
    rows, slots, length = 6, config.max_seq_len + SPARE, min(9, config.max_seq_len)
    heads = torch.zeros(rows, 1, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, dtype=dtype)
    cos, sin = (torch.zeros(rows, 1, 1, config.head_dim // 2) for _ in range(2))
    cache = torch.zeros(rows, config.n_kv_heads, slots, config.head_dim, dtype=dtype)
    positions, places = torch.zeros(rows, dtype=torch.int64), torch.arange(length)
    example = (heads, cos, sin, positions, places, cache, cache.clone())
    by_row = {0: torch.export.Dim("rows", min=2, max=2**16)}
    by_token = {0: torch.export.Dim("tokens", min=2, max=config.max_seq_len)}
    _compile(BatchAttention(config), example, (by_row, by_row, by_row, by_row, by_token, by_row, by_row), path)


@torch.no_grad()
def _compile(module: nn.Module, example: tuple, dynamic_shapes: tuple, path: Path) -> None:
    """Compile a module into a file, which is whole or not there."""
    program = torch.export.export(module, example, dynamic_shapes=dynamic_shapes)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "compiled.pt2"), inductor_configs=OPTIONS
        )
        os.replace(made, path)
