"""Which way of computing the experts' products trains fastest on this CPU."""

import torch

from model.errors import counted
from model.experts import WAYS, expert_products
from model.LMConfig import LMConfig
from model.training.trial import fastest_way, seconds_of_passes

FLOPS = 2**30  # of a trial's pass, about: some milliseconds each way
FEWEST = 2  # experts that are tried, however large they are


def fastest_products(config: LMConfig, rows: int, dtype: torch.dtype) -> tuple[str, str]:
    """The fastest of `experts.WAYS` where each expert has its share of the tokens, and why.

    Args:
        rows: samples that are read at once.
        dtype: of the matrix products.
    """
    dim, hidden_dim = config.dim, config.expert_hidden_dim
    each = max(1, rows * config.max_seq_len * config.n_active_experts // config.n_experts)
    each = min(each, max(1, FLOPS // (6 * FEWEST * dim * hidden_dim)))
    experts = min(config.n_experts, max(FEWEST, FLOPS // (6 * each * dim * hidden_dim)))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((experts * each, dim), (experts, hidden_dim, dim))
    ]
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * each
    what = f"{counted(experts, 'expert')} and {counted(each, 'token')} each"
    return fastest_way(WAYS, lambda way: _seconds(way, inputs, ends), "grouped", what)


def _seconds(way: str, inputs: list[torch.Tensor], ends: torch.Tensor) -> float:
    return seconds_of_passes(lambda: [expert_products(*inputs, ends, way == "grouped")], inputs)
