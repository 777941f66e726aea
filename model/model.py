"""MiniMind v1's Transformer: RMSNorm, interleaved RoPE, grouped-query attention, SwiGLU, tied embeddings.

With what an LMConfig can say beside that, it computes what Llama, Mistral, Qwen2 and Qwen3 do (`model/weights`), and
mixtures of experts (`model/experts.py`).

Plain PyTorch over a plain dataclass. Parameters carry Meta's Llama names, so MiniMind v1's files load as they are.
"""

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.accelerator import kind_of
from model.attention import (
    attention_written_out,
    cached_attention,
    causal_attention,
    document_mask,
    has_ways,
    kernels_for_any_length,
)
from model.errors import InputError, check_type
from model.experts import ExpertsFeedForward
from model.feed_forward import FeedForward, products
from model.kv_cache import KVCache
from model.LMConfig import NETWORK_FIELDS, LMConfig, refuse_unknown
from model.loss import IGNORE_INDEX, cross_entropy, token_losses


def rope_table(config: LMConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al., 2021), float32 [max_seq_len, head_dim / 2] each."""
    angles = torch.outer(torch.arange(config.max_seq_len).float(), rope_frequencies(config))
    return angles.cos(), angles.sin()


def rope_frequencies(config: LMConfig) -> Tensor:
    """Radians that each pair of a head turns from one position to the next, float32 [head_dim / 2].

    Written as transformers computes them: at position 8,000 the last bit of a frequency shows in the logits.
    """
    pairs = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**pairs
    if config.rope_scaling is None:
        return frequencies
    slowed = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return slowed
    turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)  # in the original context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)  # of the original frequency
    return torch.where(share == 1, frequencies, (1 - share) * slowed + share * frequencies)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the neighbouring pairs (2j, 2j + 1) of each head by their position's angles, in float32.

    Args:
        x: [B, T, H, D]
        cos, sin: [T, 1, D / 2], or [B, T, 1, D / 2] where rows stand at different positions.
    """
    if not torch.compiler.is_compiling() and kind_of(x.device).has_complex:
        return turned(x, torch.complex(cos, sin))
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, D / 2] each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """`apply_rope` by complex numbers cos + i sin: where each operation runs apart, one pass over memory, not seven."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [B, T, H, D / 2]
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., 2023).

    Attributes:
        joined: whether queries, keys and values are one product, see `products`.
    """

    joined = False

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.dropout = config.dropout
        self.flash_attn = config.flash_attn
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        way: str = "pytorch",
        starts: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]. Position t sees what `mask` allows; without mask and cache, 0 to t, as far as
        they are of its document, computed that way (`causal_attention`)."""
        batch, tokens, _ = x.shape
        q, k, v = products(x, (self.wq, self.wk, self.wv), self.joined)
        q = self.q_norm(q.view(batch, tokens, self.n_heads, self.head_dim))
        k = self.k_norm(k.view(batch, tokens, self.n_kv_heads, self.head_dim))
        v = v.view(batch, tokens, self.n_kv_heads, self.head_dim)
        q = apply_rope(q, cos, sin).transpose(1, 2)  # [B, H, T, D]
        k = apply_rope(k, cos, sin).transpose(1, 2)  # [B, H_kv, T, D]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, H_kv, S, D]

        dropout = self.dropout if self.training else 0.0
        if not self.flash_attn:
            is_causal, grouped = cache is None and mask is None, self.n_kv_heads < self.n_heads
            x = attention_written_out(q, k, v, mask, dropout, is_causal, grouped)
        elif cache is None:
            x = causal_attention(q, k, v, dropout, documents, mask, way, starts)
        else:
            x = cached_attention(q, k, v, mask)
        x = self.wo(x.transpose(1, 2).reshape(batch, tokens, -1))
        return F.dropout(x, self.dropout, self.training)


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        if config.n_experts:
            self.feed_forward = ExpertsFeedForward(config)
        else:
            self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.dropout)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        *position: Tensor | KVCache | str | None,
        counted: Tensor | None = None,
        keeps_feed_forward: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, T, dim] -> [B, T, dim]; `position` goes to the attention as it is.

        With `counted`, also what `ExpertsFeedForward.with_routing` returns beside its output.
        """
        x = x + self.attention(self.attention_norm(x), *position)
        fed = self._fed(x, counted) if keeps_feed_forward else self.recomputed(self._fed, x, counted)
        return x + fed if counted is None else (x + fed[0], fed[1])

    def _fed(self, x: Tensor, counted: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        x = self.ffn_norm(x)
        return self.feed_forward(x) if counted is None else self.feed_forward.with_routing(x, counted)

    def recomputed(self, function: Callable, *inputs: Tensor | KVCache | str | None, **more: Tensor | None):
        """The result of a part of this block, of which the backward pass finds the inputs alone and computes the rest
        again: activation checkpointing (Chen et al., 2016). The gradients' bits stay."""
        draws = self.training and self.feed_forward.dropout > 0
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws, **more)


