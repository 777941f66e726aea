"""Which way of computing attention trains fastest on this CPU."""

import torch

from model.attention import WAYS, causal_attention
from model.errors import counted
from model.LMConfig import LMConfig
from model.training.trial import fastest_way, seconds_of_passes

SQUARES = 2**23  # scores that are tried: some milliseconds each way
FEWEST = 4  # key heads that are tried: some for every core, however long the samples


def fastest_attention(config: LMConfig, rows: int, dtype: torch.dtype) -> tuple[str, str]:
    """The fastest of `attention.WAYS` for samples of max_seq_len tokens, and why.

    Args:
        rows: samples that are read at once.
        dtype: of the matrix products.
    """
    tokens, grouped = config.max_seq_len, config.n_heads // config.n_kv_heads
    kv_heads = min(rows * config.n_kv_heads, max(FEWEST, SQUARES // tokens**2))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, tokens, config.head_dim, generator=generator).to(dtype).requires_grad_()
        for heads in (kv_heads * grouped, kv_heads, kv_heads)
    ]
    return fastest_way(WAYS, lambda way: _seconds(way, inputs), "chunks", counted(kv_heads, "key head"))


def _seconds(way: str, inputs: list[torch.Tensor]) -> float:
    return seconds_of_passes(lambda: [causal_attention(*inputs, way=way)], inputs)
