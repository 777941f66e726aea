"""The shape of a model."""

import dataclasses
from dataclasses import dataclass

from model.errors import InputError


@dataclass
class LMConfig:
    """The shape of a Transformer. The defaults are MiniMind v1's: 26,878,464 parameters.

    Raises:
        InputError: values that no model can have; all of them are named at once.
    """

    dim: int = 512  # width of the residual stream
    n_layers: int = 8
    n_heads: int = 16  # query heads, of dim / n_heads numbers each
    n_kv_heads: int = 8  # key and value heads; each serves n_heads / n_kv_heads query heads (GQA)
    vocab_size: int = 6400
    hidden_dim: int | None = None  # of the feed-forward; None: 8/3 of dim, rounded up to multiple_of
    multiple_of: int = 64
    norm_eps: float = 1e-5
    max_seq_len: int = 512  # tokens that a sample and the context of a generation hold
    rope_theta: float = 10000.0
    dropout: float = 0.0
    flash_attn: bool = True  # scaled_dot_product_attention; False: the same written out, to read and to compare
    tie_embeddings: bool = True  # the output layer is the embedding's matrix
    qk_norm: bool = False  # RMSNorm of each query and key head, as in Qwen3; MiniMind v1 has none

    def __post_init__(self) -> None:
        problems = config_problems(dataclasses.asdict(self))
        if problems:
            raise InputError("; ".join(problems))
        if self.hidden_dim is None:
            hidden_dim = int(8 * self.dim / 3)
            self.hidden_dim = self.multiple_of * -(-hidden_dim // self.multiple_of)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def config_problems(values: dict) -> list[str]:
    """Every reason why no model can have these values: one line each, naming key, value and what is accepted."""
    problems = []
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "multiple_of", "max_seq_len"):
        if values[name] is not None and values[name] < 1:
            problems.append(f"{name}: {values[name]} is below 1")
    for name in ("norm_eps", "rope_theta"):
        if not values[name] > 0:
            problems.append(f"{name}: {values[name]} is not above 0")
    if not 0 <= values["dropout"] < 1:
        problems.append(f"dropout: {values['dropout']} is outside 0 to 1 (1 excluded)")
    if problems:
        return problems
    dim, n_heads, n_kv_heads = values["dim"], values["n_heads"], values["n_kv_heads"]
    if dim % (2 * n_heads):
        problems.append(f"dim: {dim} is not a multiple of 2 * n_heads = {2 * n_heads} (RoPE turns pairs within a head)")
    if n_heads % n_kv_heads:
        problems.append(f"n_kv_heads: {n_kv_heads} does not divide n_heads = {n_heads}")
    return problems
