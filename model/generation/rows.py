"""The texts that are being written, a row each: their ids, and the keys and values of what the model has read."""

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
    text: Text | None  # turns its tokens into text, and may end it; None: ids only
    length: int  # in tokens
    start: int  # tokens of its prompt
    limit: int  # tokens after which it ends, and
    at_limit: str  # why: "length" or "context"
    generator: random.Random | None  # None: greedy
    end: str | None = None  # why it ended: "eos", `at_limit` or a reason of `text`; None: it has not

    def hear(self, token: int | None) -> str:
        """The characters that the newest token completes (None: the eos), after which `text` may end the row."""
        if self.text is None:
            return ""
        piece, self.end = self.text.add(token, self.end)
        return piece


class Rows:
    """Up to `capacity` texts, which one step of the model continues together; a text that ends makes room for another.

    The first rows have been read except for their newest token, those after them not at all: `next_logits` reads both.

    Args:
        engine: reads them; its model's context limits each text.
        remembers: keep the keys and values of a text that ended, for a text that begins with the same tokens. For a
            single row: a chat, in which each turn begins with all the turns before it.

    Attributes:
        live: the texts that have not ended.
        compiled: compiled code that reads single tokens; None: eager code does.
    """

    def __init__(self, engine: Engine, capacity: int, remembers: bool = False) -> None:
        context = engine.config.max_seq_len
        self.engine, self.capacity, self.remembers = engine, capacity, remembers
        self.live: list[Row] = []
        self.compiled: Compiled | None = None
        self._read = 0  # rows that the cache holds
        self._stepped = 0  # slots of the first row that the compiled step holds too
        self._cache = KVCache(engine.config, capacity, context + SPARE, device=engine.device, dtype=engine.dtype)
        self._ids = torch.full((capacity, context), PADDING, device=engine.device)

    @property
    def device(self) -> torch.device:
        return self._ids.device

    @property
    def free(self) -> int:
        """How many more texts there is room for."""
        return self.capacity - len(self.live)

    def clear(self) -> None:
        """Drop all texts; what is remembered of the last one stays."""
        self.live, self._read = [], 0

    def admit(
        self,
        number: int,
        prompt: Sequence[int],
        max_new_tokens: int,
        generator: random.Random | None,
        text: Text | None = None,
    ) -> None:
        """Begin a text with a prompt; it ends after `max_new_tokens`, or where the context is full."""
        place = len(self.live)
        ids = torch.tensor(prompt, device=self.device)
        known = self._begin_known(place, ids) if self.remembers else 0
        self._cache.lengths[place] = known
        self._ids[place] = PADDING
        self._ids[place, : len(ids)] = ids
        context, wanted = self.engine.config.max_seq_len, len(ids) + max_new_tokens
        limit, at_limit = (wanted, "length") if wanted <= context else (context, "context")
        self.live.append(Row(number, text, len(ids), len(ids), limit, at_limit, generator))

    def _begin_known(self, place: int, ids: Tensor) -> int:
        """How many of these tokens the row's cache holds already; the last must be read again for its logits."""
        most = min(self._cache.lengths[place], len(ids) - 1)
        same = self._ids[place, :most] == ids[:most]
        return int(same.cumprod(0).sum())

    def next_logits(self, use_cache: bool = True) -> Tensor:
        """Read what is unread -> logits of each row's next token, float32 [rows, V].

        Args:
            use_cache: False: read all of every text again, which is slow, to compare with.
        """
        if not use_cache:
            self._read = 0
            self._cache.lengths = [0] * self.capacity
        elif len(self.live) == self._read == 1 and self.compiled is not None:
            return self._step(self.compiled.step)
        logits = []
        if self._read:
            logits.append(self._read_texts(0, self._read))
        if self._read < len(self.live):
            logits.append(self._read_texts(self._read, len(self.live)))
        self._read = len(self.live)
        return torch.cat(logits)

    def _step(self, step: CompiledStep) -> Tensor:
        """Read the newest token of the only row with the compiled step."""
        known = self._cache.lengths[0]
        if step.reader is not self:
            step.reader, self._stepped = self, 0
        step.read(self._cache, self._stepped, known)
        self._stepped = known + 1
        return step(self._ids[0, known : known + 1], self._cache)[None]

    def _read_texts(self, begin: int, end: int) -> Tensor:
        """Read these rows to their ends. Each has one unread token, or nothing of any was read before.

        Shorter ones are padded on the right, where causal attention hides the padding.
        """
        lengths = [row.length for row in self.live[begin:end]]
        part = self._cache.part(begin, end)
        if begin == 0:
            self._stepped = min(self._stepped, part.lengths[0])
        unread = [length - known for length, known in zip(lengths, part.lengths, strict=True)]
        steps = torch.arange(max(unread), device=self.device)
        positions = torch.tensor(part.lengths, device=self.device)[:, None] + steps  # [rows, T]
        ids = self._ids[begin:end].gather(1, positions.clamp(max=self._ids.shape[1] - 1)).clamp(min=0)
        one_each = len(ids) > 1 == ids.shape[1]
        attention = self.compiled.attention if self.compiled is not None and one_each else None
        hidden = self.engine.hidden_states(ids, part, attention)  # [rows, T, dim]
        self._cache.lengths[begin:end] = lengths
        last = hidden[:, -1]  # of single tokens, or of rows of equal length
        if min(unread) < len(steps):
            last = hidden[list(range(len(lengths))), [count - 1 for count in unread]]
        return self.engine.output(last).float()  # the output layer is the widest: only where it is needed

    def written(self) -> tuple[Tensor, Tensor]:
        """The texts, int64 [rows, T], and their output alone, [rows, T or less]: the newest token last, PADDING before
        the first."""
        if len(self.live) == 1:
            row = self.live[0]
            return self._ids[:1, : row.length], self._ids[:1, row.start : row.length]
        lengths = torch.tensor([row.length for row in self.live], device=self.device)[:, None]
        starts = torch.tensor([row.start for row in self.live], device=self.device)[:, None]
        longest = max(row.length for row in self.live)
        positions = torch.arange(longest, device=self.device) + (lengths - longest)  # [rows, T], below 0: no token
        ids = self._ids[: len(self.live)].gather(1, positions.clamp(min=0)).where(positions >= 0, PADDING)
        return ids, ids.where(positions >= starts, PADDING)

    def add(self, chosen: Sequence[int], eos_ids: Sequence[int]) -> None:
        """Write the next token of each row, and note which rows end with it."""
        for place, (row, token) in enumerate(zip(self.live, chosen, strict=True)):
            self._ids[place, row.length] = token
            row.length += 1
            if token in eos_ids:
                row.end = "eos"
            elif row.length == row.limit:
                row.end = row.at_limit

    def drop_ended(self) -> None:
        """Remove the rows that ended; the last ones move into their places."""
        for place in reversed(range(len(self.live))):
            if self.live[place].end is not None:
                last = self.live.pop()
                if place < len(self.live):
                    self.live[place] = last
                    self._cache.move(len(self.live), place)
                    self._stepped = 0
                    self._ids[place] = self._ids[len(self.live)]
        self._read = len(self.live)
