"""The shape of a model."""

import dataclasses
import math
from dataclasses import dataclass

from model.errors import InputError

ROPE_SCALINGS = ("linear", "llama3")


@dataclass
class LMConfig:
    """The shape of a Transformer. The defaults are MiniMind v1's: 26,878,464 parameters.

    Raises:
        InputError: values that no model can have; all of them are named at once.
    """

    dim: int = 512  # width of the residual stream
    n_layers: int = 8
    n_heads: int = 16  # query heads
    n_kv_heads: int = 8  # key and value heads; each serves n_heads / n_kv_heads query heads (GQA)
    head_dim: int | None = None  # numbers of a head; None: dim / n_heads
    vocab_size: int = 6400
    hidden_dim: int | None = None  # of the feed-forward; None: 8/3 of dim, rounded up to multiple_of
    multiple_of: int = 64
    norm_eps: float = 1e-5
    max_seq_len: int = 512  # tokens that a sample and the context of a generation hold
    rope_theta: float = 10000.0
    rope_scaling: str | None = None  # "linear" (Chen et al., 2023) or "llama3" (Llama 3.1): slower, for longer contexts
    rope_factor: float = 1.0  # times slower; for "llama3" only what turns slowly
    rope_low_freq_factor: float = 1.0  # "llama3": what turns less often in the original context is slowed in full
    rope_high_freq_factor: float = 4.0  # and what turns more often stays as it is
    rope_original_max_seq_len: int = 8192  # "llama3": that context
    dropout: float = 0.0
    flash_attn: bool = True  # scaled_dot_product_attention; False: the same written out, to read and to compare
    tie_embeddings: bool = True  # the output layer is the embedding's matrix
    qk_norm: bool = False  # RMSNorm of each query and key head, as in Qwen3; MiniMind v1 has none
    qkv_bias: bool = False  # biases of queries, keys and values, as in Qwen2

    def __post_init__(self) -> None:
        problems = config_problems(dataclasses.asdict(self))
        if problems:
            raise InputError("; ".join(problems))
        if self.hidden_dim is None:
            hidden_dim = int(8 * self.dim / 3)
            self.hidden_dim = self.multiple_of * -(-hidden_dim // self.multiple_of)
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads


def config_problems(values: dict) -> list[str]:
    """Every reason why no model can have these values: one line each, naming key, value and what is accepted."""
    problems = []
    for name in (
        "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "hidden_dim", "multiple_of",
        "max_seq_len", "rope_original_max_seq_len",
    ):  # fmt: skip
        if values[name] is not None and values[name] < 1:
            problems.append(f"{name}: {values[name]} is below 1")
    for name in ("norm_eps", "rope_theta", "rope_low_freq_factor"):
        if not 0 < values[name] < math.inf:
            problems.append(f"{name}: {values[name]} is not above 0")
    if not 0 <= values["dropout"] < 1:
        problems.append(f"dropout: {values['dropout']} is outside 0 to 1 (1 excluded)")
    if values["rope_scaling"] not in (None, *ROPE_SCALINGS):
        problems.append(f"rope_scaling: {values['rope_scaling']} is none of {', '.join(ROPE_SCALINGS)}")
    if not 1 <= values["rope_factor"] < math.inf:
        problems.append(f"rope_factor: {values['rope_factor']} is below 1")
    if not values["rope_low_freq_factor"] < values["rope_high_freq_factor"] < math.inf:
        low, high = values["rope_low_freq_factor"], values["rope_high_freq_factor"]
        problems.append(f"rope_high_freq_factor: {high} is not above rope_low_freq_factor = {low}")
    if problems:
        return problems
    dim, n_heads, n_kv_heads, head_dim = (values[name] for name in ("dim", "n_heads", "n_kv_heads", "head_dim"))
    if head_dim is None and dim % (2 * n_heads):
        problems.append(f"dim: {dim} is not a multiple of 2 * n_heads = {2 * n_heads} (RoPE turns pairs within a head)")
    if head_dim is not None and head_dim % 2:
        problems.append(f"head_dim: {head_dim} is odd (RoPE turns pairs within a head)")
    if n_heads % n_kv_heads:
        problems.append(f"n_kv_heads: {n_kv_heads} does not divide n_heads = {n_heads}")
    return problems
