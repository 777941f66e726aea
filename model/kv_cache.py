"""The keys and values of the tokens a model has read."""

import torch
from torch import Tensor

from model.LMConfig import LMConfig

SPARE = 16  # slots past the context: torch.export would treat a full cache as a special case


class KVCache:
    """Keys and values of several texts, one a row, in buffers that are allocated once and written in place.

    Each row fills its slots from 0 on: a token's slot is its position in its text, whatever the other rows hold. Rows
    can be filled separately (`part`), cut (by their length) or moved.

    Attributes:
        lengths: tokens that each row holds.
    """

    def __init__(
        self,
        config: LMConfig,
        rows: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layers, rows, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [layers, rows, H_kv, capacity, D]
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows
        self._positions: tuple[list[int], Tensor] | None = None  # as computed last, and for which lengths

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def part(self, begin: int, end: int) -> "KVCache":
        """A cache of some of the rows, in the same memory but with lengths that change independently."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, begin:end], self.values[:, begin:end]
        view.lengths, view._positions = self.lengths[begin:end], None
        return view

    def move(self, source: int, target: int) -> None:
        """Let row `target` hold what `source` holds."""
        if source != target:
            length = self.lengths[target] = self.lengths[source]
            for buffer in (self.keys, self.values):
                buffer[:, target, :, :length] = buffer[:, source, :, :length]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values [rows, H_kv, T, D] to each row.

        Returns:
            all of that layer's, [rows, H_kv, S, D], where S is the longest row's. The lengths change after the last
            layer: see `advance`.
        """
        tokens, longest = keys.shape[2], max(self.lengths)
        if min(self.lengths) == longest:
            self.keys[layer, :, :, longest : longest + tokens] = keys
            self.values[layer, :, :, longest : longest + tokens] = values
        else:
            rows = torch.arange(len(self.lengths), device=keys.device)[:, None]
            slots = self.positions(tokens)  # [rows, T]
            self.keys[layer][rows, :, slots] = keys.transpose(1, 2)
            self.values[layer][rows, :, slots] = values.transpose(1, 2)
        end = longest + tokens
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more slots of each row as filled: once a forward pass, after all layers."""
        self.lengths = [length + tokens for length in self.lengths]

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens in their rows' texts: int64 [T], or [rows, T] where rows differ."""
        # The same for all layers, and sending the lengths to a GPU waits for what it still computes.
        if self._positions is None or self._positions[0] != [*self.lengths, tokens]:
            new = torch.arange(tokens, device=self.keys.device)
            begins = self.lengths[0]
            if min(self.lengths) < max(self.lengths):
                begins = torch.tensor(self.lengths, device=self.keys.device)[:, None]
            self._positions = [*self.lengths, tokens], begins + new
        return self._positions[1]

    def attention_mask(self, tokens: int) -> Tensor | None:
        """Which slots the next `tokens` tokens see: bool [rows or 1, 1, T, S]; None: all of them."""
        longest = max(self.lengths)
        if tokens == 1 and min(self.lengths) == longest:
            return None
        slots = torch.arange(longest + tokens, device=self.keys.device)  # [S]
        mask = slots <= self.positions(tokens)[..., None]  # [T, S] or [rows, T, S]
        return mask[None, None] if mask.dim() == 2 else mask[:, None]


class StepCache:
    """The first rows of a KVCache, for one new token each at a position that a tensor holds.

    It has what a Transformer asks of a KVCache, but neither its shapes nor what it does depends on how long the texts
    are, so that a step can be captured once for all of them. The KVCache's lengths stay.

    Args:
        cache: holds the keys and values.
        positions: int64 [rows], of the new tokens; at or past `context`: a row without a text, which gets any result.
        slots: of each row, that attention reads; more than any position of a text.
        context: tokens of the longest text.
    """

    def __init__(self, cache: KVCache, positions: Tensor, slots: int, context: int) -> None:
        rows = len(positions)
        self.keys = [layer[:rows] for layer in cache.keys]  # [rows, H_kv, capacity, D] each
        self.values = [layer[:rows] for layer in cache.values]
        self._at, self._context = positions, context
        self._rows, self._slots = (torch.arange(count, device=positions.device) for count in (rows, slots))

    def positions(self, tokens: int) -> Tensor:
        """int64 [rows, 1], within the context."""
        return self._at.clamp(max=self._context - 1)[:, None]

    def attention_mask(self, tokens: int) -> Tensor:
        """What is added to the scores of each row's token: 0, or -inf for slots that it does not see; [rows, 1, 1,
        slots], in the keys' dtype. Of a bool mask PyTorch's kernels would make this in each layer."""
        hidden = (self._slots > self._at[:, None])[:, None, None]
        return torch.zeros_like(hidden, dtype=self.keys[0].dtype).masked_fill(hidden, -torch.inf)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values [rows, H_kv, 1, D] -> those that attention reads, [rows, H_kv, slots,
        D]."""
        for buffer, new in ((self.keys[layer], keys), (self.values[layer], values)):
            buffer[self._rows, :, self._at] = new[:, :, 0]
        slots = len(self._slots)
        return self.keys[layer][:, :, :slots], self.values[layer][:, :, :slots]

    def advance(self, tokens: int) -> None:
        """Nothing: who gives the positions counts."""


def cache_bytes(config: LMConfig, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
