"""The shape of a model."""

from collections.abc import Set
from dataclasses import dataclass, fields

from model.errors import InputError, shown
from model.options import check_options, setting

MOST_TOKENS = 2**24  # rows of an embedding; the largest tokenizers have a quarter of a million
ROPE_SCALINGS = ("linear", "llama3")
EXPERT_SCORES = ("softmax", "sigmoid")


@dataclass
class LMConfig:
    """The shape of a Transformer. The defaults are MiniMind v1's: 26,878,464 parameters.

    Raises:
        InputError: naming every value that no model can have.
    """

    dim: int = setting(512, "width of the residual stream", at_least=1, at_most=2**20)
    n_layers: int = setting(8, "layers", at_least=1, at_most=10_000)
    n_heads: int = setting(16, "query heads", at_least=1, at_most=2**20)
    n_kv_heads: int = setting(8, "key and value heads (GQA); must divide n_heads", at_least=1, at_most=2**20)
    head_dim: int | None = setting(None, "width of a head, even; null: dim / n_heads", at_least=2, at_most=2**20)
    vocab_size: int = setting(6400, "rows of the embedding", at_least=1, at_most=MOST_TOKENS)
    hidden_dim: int | None = setting(
        None, "width of the feed-forward; null: 8/3 of dim, rounded up to multiple_of", at_least=1, at_most=2**24
    )
    multiple_of: int = setting(
        64, "an automatic hidden_dim is rounded up to a multiple of this", at_least=1, at_most=2**20
    )
    norm_eps: float = setting(1e-5, "added under the root of RMSNorm", above=0, at_most=1)
    max_seq_len: int = setting(512, "tokens of a training sample and of the context", at_least=1, at_most=2**20)
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", above=0, at_most=1e12)
    rope_scaling: str | None = setting(
        None,
        "slower turns for a longer context, linear (Chen et al., 2023) or llama3 (Llama 3.1); null: as rope_theta says",
        choices=ROPE_SCALINGS,
    )
    rope_factor: float = setting(1.0, "of rope_scaling: how many times slower", at_least=1, at_most=1e6)
    rope_low_freq_factor: float = setting(
        1.0, "of llama3: pairs that turn less often in the original context are slowed in full", above=0, at_most=1e6
    )
    rope_high_freq_factor: float = setting(
        4.0, "of llama3: pairs that turn more often than this are not slowed", above=0, at_most=1e6
    )
    rope_original_max_seq_len: int = setting(8192, "of llama3: the original context", at_least=1, at_most=2**30)
    dropout: float = setting(0.0, "probability of dropout", at_least=0, below=1)
    flash_attn: bool = setting(True, "scaled_dot_product_attention; false: written out in plain PyTorch, slower")
    tie_embeddings: bool = setting(True, "output layer and embedding share one matrix")
    qk_norm: bool = setting(False, "RMSNorm of query and key heads, as in Qwen3 (not in MiniMind v1)")
    qkv_bias: bool = setting(False, "biases of queries, keys and values, as in Qwen2 (not in MiniMind v1)")
    n_experts: int = setting(
        0,
        "experts of each layer's feed-forward, some of which a router chooses for each token; 0: dense",
        at_least=0,
        at_most=2**16,
    )
    n_active_experts: int = setting(2, "experts that the router chooses for a token", at_least=1, at_most=2**16)
    n_shared_experts: int = setting(
        0, "experts that every token passes through beside those chosen", at_least=0, at_most=2**16
    )
    expert_hidden_dim: int | None = setting(None, "width of an expert; null: hidden_dim", at_least=1, at_most=2**24)
    shared_hidden_dim: int | None = setting(
        None,
        "width of all shared experts together; null: n_shared_experts * expert_hidden_dim",
        at_least=1,
        at_most=2**28,
    )
    expert_score: str = setting("softmax", "how the router's logits become the experts' scores", choices=EXPERT_SCORES)
    normalize_expert_weights: bool = setting(True, "divide the scores of the chosen experts by their sum")
    expert_bias: bool = setting(
        False, "a bias for each expert, which only decides the choice and balances the load, as in DeepSeek-V3"
    )

    def __post_init__(self) -> None:
        if problems := check_options(self) or impossible_shape(vars(self)):
            raise InputError("; ".join(problems))
        if self.hidden_dim is None:
            hidden_dim = int(8 * self.dim / 3)
            self.hidden_dim = self.multiple_of * -(-hidden_dim // self.multiple_of)
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads
        if self.n_experts and self.expert_hidden_dim is None:
            self.expert_hidden_dim = self.hidden_dim
        if self.n_shared_experts and self.shared_hidden_dim is None:
            self.shared_hidden_dim = self.n_shared_experts * self.expert_hidden_dim


# What says that a feed-forward consists of experts, and how; all have their defaults where n_experts is 0.
EXPERT_FIELDS = {
    "n_experts", "n_active_experts", "n_shared_experts", "expert_hidden_dim", "shared_hidden_dim", "expert_score",
    "normalize_expert_weights", "expert_bias",
}  # fmt: skip
# Fields that the network, the inference model and the compiled step all compute with. One of them that learns a new
# field adds it where it calls `refuse_unknown`; the field moves here once all of them know it.
NETWORK_FIELDS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "hidden_dim", "multiple_of", "norm_eps",
    "max_seq_len", "rope_theta", "rope_scaling", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor",
    "rope_original_max_seq_len", "dropout", "flash_attn", "tie_embeddings", "qk_norm", "qkv_bias",
} | EXPERT_FIELDS  # fmt: skip
KNOWN_SCALINGS = (None, "linear", "llama3")


