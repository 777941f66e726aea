"""Whether products of the same input train faster as one on this device."""

from functools import partial

import torch
from torch import nn

from model import accelerator
from model.errors import counted
from model.feed_forward import products
from model.LMConfig import LMConfig
from model.training.trial import fastest_way
from model.trial import seconds_of

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
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, config.dim, generator=generator).to(device, dtype).requires_grad_()
    heads = [count * config.head_dim for count in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    groups = []
    for widths in (heads, [config.hidden_dim] * 2):
        groups.append([nn.Linear(config.dim, width, bias=False, device="meta") for width in widths])
        for layer in groups[-1]:
            weight = torch.randn(layer.weight.shape, generator=generator) / config.dim**0.5
            layer.weight = nn.Parameter(weight.to(device, dtype))
    way, why = fastest_way(WAYS, partial(_seconds, x, groups), "apart", counted(tokens, "token"))
    return way == "joined", why


def _seconds(x: torch.Tensor, groups: list[list[nn.Linear]], way: str) -> float:
    """Of TIMES forward and backward passes."""

    def work() -> None:
        for _ in range(TIMES):
            for layers in groups:
                outputs = products(x, layers, way == "joined")
                weights = [layer.weight for layer in layers]
                torch.autograd.grad(outputs, [x, *weights], [output.detach() for output in outputs])
        accelerator.synchronize(x.device)

    return seconds_of(work)
