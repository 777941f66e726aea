"""The keys and values of the tokens a model has read."""

import torch
from torch import Tensor

from model.LMConfig import LMConfig


class KVCache:
    """Keys and values of B sequences, in buffers that are allocated once and written in place.

    Sequences of different lengths end at the same slot: the shorter ones are padded on the left, and `padding` [B]
    says with how many tokens. A row's position in its own text is its slot less its padding, and its padding is
    masked, so that a prompt's logits in a batch are those it has alone.
    """

    def __init__(
        self,
        config: LMConfig,
        batch_size: int,
        capacity: int,
        *,
        padding: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [layers, B, H_kv, capacity, D]
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.padding = padding  # int64 [B], or None where no row is padded
        self.length = 0  # slots filled

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values [B, H_kv, T, D]; return all of that layer's [B, H_kv, length + T, D].

        `length` itself moves on only after the last layer: see `advance`.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more slots as filled: once a forward pass, after all layers."""
        self.length += tokens

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens in their rows' texts: int64 [T], or [B, T] where rows are padded."""
        slots = torch.arange(self.length, self.length + tokens, device=self.keys.device)
        if self.padding is None:
            return slots
        return (slots - self.padding[:, None]).clamp(min=0)

    def attention_mask(self, tokens: int) -> Tensor | None:
        """Which slots the next `tokens` tokens may look at: bool [B or 1, 1, T, length + T]; None means all of them."""
        if tokens == 1 and self.padding is None:
            return None
        keys = torch.arange(self.length + tokens, device=self.keys.device)  # [S]
        queries = keys[self.length :]  # [T]
        mask = keys <= queries[:, None]  # [T, S]
        if self.padding is None:
            return mask[None, None]
        # A padding token sees itself, so that no row of the softmax is empty; nobody looks at what it computes.
        own = keys == queries[:, None]
        return ((mask & (keys >= self.padding[:, None, None])) | own)[:, None]
