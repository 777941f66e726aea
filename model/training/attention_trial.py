"""Which way of computing attention trains fastest on this CPU: tried, since it differs from maker to maker."""

import math
import time

import torch

from model.attention import WAYS, causal_attention
from model.errors import counted
from model.LMConfig import LMConfig

ROUNDS = 3  # at least: the first one allocates memory
SECONDS = 0.1  # of the trial, if that allows more rounds
SQUARES = 2**23  # scores that are tried: some milliseconds each way
FEWEST = 4  # key heads that are tried: some for every core, however long the samples
CLEARLY = 1.1  # times faster another way must be than in chunks: a close race must not make two equal runs differ
BUSY = 0.8  # of the time that this thread ran: below, others kept it from running, and the times say nothing


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
    seconds, rounds = dict.fromkeys(WAYS, math.inf), 0
    start, ran = time.perf_counter(), time.thread_time()
    while rounds < ROUNDS or time.perf_counter() - start < SECONDS:
        for way in WAYS:
            seconds[way] = min(seconds[way], _seconds(way, inputs))
        rounds += 1
    if time.thread_time() - ran < BUSY * (time.perf_counter() - start):
        return "chunks", "the machine is too busy to try others"
    fastest = min(WAYS, key=lambda way: seconds[way])
    if seconds["chunks"] < CLEARLY * seconds[fastest]:
        fastest = "chunks"
    times = ", ".join(f"{way} {1000 * seconds[way]:.3g} ms" for way in WAYS)
    return fastest, f"tried with {counted(kv_heads, 'key head')}: {times}"


def _seconds(way: str, inputs: list[torch.Tensor]) -> float:
    """Of a forward and a backward pass."""
    start = time.perf_counter()
    out = causal_attention(*inputs, way=way)
    torch.autograd.grad(out, inputs, out.detach())
    return time.perf_counter() - start