class Transformer(nn.Module):
    """A decoder-only language model of the shape that an LMConfig gives.

    Attributes:
        training_attention: how a CPU computes attention where gradients are wanted, one of `attention.WAYS`.
        checkpointing: what the backward pass computes again, instead of its being kept: "none"; "selective", the
            feed-forward, whose activations are the largest; "full", the layers.
        balance_loss, router_z_loss: how much these losses of experts count in the gradient, see `forward`.
        routing: of experts, what `ExpertsFeedForward.with_routing` counted in each layer since the last time that this
            was set to 0; float32 [n_layers, n_experts + 2], a buffer that is never saved.
    """

    def __init__(self, config: LMConfig | None = None) -> None:
        super().__init__()
        config = LMConfig() if config is None else config
        check_type("config", config, LMConfig, "LMConfig(dim=512) makes one")
        self.training_attention, self.checkpointing = "chunks", "none"
        self.balance_loss, self.router_z_loss = 0.0, 0.0
        self.config = config
        refuse_unknown(config, NETWORK_FIELDS, "the network")
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_table(config)  # rebuilt, never saved
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        if config.n_experts:
            self.register_buffer("routing", torch.zeros(config.n_layers, config.n_experts + 2), persistent=False)
        self.init_weights()

    def _apply(self, fn, recurse: bool = True):
        """Move or cast as `nn.Module` does (`to`, `half`, `cuda`), but keep the RoPE table in float32.

        In bfloat16 its cosines would have 8 bits, too few to tell neighbouring positions apart in the slow pairs.
        """
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:  # a device whose tensors can't take a CPU's place gets a new one for each name
            self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_table(self.config)
        self.rope_cos, self.rope_sin = cos.to(self.rope_cos.device), sin.to(self.rope_sin.device)
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw new weights from torch's global generator.

        | weights                                     | distribution                         |
        |---------------------------------------------|--------------------------------------|
        | embedding, output, wq, wk, wv, w1, w3,      | N(0, 0.02)                           |
        | routers                                     |                                      |
        | wo, w2 (they add to the residual stream)    | N(0, 0.02 / sqrt(2 n_layers)), GPT-2 |
        | norms                                       | 1                                    |
        | biases                                      | 0                                    |
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith(".bias") else 1.0)
            else:
                residual = name.endswith(("wo.weight", "w2.weight", "experts.w2"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02)

    def compute_experts(self, way: str) -> None:
        """Have the experts' products computed one of `experts.WAYS`; a dense model has none."""
        for layer in self.layers if self.config.n_experts else ():
            layer.feed_forward.experts.way = way

    def join_products(self, joined: bool) -> None:
        """Have queries, keys and values computed by one product, and the two hidden states of SwiGLU; not those of
        experts, which are stacked."""
        for module in self.modules():
            if isinstance(module, (Attention, FeedForward)):
                module.joined = joined

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.tok_embeddings.weight.dtype

    def parameter_count(self) -> int:
        """Numbers in all parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def active_parameter_count(self) -> int:
        """Those of them that compute a token: of experts, the chosen ones'."""
        return sum(self._active(parameter) for parameter in self.parameters())

    def _active(self, parameter: nn.Parameter) -> int:
        """Numbers of a parameter that compute a token; of a stack of experts [E, rows, columns], a share."""
        is_stack = parameter.dim() == 3
        return parameter.numel() // len(parameter) * self.config.n_active_experts if is_stack else parameter.numel()

    def layer_shapes(self) -> set[tuple[int, int]]:
        """The shapes [outputs, inputs] of the layers' matrices."""
        return {tuple(parameter.shape[-2:]) for parameter in self.layers.parameters() if parameter.dim() >= 2}

    def training_flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for one token of a full sample.

        6 for each weight that computes it, 4 for one that is frozen, whose gradient is not computed; and causal
        attention, which is half of the square (Chowdhery et al., 2022, appendix B).
        """
        weights = {id(p): (6 if p.requires_grad else 4) * self._active(p) for p in self.parameters()}
        if not self.config.tie_embeddings:
            del weights[id(self.tok_embeddings.weight)]  # reading a row costs nothing
        attention = self.config.n_layers * self.config.n_heads * self.config.head_dim * self.config.max_seq_len
        return sum(weights.values()) + 6 * attention

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """What the output layer reads: tokens int64 [B, T] -> [B, T, dim], normalised.

        With a cache, `tokens` continue the texts that it holds, and are added to it.
        """
        return self._hidden_states(tokens, cache, documents)[0]

    def _hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None,
        documents: Tensor | None,
        counted: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What `hidden_states` returns; and with `counted`, what each layer's experts return beside their output,
        float32 [n_layers, n_experts + 2].

        Args:
            counted: see `ExpertsFeedForward.with_routing`; None for a dense model.
        """
        count = tokens.shape[1]
        if cache is None:
            mask, cos, sin = None, self.rope_cos[:count], self.rope_sin[:count]
        else:
            mask, positions = cache.attention_mask(count), cache.positions(count)
            cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [T, 1, D / 2] or [B, T, 1, D / 2]: the same for all heads

        dropout = self.config.dropout if self.training else 0.0
        x = F.dropout(self.tok_embeddings(tokens), dropout)
        trains = cache is None and torch.is_grad_enabled()
        chooses = trains and has_ways(self.config.flash_attn, x.device, count, dropout)
        way = self.training_attention if chooses else "pytorch"
        if dropout or not self.config.flash_attn:
            starts = None
        if documents is not None and starts is None and way == "pytorch":
            mask = document_mask(documents)  # once for all layers; in chunks none is needed
        checkpointing, routing = self.checkpointing if trains else "none", []
        with kernels_for_any_length(self.device) if cache is not None else contextlib.nullcontext():
            for layer in self.layers:
                inputs = x, cos, sin, mask, cache, documents, way, starts
                if checkpointing == "full":
                    x = layer.recomputed(layer, *inputs, counted=counted)
                else:
                    x = layer(*inputs, counted=counted, keeps_feed_forward=checkpointing == "none")
                if counted is not None:
                    x, of_layer = x
                    routing.append(of_layer)
        if cache is not None:
            cache.advance(count)
        return self.norm(x), torch.stack(routing) if routing else None

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        per_token: bool = False,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with `targets` their loss.

        Where experts are trained, `routing` gets what they count of the tokens whose targets count. The loss then has,
        unless per_token, the gradient of itself plus `balance_loss` times the balance loss and `router_z_loss` times
        the z-loss of all layers; its value is the cross-entropy alone.

        Args:
            tokens: int64 [B, T], T at most `max_seq_len` together with what the cache holds.
            targets: int64 [B, T], the next token of each position; IGNORE_INDEX where none counts.
            cache: keys and values of the tokens before these.
            documents: int64 [B, T], the number of each token's document, which never falls: a token sees those of its
                own document only, as if each document was run alone (RoPE's positions are relative). Without a cache.
            per_token: return the loss of each target rather than their sum.
            starts: `document_starts(documents)`, for attention that skips other documents on a GPU, in 16 bits.

        Returns:
            logits [B, T, vocab_size]; with targets, the cross-entropy in nats, summed over all targets that count
            (float32, 0-dimensional): a sum, so that micro-batches and ranks add up to one large batch exactly. With
            per_token that of each target, float32 [B, T], 0 where none counts.
        """
        counts = self.config.n_experts > 0 and targets is not None and torch.is_grad_enabled()
        counted = targets != IGNORE_INDEX if counts else None
        hidden, routing = self._hidden_states(tokens, cache, documents, counted, starts)
        if targets is None:
            return self.output(hidden)
        loss = (token_losses if per_token else cross_entropy)(hidden, self.output.weight, targets)
        if routing is None:
            return loss
        self.routing += routing.detach()
        if per_token:
            return loss
        balance, z = routing[:, -2:].sum(0)
        beside = self.balance_loss * balance + self.router_z_loss * z
        return loss + (beside - beside.detach())

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As `nn.Module.load_state_dict`, with one clear line where the weights belong to another model.

        Raises:
            InputError: a key is missing, unknown or of another shape; or the tied pair holds two matrices.
        """
        tied = ("tok_embeddings.weight", "output.weight")
        if self.config.tie_embeddings and all(key in state_dict for key in tied):
            first, second = (state_dict[key] for key in tied)
            if first.data_ptr() != second.data_ptr() and not torch.equal(first, second):
                raise InputError("the weights' embedding and output differ, but tie_embeddings makes them one matrix")
        own = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state_dict.items()}
        if strict and own != given:
            raise InputError(f"the weights do not fit the model: {_first_difference(own, given)}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _first_difference(own: dict[str, tuple], given: dict[str, tuple]) -> str:
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        kinds = {"missing": missing, "unknown": unknown}
        return " and ".join(f"{len(keys)} {kind} (first: {keys[0]})" for kind, keys in kinds.items() if keys)
    key = next(key for key in own if own[key] != given[key])
    return f"{key} is {list(given[key])}, the model's is {list(own[key])}"
