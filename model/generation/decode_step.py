"""The code that is compiled for generating on a CPU: the whole decode step for one text, the attention for several.

The decode step becomes one C++ function, so that a token costs little beyond reading the weights. Each product is
written as a multiplication and a sum over a row of the weight: torch.compile's C++ backend turns each into a loop that
streams the weight from memory, and puts all loops of the step into one parallel region. In eager PyTorch the same
would need a temporary as large as the weight. For several texts oneDNN's products are faster; what PyTorch lacks is a
fast kernel for the attention of many short queries.

Both are compiled for a shape, not for its weights, which they find in the model's own memory: `compiled_step.py`
keeps and runs the result.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()


def _weighted(scores: Tensor, values: Tensor) -> Tensor:
    """softmax(scores) values, [..., S] and [..., S, D] -> [..., D]; divided at the end, not in the loop over S."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights[..., None] * values).sum(-2) / weights.sum(-1, keepdim=True)


class _Matrix(nn.Module):
    """x [K] -> x Wᵀ + bias [N] in float32, of weights of any type."""

    def __init__(self, linear: nn.Linear, int8: bool) -> None:
        super().__init__()
        weight, scale = linear.weight.detach(), None
        if int8:
            weight, scale = quantized(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight.float() * x).sum(-1)
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias.float()


class _Layer(nn.Module):
    """A TransformerBlock for one token of one text."""

    def __init__(self, block: TransformerBlock, config: LMConfig, int8: bool) -> None:
        super().__init__()
        self.config = config
        for name in ("wq", "wk", "wv", "wo"):
            self.add_module(name, _Matrix(getattr(block.attention, name), int8))
        for name in ("w1", "w2", "w3"):
            self.add_module(name, _Matrix(getattr(block.feed_forward, name), int8))
        self.register_buffer("attention_norm", block.attention_norm.weight.detach())
        self.register_buffer("ffn_norm", block.ffn_norm.weight.detach())
        if config.qk_norm:
            self.register_buffer("q_norm", block.attention.q_norm.weight.detach())
            self.register_buffer("k_norm", block.attention.k_norm.weight.detach())
        slots = config.max_seq_len + SPARE
        device = block.attention_norm.weight.device
        self.register_buffer("keys", torch.zeros(config.n_kv_heads, config.head_dim, slots, device=device))
        self.register_buffer("values", torch.zeros(config.n_kv_heads, slots, config.head_dim, device=device))

    def forward(self, x: Tensor, position: Tensor, tokens: int, cos: Tensor, sin: Tensor) -> Tensor:
        """x float32 [dim] -> [dim]; position int64 [1], cos and sin [D / 2]."""
        eps = self.config.norm_eps
        x = x + self._attention(_normed(x, self.attention_norm, eps), position, tokens, cos, sin)
        h = _normed(x, self.ffn_norm, eps)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))

    def _attention(self, h: Tensor, position: Tensor, tokens: int, cos: Tensor, sin: Tensor) -> Tensor:
        kv_heads, head_dim = self.config.n_kv_heads, self.config.head_dim
        q = self.wq(h).view(-1, head_dim)  # [H, D]
        k, v = self.wk(h).view(kv_heads, head_dim), self.wv(h).view(kv_heads, head_dim)  # [H_kv, D] each
        if self.config.qk_norm:
            eps = self.config.norm_eps
            q, k = _normed(q, self.q_norm, eps), _normed(k, self.k_norm, eps)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        self.keys.index_copy_(2, position, k[:, :, None])
        self.values.index_copy_(1, position, v[:, None])

        q = q.view(kv_heads, -1, head_dim, 1) * head_dim**-0.5  # [H_kv, H / H_kv, D, 1]
        scores = (self.keys[:, None, :, :tokens] * q).sum(2)  # [H_kv, H / H_kv, S]
        heads = _weighted(scores, self.values[:, None, :tokens])  # [H_kv, H / H_kv, D]
        return self.wo(heads.flatten())


class DecodeStep(nn.Module):
    """The Transformer for the next token of one text; activations, keys and values in float32.

    Args:
        model: whose weights it shares.
        int8: hold the matrices, except the embedding, as int8 (a copy).
    """

    def __init__(self, model: Transformer, int8: bool = False) -> None:
        super().__init__()
        self.config = model.config
        refuse_unknown(self.config, NETWORK_FIELDS, "the compiled step")
        self.layers = nn.ModuleList(_Layer(block, model.config, int8) for block in model.layers)
        self.output = _Matrix(model.output, int8)
        self.register_buffer("embedding", model.tok_embeddings.weight.detach())
        self.register_buffer("norm", model.norm.weight.detach())
        self.register_buffer("rope_cos", model.rope_cos)
        self.register_buffer("rope_sin", model.rope_sin)

    def forward(self, token: Tensor, position: Tensor, places: Tensor) -> Tensor:
        """The logits that follow a token, float32 [V]. Its keys and values go into the caches.

        Args:
            token, position: int64 [1].
            places: any tensor with one number per token of the text, this one included: a length as a Python
                number would be compiled in.
        """
        x = self.embedding[token][0].float()
        cos, sin = self.rope_cos[position], self.rope_sin[position]  # [1, D / 2]
        for layer in self.layers:
            x = layer(x, position, places.shape[0], cos, sin)
        return self.output(_normed(x, self.norm, self.config.norm_eps))


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
            cos, sin: float32 [B, 1, 1, D / 2], of the positions.
            positions: int64 [B], of the tokens.
            places: int64 [S], 0 to the largest position.
            keys, values: [B, H_kv, C, D], C more than S.
        """
        rows, tokens = qkv.shape[0], places.shape[0]
        q, k, v = qkv.float().view(rows, 1, -1, self.head_dim).split(self.heads, dim=2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        row = torch.arange(rows)
        keys[row, :, positions] = k[:, 0].type_as(keys)
        values[row, :, positions] = v[:, 0].type_as(values)

        q = q.view(rows, self.heads[1], -1, 1, self.head_dim) * self.head_dim**-0.5  # [B, H_kv, H / H_kv, 1, D]
        scores = (keys[:, :, None, :tokens].float() * q).sum(-1)  # [B, H_kv, H / H_kv, S]
        scores = torch.where(places <= positions[:, None, None, None], scores, -torch.inf)
        heads = _weighted(scores, values[:, :, None, :tokens].float())  # [B, H_kv, H / H_kv, D]
        return heads.view(rows, 1, -1).type_as(qkv)


def compile_step(config: LMConfig, dtype: torch.dtype, int8: bool, path: Path) -> None:
    """Compile the step of all models of that shape into a file, in half a minute or so."""
    with torch.device("meta"):
        step = DecodeStep(Transformer(config).to(dtype), int8)
    token, position = (torch.zeros(1, dtype=torch.int64) for _ in range(2))  # one tensor twice would be one input
    tokens = torch.export.Dim("tokens", min=2, max=config.max_seq_len)
    _compile(step.to_empty(device="cpu"), (token, position, torch.zeros(9)), (None, None, {0: tokens}), path)


def compile_attention(config: LMConfig, dtype: torch.dtype, path: Path) -> None:
    """The same for the attention of several texts."""
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
