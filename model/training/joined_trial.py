"""Whether products of the same input train faster as one on this device."""

import itertools
from functools import partial

import torch
from torch import nn

from model.errors import counted
from model.feed_forward import products
from model.LMConfig import LMConfig
from model.training.trial import fastest_way, seconds_of_passes

WAYS = ("apart", "joined")
MOST = 2**15  # tokens that are tried
TIMES = 10  # in a row, so that the device and not the host is measured


def joined_is_faster(config: LMConfig, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether queries, keys and values, and the two hidden states of a feed-forward, are computed faster by one product
    each, forward and backward; and why.

    Args:
        rows: samples that are read at once.
        dtype: of the matrix products.
    """
    tokens = min(rows * config.max_seq_len, MOST)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, config.dim, generator=generator, device=device, dtype=dtype).requires_grad_()
    heads = [count * config.head_dim for count in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    groups = [
        [nn.utils.skip_init(nn.Linear, config.dim, width, bias=False, device=device, dtype=dtype) for width in widths]
        for widths in (heads, [config.hidden_dim] * 2)
    ]
    for layer in itertools.chain(*groups):
        nn.init.normal_(layer.weight, std=config.dim**-0.5, generator=generator)
    way, why = fastest_way(WAYS, partial(_seconds, x, groups), "apart", counted(tokens, "token"))
    return way == "joined", why


def _seconds(x: torch.Tensor, groups: list[list[nn.Linear]], way: str) -> float:
    weights = [layer.weight for layer in itertools.chain(*groups)]

    def compute() -> list[torch.Tensor]:
        return [output for layers in groups for output in products(x, layers, way == "joined")]

    return seconds_of_passes(compute, [x, *weights], TIMES)
