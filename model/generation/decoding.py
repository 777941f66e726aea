"""The decode loop's step: texts that are written together, each with settings of its own."""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import InputError
from model.generation.generation_config import GenerationConfig
from model.generation.rows import Row, Rows
from model.generation.sampling import Choice, Processor, sample
from model.text.detokenize import Text


class Event(NamedTuple):
    """A step of one text: a new token, the text's end, or both."""

    number: int  # of its prompt
    token: int | None  # None: the eos, which is no part of the text
    text: str  # the characters that this token completes; may be "", since a token often ends within a character
    end: str | None  # why the text ends: "eos", "length", "context", "stop_string" or "repeats"; None: it continues
    logprob: float | None  # of the chosen token, even an eos; None: not requested
    likely: list[tuple[int, float]] | None = None  # ids and log-probabilities, falling; None: not requested
    eos: int | None = None  # that ended the text, where one did


class Decoding:
    """Texts that are written together: `step` gives each of them a token.

    A text ends at an eos, after `max_new_tokens`, when it fills the context, or when its `Text` ends it. Each gets the
    text that it would get alone, up to float rounding.

    Args:
        rows: where the texts are generated, with its engine; cleared first.
        eos_ids: end a text.
        use_cache: as `Rows.next_logits` takes it.
        prompt_tokens: most tokens of prompts that one step reads, so that nobody waits for a long one; None: all.
        on_error: takes the number of a text whose settings leave no token to choose, and the error; the others go on.
            None: `step` raises it.
    """

    def __init__(
        self,
        rows: Rows,
        eos_ids: Sequence[int],
        use_cache: bool = True,
        prompt_tokens: int | None = None,
        on_error: Callable[[int, InputError], None] | None = None,
    ) -> None:
        self.rows, self.eos_ids, self.use_cache, self.prompt_tokens = rows, eos_ids, use_cache, prompt_tokens
        self._on_error = on_error
        rows.clear()

    def admit(
        self,
        number: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        text: Text | None = None,
        seed_offset: int = 0,
    ) -> int:
        """Add a text that begins with a prompt of 1 to max_seq_len - 1 ids.

        Args:
            number: names it in its events.
            text: turns the new tokens into characters and may end it; None: tokens only.
            seed_offset: is added to the config's seed.

        Returns:
            how many of the prompt's tokens need not be read.

        Raises:
            InputError: the config has ids that the model lacks.
        """
        config.check_ids(self.rows.engine.config.vocab_size)
        choice = Choice.of(config, self.eos_ids)
        choice = next((row.choice for row in self.rows.live if row.choice == choice), choice)
        generator = None if config.greedy else new_generator(config.seed, seed_offset)
        return self.rows.admit(number, prompt, config.max_new_tokens, generator, text, choice)

    def cancel(self, number: int) -> None:
        """End a text without another event."""
        for row in self.rows.live:
            if row.number == number:
                row.end = "cancelled"
        self.rows.drop_ended()

    def step(self) -> list[Event]:
        """Read prompts, and give a token to each text whose prompt was read -> their events, in the texts' order.

        Raises:
            InputError: the logits are not finite, or the settings leave no token to choose.
        """
        with torch.inference_mode():
            logits = self.rows.next_logits(self.use_cache, self.prompt_tokens)  # float32 [rows, V]
            if not len(logits):
                return []
            live = self.rows.live[: len(logits)]
            chosen = [0] * len(live)
            told: list[tuple[float | None, list[tuple[int, float]] | None]] = [(None, None)] * len(live)
            failed: dict[int, InputError] = {}  # by place
            for choice, places in _by_choice(live):
                own = logits if len(places) == len(live) else logits[places]
                try:
                    tokens = self._chosen(own, choice, places)
                except InputError as error:
                    self.rows.wipe(places)
                    if self._on_error is None:
                        raise
                    failed |= dict.fromkeys(places, error)
                    continue
                found = told_logprobs(own, tokens, choice.likely) if choice.logprobs else None
                for n, place in enumerate(places):
                    chosen[place] = tokens[n]
                    if found is not None:
                        told[place] = found[n]
            self.rows.append(chosen, self.eos_ids)

        events = []
        for place, (row, token, (logprob, likely)) in enumerate(zip(live, chosen, told, strict=True)):
            if place in failed:
                row.end = "error"
                self._on_error(row.number, failed[place])
                continue
            kept, eos = (None, token) if row.end == "eos" else (token, None)
            text = row.push(kept)  # may set row.end too: a stop string, repeats
            events.append(Event(row.number, kept, text, row.end, logprob, likely, eos))
        self.rows.drop_ended()
        return events

    def _chosen(self, logits: Tensor, choice: Choice, places: Sequence[int]) -> list[int]:
        """The next id of each of the texts at these places, float32 [len(places), V] being their logits.

        Raises:
            InputError: as `processed`.
        """
        generators = None if choice.greedy else [self.rows.live[place].generator for place in places]
        short = self.rows.shortlist(choice, len(places))
        if short is not None and short.is_finite():
            return short.choose(generators, choice.warpers)
        return sample(processed(logits, choice.processors, self.rows, places), generators, choice.warpers)


def _by_choice(live: Sequence[Row]) -> list[tuple[Choice, list[int]]]:
    """The ways in which rows choose, each with the places of its rows."""
    groups: dict[int, tuple[Choice, list[int]]] = {}
    for place, row in enumerate(live):
        groups.setdefault(id(row.choice), (row.choice, []))[1].append(place)
    return list(groups.values())


def new_generator(seed: int | None, number: int) -> random.Random:
    """The generator that a text draws from; without a seed, from fresh entropy."""
    return random.Random(None if seed is None else (seed + number) % 2**63)  # noqa: S311


def processed(logits: Tensor, processors: Sequence[Processor], rows: Rows, places: Sequence[int]) -> Tensor:
    """logits float32 [rows, V] of the texts at these places, after the bias and the penalties.

    Raises:
        InputError: the logits are not finite, or no token is left.
    """
    scores = logits
    if processors:
        tokens, output = rows.written(places)
        for process in processors:
            scores = process(scores, tokens, output)
    if not _largest_are_finite(scores):
        if not _largest_are_finite(logits):
            problem = "the weights give logits that are not finite: the training diverged, or the file is damaged"
        else:
            problem = "no token is left to choose: logit_bias, no_repeat_ngram_size or a penalty rules out all of them"
        raise InputError(problem)
    return scores


def _largest_are_finite(scores: Tensor) -> bool:
    """Whether each row's largest score is a finite number; NaN counts as the largest."""
    return all(map(math.isfinite, scores.amax(-1).tolist()))


def told_logprobs(
    logits: Tensor, chosen: Sequence[int], likely: int = 0
) -> list[tuple[float, list[tuple[int, float]] | None]]:
    """The log-probability of each row's token, as the model gives it, and the `likely` likeliest ids with theirs."""
    logprobs = logits.log_softmax(-1)
    picked = torch.tensor(chosen, device=logits.device)[:, None]
    own = logprobs.gather(1, picked)[:, 0].tolist()
    if not likely:
        return [(logprob, None) for logprob in own]
    values, ids = logprobs.topk(min(likely, logprobs.shape[-1]))
    pairs = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(own, pairs, strict=True))
