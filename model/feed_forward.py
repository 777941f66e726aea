"""The feed-forward of a dense layer, and of the experts that every token passes through."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def products(x: Tensor, layers: Sequence[nn.Linear], joined: bool) -> Sequence[Tensor]:
    """What each layer makes of x [..., in]: [..., out] each.

    Args:
        joined: by one product with all their weights: fewer and larger kernels, and no sum of gradients of x; other
            last bits. Layers with adapters stay apart.
    """
    if not joined or any(type(layer) is not nn.Linear for layer in layers):
        return [layer(x) for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    together = F.linear(x, torch.cat([layer.weight for layer in layers]), bias)
    return together.split([layer.out_features for layer in layers], -1)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x).

    Attributes:
        joined: whether w1 x and w3 x are one product, see `products`.
    """

    joined = False

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        gate, up = products(x, (self.w1, self.w3), self.joined)
        return F.dropout(self.w2(F.silu(gate) * up), self.dropout, self.training)
