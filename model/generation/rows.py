"""The texts that are being generated, one per row: their ids, and the KV cache."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.generation.compiled_step import Compiled, CompiledStep
from model.generation.engine import Engine
from model.generation.sampling import PADDING
from model.kv_cache import SPARE, KVCache
from model.text.detokenize import Text


@dataclass(slots=True)
class Row:
    """One text."""

    number: int  # of its prompt
    text: Text | None  # turns its tokens into characters, and may end it; None: ids only
    length: int  # in tokens, the prompt included
    prompt_length: int
    max_length: int  # in tokens, the prompt included
    limit_reason: str  # why it ends at max_length: "length" or "context"
    generator: random.Random | None  # None: greedy
    is_new: bool = True  # its prompt is still to be run; else the cache lacks only its newest token
    end: str | None = None  # why it ended: "eos", `limit_reason` or a reason of `text`; None: still running

    def push(self, token: int | None) -> str:
        """Pass the newest token (None: the eos) to `text`, which may end the row; returns the completed characters."""
        if self.text is None:
            return ""
        piece, self.end = self.text.push(token, self.end)
        return piece


class Rows:
    """Up to `capacity` texts, which one forward pass continues together; a text that ends makes room for another.

    Args:
        engine: its model's context limits each text.
        remembers: keep the KV cache of a text that ended, for a text that begins with the same tokens. For a single
            row: a chat, in which each turn begins with all the turns before it.

    Attributes:
        live: the texts that have not ended; the new ones are last, since `next_logits` leaves none new, and only then
            do texts end.
        compiled: compiled code for single tokens; None: eager code decodes.
    """

    def __init__(self, engine: Engine, capacity: int, remembers: bool = False) -> None:
        context = engine.config.max_seq_len
        self.engine, self.capacity, self.remembers = engine, capacity, remembers
        self.live: list[Row] = []
        self.compiled: Compiled | None = None
        self._compiled_len = 0  # slots of row 0 that the compiled step's own cache holds too
        self._cache = KVCache(engine.config, capacity, context + SPARE, device=engine.device, dtype=engine.dtype)
        self._ids = torch.full((capacity, context), PADDING, device=engine.device)

    @property
    def device(self) -> torch.device:
        return self._ids.device

    @property
    def free(self) -> int:
        """Rows that are free for another text."""
        return self.capacity - len(self.live)

    def clear(self) -> None:
        """Drop all texts; a remembered text stays in the cache."""
        self.live = []

    def admit(
        self,
        number: int,
        prompt: Sequence[int],
        max_new_tokens: int,
        generator: random.Random | None,
        text: Text | None = None,
    ) -> None:
        """Add a text that begins with a prompt; it ends after `max_new_tokens`, or when the context is full."""
        place = len(self.live)
        ids = torch.tensor(prompt, device=self.device)
        known = self._cached_prefix(place, ids) if self.remembers else 0
        self._cache.lengths[place] = known
        self._ids[place] = PADDING
        self._ids[place, : len(ids)] = ids
        context, wanted = self.engine.config.max_seq_len, len(ids) + max_new_tokens
        max_length, reason = (wanted, "length") if wanted <= context else (context, "context")
        self.live.append(Row(number, text, len(ids), len(ids), max_length, reason, generator))

    def _cached_prefix(self, place: int, ids: Tensor) -> int:
        """How many of these tokens the row's cache holds already; never the last, whose logits are needed."""
        most = min(self._cache.lengths[place], len(ids) - 1)
        same = self._ids[place, :most] == ids[:most]
        return int(same.cumprod(0).sum())

    def next_logits(self, use_cache: bool = True) -> Tensor:
        """Run all tokens that the cache lacks -> logits of each row's next token, float32 [rows, V].

        Texts that lack one token and new ones, which lack their prompts, run in two passes: in one, the former would be
        padded to the prompts' length.

        Args:
            use_cache: False: run every text from its start, which is slow, to compare with.
        """
        if not use_cache:
            self._cache.lengths = [0] * self.capacity
            return self._forward_eager(0, len(self.live))
        first_new = sum(not row.is_new for row in self.live)
        if len(self.live) == first_new == 1 and self.compiled is not None:
            return self._forward_compiled(self.compiled.step)
        parts = [(0, first_new), (first_new, len(self.live))]
        return torch.cat([self._forward_eager(begin, end) for begin, end in parts if begin < end])

    def _forward_compiled(self, step: CompiledStep) -> Tensor:
        """Run the newest token of the only row -> logits float32 [1, V]."""
        cached = self._cache.lengths[0]
        if step.owner is not self:
            step.owner, self._compiled_len = self, 0
        step.copy_from(self._cache, self._compiled_len, cached)
        self._compiled_len = cached + 1
        return step(self._ids[0, cached : cached + 1], self._cache)[None]

    def _forward_eager(self, begin: int, end: int) -> Tensor:
        """Run what the cache lacks of live[begin:end] -> logits of their next tokens, float32 [rows, V].

        Rows with fewer such tokens are padded on the right, where causal attention hides the padding.
        """
        lengths = [row.length for row in self.live[begin:end]]
        part = self._cache.part(begin, end)
        if begin == 0:
            self._compiled_len = min(self._compiled_len, part.lengths[0])
        new = [length - cached for length, cached in zip(lengths, part.lengths, strict=True)]
        offsets = torch.arange(max(new), device=self.device)
        positions = torch.tensor(part.lengths, device=self.device)[:, None] + offsets  # [rows, T]
        # Padding: any valid position, and any valid id.
        ids = self._ids[begin:end].gather(1, positions.clamp(max=self._ids.shape[1] - 1)).clamp(min=0)
        one_token_each = len(ids) > 1 and ids.shape[1] == 1
        attention = self.compiled.attention if self.compiled is not None and one_token_each else None
        hidden = self.engine.hidden_states(ids, part, attention)  # [rows, T, dim]
        self._cache.lengths[begin:end] = lengths
        for row in self.live[begin:end]:
            row.is_new = False
        last = hidden[:, -1]  # without padding
        if min(new) < len(offsets):
            last = hidden[list(range(len(lengths))), [count - 1 for count in new]]
        return self.engine.output(last).float()  # the output layer is the widest: last tokens only

    def written(self) -> tuple[Tensor, Tensor]:
        """The texts, int64 [rows, T], and their new tokens alone, [rows, T or less], both padded on the left."""
        if len(self.live) == 1:
            row = self.live[0]
            return self._ids[:1, : row.length], self._ids[:1, row.prompt_length : row.length]
        lengths = torch.tensor([row.length for row in self.live], device=self.device)[:, None]
        starts = torch.tensor([row.prompt_length for row in self.live], device=self.device)[:, None]
        longest = max(row.length for row in self.live)
        positions = torch.arange(longest, device=self.device) + (lengths - longest)  # [rows, T], below 0: no token
        ids = self._ids[: len(self.live)].gather(1, positions.clamp(min=0)).where(positions >= 0, PADDING)
        return ids, ids.where(positions >= starts, PADDING)

    def append(self, chosen: Sequence[int], eos_ids: Sequence[int]) -> None:
        """Append a token to each row, and set `end` of the rows that end with it."""
        lengths = [row.length for row in self.live]
        if len(lengths) == 1:
            self._ids[0, lengths[0]] = chosen[0]
        else:
            self._ids[range(len(lengths)), lengths] = torch.tensor(chosen, device=self.device)
        for row, token in zip(self.live, chosen, strict=True):
            row.length += 1
            if token in eos_ids:
                row.end = "eos"
            elif row.length == row.max_length:
                row.end = row.limit_reason

    def drop_ended(self) -> None:
        """Remove the rows that ended; the last rows move into their places."""
        for place in reversed(range(len(self.live))):
            if self.live[place].end is not None:
                last = self.live.pop()
                if place < len(self.live):
                    self.live[place] = last
                    self._cache.move(len(self.live), place)
                    self._compiled_len = 0
                    self._ids[place] = self._ids[len(self.live)]