def refuse_unknown(config: LMConfig, known: Set[str], place: str) -> None:
    """Refuse a shape with a field that a part of the program does not know, unless it has its default.

    Args:
        known: the fields that the part computes with, or has no need of.
        place: the part, for the message.

    Raises:
        InputError: naming every such field.
    """
    unknown = [f for f in fields(config) if f.name not in known and getattr(config, f.name) != f.default]
    if config.rope_scaling not in KNOWN_SCALINGS:
        unknown.append(config.__dataclass_fields__["rope_scaling"])
    if unknown:
        values = ", ".join(f"{f.name} {shown(getattr(config, f.name))} (only {f.default})" for f in unknown)
        raise InputError(f"{place} does not know {values}")


def impossible_shape(values: dict) -> list[str]:
    """Why no model can have these values together, each of which is within its limits: one line for each reason."""
    problems = []
    low, high = values["rope_low_freq_factor"], values["rope_high_freq_factor"]
    if not low < high:
        problems.append(f"rope_high_freq_factor: {high} is not above rope_low_freq_factor = {low}")
    dim, n_heads, n_kv_heads, head_dim = (values[name] for name in ("dim", "n_heads", "n_kv_heads", "head_dim"))
    if head_dim is None and dim % (2 * n_heads):
        problems.append(f"dim: {dim} is not a multiple of 2 * n_heads = {2 * n_heads} (RoPE turns pairs within a head)")
    if head_dim is not None and head_dim % 2:
        problems.append(f"head_dim: {head_dim} is odd (RoPE turns pairs within a head)")
    if n_heads % n_kv_heads:
        problems.append(f"n_kv_heads: {n_kv_heads} does not divide n_heads = {n_heads}")
    return problems + _impossible_experts(values)


def _impossible_experts(values: dict) -> list[str]:
    known, problems = LMConfig.__dataclass_fields__, []
    n_experts, n_active = values["n_experts"], values["n_active_experts"]
    if n_experts == 0:
        given = [name for name in known if name in EXPERT_FIELDS and values[name] != known[name].default]
        return [f"{name}: {shown(values[name]).lower()} of no experts; set n_experts, or omit {name}" for name in given]
    if n_active > n_experts:
        problems.append(f"n_active_experts: {n_active} found, at most n_experts = {n_experts} expected")
    if values["shared_hidden_dim"] is not None and values["n_shared_experts"] == 0:
        shared = values["shared_hidden_dim"]
        problems.append(f"shared_hidden_dim: {shared} of no shared experts; set n_shared_experts, or omit it")
    return problems


def untrained_router(shape: LMConfig) -> str | None:
    """Why the loss gives the routers of this shape no gradient; None if it does, or there are none.

    Args:
        shape: an LMConfig, or what has its fields.
    """
    if shape.n_experts == 0 or shape.n_active_experts > 1:
        return None
    if shape.normalize_expert_weights:
        return (
            "n_active_experts: 1 with normalize_expert_weights makes the weight of every chosen expert 1, whatever its"
            " score, so that the router gets no gradient; set normalize_expert_weights false, or n_active_experts 2"
        )
    if shape.n_experts == 1 and shape.expert_score == "softmax":
        return "n_experts: a softmax over 1 expert is always 1, so that the router gets no gradient; set n_experts 2"
    return None
