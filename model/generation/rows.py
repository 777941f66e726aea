"""The texts that are being generated, one per row: their ids, and the KV cache."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.accelerator import send
from model.generation.compiled_step import GROUPS, Compiled, CompiledStep
from model.generation.engine import Engine
from model.generation.prefixes import FEWEST, Prefixes, common
from model.generation.sampling import PADDING, Choice, Shortlist
from model.kv_cache import SPARE, KVCache, cache_bytes
from model.text.detokenize import Text

BATCH_BYTES = 4 << 30  # for the keys and values of all texts that are written together


def fitting_rows(engine: Engine, most: int) -> int:
    """How many of `most` texts BATCH_BYTES of keys and values allow; at least one."""
    return max(1, min(most, BATCH_BYTES // text_bytes(engine)))


def text_bytes(engine: Engine) -> int:
    """Of the keys and values of a text that fills the context."""
    return cache_bytes(engine.config, engine.dtype) * engine.config.max_seq_len


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
    choice: Choice  # how its tokens are chosen
    is_new: bool = True  # its prompt is still to be read, or a part; else the cache lacks only its newest token
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
        prefixes: the same for any number of rows and of texts: where theirs are kept.

    Attributes:
        live: the texts that have not ended; the new ones are last.
        compiled: compiled code for single tokens; None: eager code decodes, or graphs.
    """

    def __init__(
        self, engine: Engine, capacity: int, remembers: bool = False, prefixes: Prefixes | None = None
    ) -> None:
        context = engine.config.max_seq_len
        self.engine, self.capacity, self.remembers, self.prefixes = engine, capacity, remembers, prefixes
        self.live: list[Row] = []
        self.compiled: Compiled | None = None
        self._compiled_len = 0  # slots of row 0 that the compiled step's own cache holds too
        places = _for_whole_groups(capacity) if capacity > 1 and engine.device.type == "cpu" else capacity
        self._cache = KVCache(engine.config, places, context + SPARE, device=engine.device, dtype=engine.dtype)
        self._ids = torch.full((capacity, context), PADDING, device=engine.device)
        self._graphs = engine.graph_steps(self._cache, self._ids)
        self._graphed = 0  # texts of the last step, if a graph gave all of its logits

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
        choice: Choice = Choice(),  # noqa: B008, which is frozen
    ) -> int:
        """Add a text that begins with a prompt; it ends after `max_new_tokens`, or when the context is full.

        Returns:
            how many of its tokens the cache holds already.
        """
        place = len(self.live)
        ids = torch.tensor(prompt, device=self.device)
        known = self._cached_prefix(place, ids) if self.remembers else 0
        if self.prefixes is not None:
            known = self._known_prefix(place, np.asarray(prompt))
        self._cache.lengths[place] = known
        self._ids[place] = PADDING
        self._ids[place, : len(ids)] = ids
        context, wanted = self.engine.config.max_seq_len, len(ids) + max_new_tokens
        max_length, reason = (wanted, "length") if wanted <= context else (context, "context")
        self.live.append(Row(number, text, len(ids), len(ids), max_length, reason, generator, choice))
        return known

    def _cached_prefix(self, place: int, ids: Tensor) -> int:
        """How many of these tokens the row's cache holds already; never the last, whose logits are needed."""
        most = min(self._cache.lengths[place], len(ids) - 1)
        same = self._ids[place, :most] == ids[:most]
        return int(same.cumprod(0).sum())

    def _known_prefix(self, place: int, ids: np.ndarray) -> int:
        """Fill a row with the longest beginning of these ids that a text knows, running or ended -> its length."""
        best, source = 0, 0
        for other in range(len(self.live)):
            held = self._ids[other, : self._cache.lengths[other]]
            if len(held) > best and (length := common(held.cpu().numpy(), ids)) > best:
                best, source = length, other
        most = len(ids) - 1  # the last one's logits are needed
        known = self.prefixes.fill(ids, most, self._cache, place)
        best = min(best, most)
        if best >= FEWEST and best > known:
            self._cache.lengths[source], kept = best, self._cache.lengths[source]
            self._cache.move(source, place)
            self._cache.lengths[source], known = kept, best
        if place == 0:
            self._compiled_len = 0
        return known

    def next_logits(self, use_cache: bool = True, prompt_tokens: int | None = None) -> Tensor:
        """Run the tokens that the cache lacks -> logits of the next token of each text that was read to its end,
        float32 [rows, V]: the first of `live`.

        Texts that lack one token and new ones, which lack their prompts, run in two passes: in one, the former would be
        padded to the prompts' length. The result may be overwritten by the next call.

        Args:
            use_cache: False: run every text from its start, which is slow, to compare with.
            prompt_tokens: most tokens of new texts to run; None: all.
        """
        self._graphed = 0
        if not use_cache:
            self._cache.lengths = [0] * len(self._cache.lengths)
            return self._forward_eager(0, [row.length for row in self.live])
        first_new = sum(not row.is_new for row in self.live)
        if len(self.live) == first_new == 1 and self.compiled is not None:
            return self._forward_compiled(self.compiled.step)
        logits = []
        if self.compiled is not None and 1 < first_new <= self.compiled.most:
            logits.append(self._forward_groups(self.compiled, first_new))
        elif first_new and (found := self._forward_graph(first_new)) is not None:
            logits.append(found)
        elif first_new:
            logits.append(self._forward_eager(0, self._lacking(0, first_new)))
        if first_new < len(self.live):
            counts = _within(self._lacking(first_new, len(self.live)), prompt_tokens)
            logits += [self._forward_eager(begin, some) for begin, some in self._parts(first_new, counts)]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _parts(self, begin: int, counts: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Parts of the rows from `begin` on that one pass can read: padded to its longest count, none of a part's rows
        reaches past the context."""
        context, parts, known = self.engine.config.max_seq_len, [], 0
        for place, count in enumerate(counts, begin):
            known = max(known, self._cache.lengths[place])
            if parts and known + max([*parts[-1][1], count]) <= context:
                parts[-1][1].append(count)
            else:
                parts.append((place, [count]))
                known = self._cache.lengths[place]
        return parts

    def _lacking(self, begin: int, end: int) -> list[int]:
        """How many tokens the cache lacks of each of live[begin:end]."""
        lengths = self._cache.lengths[begin:end]
        return [row.length - cached for row, cached in zip(self.live[begin:end], lengths, strict=True)]

    def _forward_compiled(self, step: CompiledStep) -> Tensor:
        """Run the newest token of the only row -> logits float32 [1, V]."""
        cached = self._cache.lengths[0]
        if step.owner is not self:
            step.owner, self._compiled_len = self, 0
        step.copy_from(self._cache, self._compiled_len, cached)
        self._compiled_len = cached + 1
        return step(self._ids[0, cached : cached + 1], self._cache)[None]

    def _forward_groups(self, compiled: Compiled, texts: int) -> Tensor:
        """Run the newest token of each of the first texts -> logits float32 [texts, V]."""
        lengths = self._cache.lengths[:texts]
        self._compiled_len = min(self._compiled_len, lengths[0])
        logits = compiled.group_logits(self._ids[range(texts), lengths], self._cache)
        self._cache.lengths[:texts] = [length + 1 for length in lengths]
        return logits

    def _forward_graph(self, texts: int) -> Tensor | None:
        """Run the newest token of each of the first texts -> logits float32 [texts, V]; None: there is no graph."""
        if self._graphs is None:
            return None
        lengths, prompt_lengths = self._cache.lengths[:texts], [row.prompt_length for row in self.live[:texts]]
        logits = self._graphs.logits(lengths, prompt_lengths)
        if logits is not None:
            self._cache.lengths[:texts] = [length + 1 for length in lengths]
            self._graphed = texts if texts == len(self.live) else 0
        return logits

    def shortlist(self, choice: Choice, texts: int) -> Shortlist | None:
        """What the last `next_logits` tells of the next tokens of so many texts, which choose alike; None: only the
        logits do."""
        return self._graphs.shortlist(choice) if texts and texts == self._graphed else None

    def _forward_eager(self, begin: int, new: Sequence[int]) -> Tensor:
        """Run the next new[n] tokens of live[begin + n] -> logits of the next token of those that have no more, float32
        [rows, V].

        Rows with fewer such tokens are padded on the right, where causal attention hides the padding. Only the last
        row may have more.
        """
        end = begin + len(new)
        part = self._cache.part(begin, end)
        lengths = [cached + count for cached, count in zip(part.lengths, new, strict=True)]
        if begin == 0:
            self._compiled_len = min(self._compiled_len, part.lengths[0])
        offsets = torch.arange(max(new), device=self.device)
        positions = torch.tensor(part.lengths, device=self.device)[:, None] + offsets  # [rows, T]
        # Padding: any valid position, and any valid id.
        ids = self._ids[begin:end].gather(1, positions.clamp(max=self._ids.shape[1] - 1)).clamp(min=0)
        one_token_each = len(ids) > 1 and ids.shape[1] == 1
        attention = self.compiled.attention if self.compiled is not None and one_token_each else None
        hidden = self.engine.hidden_states(ids, part, attention)  # [rows, T, dim]
        self._cache.lengths[begin:end] = lengths
        for row, length in zip(self.live[begin:end], lengths, strict=True):
            row.is_new = length < row.length
        last = hidden[:, -1]  # without padding
        if min(new) < len(offsets):
            last = hidden[list(range(len(lengths))), [count - 1 for count in new]]
        if self.live[end - 1].is_new:
            last = last[:-1]
        return self.engine.output(last).float()  # the output layer is the widest: last tokens only

    def written(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The texts at these places of `live`, int64 [rows, T], and their new tokens alone, [rows, T or less], both
        padded on the left."""
        rows = [self.live[place] for place in places]
        if len(rows) == 1:
            own = self._ids[places[0] : places[0] + 1]
            return own[:, : rows[0].length], own[:, rows[0].prompt_length : rows[0].length]
        lengths = torch.tensor([row.length for row in rows], device=self.device)[:, None]
        starts = torch.tensor([row.prompt_length for row in rows], device=self.device)[:, None]
        longest = max(row.length for row in rows)
        positions = torch.arange(longest, device=self.device) + (lengths - longest)  # [rows, T], below 0: no token
        ids = self._ids[list(places)].gather(1, positions.clamp(min=0)).where(positions >= 0, PADDING)
        return ids, ids.where(positions >= starts, PADDING)

    def append(self, chosen: Sequence[int], eos_ids: Sequence[int]) -> None:
        """Append a token to each row whose logits were last computed, and set `end` of those that end with it."""
        rows = self.live[: len(chosen)]
        lengths = [row.length for row in rows]
        if len(lengths) == 1:
            self._ids[0, lengths[0]] = chosen[0]
        else:
            places, tokens = send(torch.tensor([lengths, chosen]), self.device)[:, :, None]
            self._ids[: len(rows)].scatter_(1, places, tokens)
        for row, token in zip(rows, chosen, strict=True):
            row.length += 1
            if token in eos_ids:
                row.end = "eos"
            elif row.length == row.max_length:
                row.end = row.limit_reason

    def wipe(self, places: Sequence[int]) -> None:
        """Empty the cache of the rows at these places: what is not finite in it would reach later texts through slots
        that are masked, since 0 times NaN is NaN."""
        for buffer in (self._cache.keys, self._cache.values):
            buffer[:, list(places)] = 0
        for place in places:
            self._cache.lengths[place] = 0

    def drop_ended(self) -> None:
        """Remove the rows that ended; others move into their places, the new ones being last again."""
        for place in reversed(range(len(self.live))):
            if self.live[place].end is None:
                continue
            if self.prefixes is not None:
                length = self._cache.lengths[place]
                self.prefixes.keep(self._ids[place, :length].cpu().numpy(), self._cache, place)
            if not self.live[place].is_new:
                last_read = sum(not row.is_new for row in self.live) - 1
                self._move(last_read, place)
                place = last_read
            self._move(len(self.live) - 1, place)
            self.live.pop()

    def _move(self, source: int, target: int) -> None:
        """Let a row take another's place."""
        if source != target:
            self.live[target] = self.live[source]
            self._cache.move(source, target)
            self._ids[target] = self._ids[source]
            if target == 0:
                self._compiled_len = 0


def _for_whole_groups(texts: int) -> int:
    """Rows that the groups of so many texts take."""
    sizes = sorted(GROUPS.values())
    size = next((size for size in sizes if size >= texts), sizes[-1])
    return -(-texts // size) * size


def _within(counts: Sequence[int], most: int | None) -> list[int]:
    """The first of these counts whose sum is within `most`, the last one cut to fit; None: all."""
    if most is None:
        return list(counts)
    taken: list[int] = []
    for count in counts:
        if sum(taken) == most:
            break
        taken.append(min(count, most - sum(taken)))
    return taken
