"""From a step's logits to the next token: processors that compose, warpers for what is drawn, and the draw.

A processor is called with `logits` float32 [B, V], `tokens` int64 [B, T] (prompt and output so far, ending with the
newest token) and `output` int64 [B, N] (the output alone), PADDING where a row has no token; it returns the new logits.
A warper looks at the logits only. Each equals the transformers 5 processor that it names.
"""

import bisect
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.accelerator import kind_of
from model.generation.generation_config import GenerationConfig

PADDING = -1  # in `tokens`: no token here; left of the shorter rows of a batch

Processor = Callable[[Tensor, Tensor, Tensor], Tensor]


def _marked(ids: Tensor, vocab_size: int) -> Tensor:
    """ids int64 [B, N] -> bool [B, V]: which ids occur in each row; PADDING marks nothing."""
    marked = torch.zeros(ids.shape[0], vocab_size + 1, dtype=torch.bool, device=ids.device)
    marked.scatter_(1, ids.where(ids != PADDING, vocab_size), True)
    return marked[:, :vocab_size]


@dataclass(frozen=True)
class LogitBias:
    """Add to the logits of single tokens: -inf bans one.

    transformers: SequenceBiasLogitsProcessor, for sequences of one token.
    """

    bias: Mapping[int, float]

    def __call__(self, logits: Tensor, tokens: Tensor, output: Tensor) -> Tensor:
        ids = torch.tensor(list(self.bias), device=logits.device)
        return logits.index_add(1, ids, logits.new_tensor(list(self.bias.values())).expand(len(logits), -1))


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide the positive logits of tokens seen before by `penalty`, multiply the negative ones (Keskar et al., 2019).

    transformers: RepetitionPenaltyLogitsProcessor.
    """

    penalty: float

    def __call__(self, logits: Tensor, tokens: Tensor, output: Tensor) -> Tensor:
        tokens = tokens.where(tokens != PADDING, tokens[:, -1:])  # the newest token is none; twice is as once
        seen = logits.gather(1, tokens)  # [B, T]
        lower = torch.minimum if self.penalty > 1 else torch.maximum
        return logits.scatter(1, tokens, lower(seen * self.penalty, seen / self.penalty))


@dataclass(frozen=True)
class NoRepeatNgram:
    """Ban each token that would complete an n-gram of `size` tokens that the row already holds (Paulus et al., 2017).

    transformers: NoRepeatNGramLogitsProcessor; but padding is no part of an n-gram here.
    """

    size: int

    def __call__(self, logits: Tensor, tokens: Tensor, output: Tensor) -> Tensor:
        if tokens.shape[1] < self.size:
            return logits
        ngrams = tokens.unfold(1, self.size, 1)  # [B, T - size + 1, size]
        last = tokens[:, tokens.shape[1] - self.size + 1 :]  # [B, size - 1]
        completes = (ngrams[..., :-1] == last[:, None]).all(-1)  # [B, T - size + 1]; padding has no second beginning
        banned = _marked(ngrams[..., -1].where(completes, PADDING), logits.shape[-1])
        return logits.masked_fill(banned, -torch.inf)


@dataclass(frozen=True)
class MinNewTokens:
    """Ban the end for the first `count` tokens of the output.

    transformers: MinNewTokensLengthLogitsProcessor.
    """

    count: int
    eos_ids: Sequence[int]

    def __call__(self, logits: Tensor, tokens: Tensor, output: Tensor) -> Tensor:
        short = (output != PADDING).sum(1, keepdim=True) < self.count  # [B, 1]
        ends = torch.tensor(self.eos_ids, device=logits.device).expand(len(logits), -1)
        return torch.where(short, logits.scatter(1, ends, -torch.inf), logits)


@dataclass(frozen=True)
class OutputPenalties:
    """Subtract `presence` from the logit of each token in the output, and `frequency` for each time that it occurs.

    OpenAI's and vLLM's presence_penalty and frequency_penalty; transformers has none.
    """

    presence: float
    frequency: float

    def __call__(self, logits: Tensor, tokens: Tensor, output: Tensor) -> Tensor:
        vocab_size = logits.shape[-1]
        counts = torch.zeros(logits.shape[0], vocab_size + 1, dtype=logits.dtype, device=logits.device)
        counts.scatter_add_(1, output.where(output != PADDING, vocab_size), torch.ones_like(output, dtype=logits.dtype))
        counts = counts[:, :vocab_size]
        return logits - self.presence * (counts > 0) - self.frequency * counts


@dataclass(frozen=True)
class Temperature:
    """Divide the logits: below 1 sharpens the distribution, above 1 flattens it.

    transformers: TemperatureLogitsWarper.
    """

    temperature: float

    def __call__(self, logits: Tensor, *_: Tensor) -> Tensor:
        return logits / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the k largest logits, and those that tie with the k-th (Fan et al., 2018).

    transformers: TopKLogitsWarper.
    """

    k: int

    def __call__(self, logits: Tensor, *_: Tensor) -> Tensor:
        smallest_kept = logits.topk(min(self.k, logits.shape[-1])).values[:, -1:]  # [B, 1]
        return logits.masked_fill(logits < smallest_kept, -torch.inf)


@dataclass(frozen=True)
class TopP:
    """Keep the likeliest tokens up to the one that brings their probability to `p` (Holtzman et al., 2019).

    At least one stays, so 0 keeps only the likeliest. transformers: TopPLogitsWarper.
    """

    p: float

    def __call__(self, logits: Tensor, *_: Tensor) -> Tensor:
        ascending, order = logits.sort(descending=False)  # [B, V] each
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - self.p
        removed[:, -1] = False
        return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)


@dataclass(frozen=True)
class MinP:
    """Keep the tokens that are at least `p` times as likely as the likeliest (Nguyen et al., 2025).

    transformers: MinPLogitsWarper.
    """

    p: float

    def __call__(self, logits: Tensor, *_: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        return logits.masked_fill(probabilities < self.p * probabilities.amax(-1, keepdim=True), -torch.inf)


FROM_HOST = (LogitBias, MinNewTokens)  # they send ids to the device each time


def processors_of(config: GenerationConfig, eos_ids: Sequence[int]) -> list[Processor]:
    """The bias and the penalties that a config asks for, in transformers' order."""
    processors: list[Processor] = []
    if config.logit_bias:
        processors.append(LogitBias(config.logit_bias))
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenalty(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNgram(config.no_repeat_ngram_size))
    if config.min_new_tokens:
        processors.append(MinNewTokens(config.min_new_tokens, eos_ids))
    if config.presence_penalty or config.frequency_penalty:
        processors.append(OutputPenalties(config.presence_penalty, config.frequency_penalty))
    return processors


def warpers_of(config: GenerationConfig) -> list[Processor]:
    """The warpers of the distribution to draw from, applied after the processors, in transformers' order."""
    warpers: list[Processor] = []
    if config.greedy:
        return warpers
    if config.temperature != 1:
        warpers.append(Temperature(config.temperature))
    if config.top_k:
        warpers.append(TopK(config.top_k))
    if config.top_p < 1:
        warpers.append(TopP(config.top_p))
    if config.min_p:
        warpers.append(MinP(config.min_p))
    return warpers


@dataclass(frozen=True)
class Choice:
    """How a text's tokens are chosen; texts that choose alike are processed together."""

    processors: Sequence[Processor] = ()
    warpers: Sequence[Processor] = ()
    greedy: bool = True
    logprobs: bool = False  # tell them
    likely: int = 0  # likeliest tokens to tell

    @classmethod
    def of(cls, config: GenerationConfig, eos_ids: Sequence[int]) -> "Choice":
        """What a config asks for."""
        processors, warpers = processors_of(config, eos_ids), warpers_of(config)
        return cls(processors, warpers, config.greedy, config.logprobs or config.top_logprobs > 0, config.top_logprobs)

    def shortlisted(self, vocab_size: int) -> int:
        """How many of a row's largest scores tell its next token, if the device finds them by itself; 0: it cannot."""
        if any(isinstance(processor, FROM_HOST) for processor in self.processors):
            return 0
        if self.greedy:
            return 1
        return _top_k(self.warpers) + 1 if _can_draw_from_top_k(self.warpers, vocab_size) else 0


class Shortlist(NamedTuple):
    """Of each row, what its next token is chosen from."""

    values: list[list[float]]  # the largest scores, falling
    ids: list[list[int]]  # theirs
    scores: Tensor  # float32 [B, V], all

    def is_finite(self) -> bool:
        """Whether each row's largest score is a finite number; NaN counts as the largest."""
        return all(math.isfinite(values[0]) for values in self.values)

    def choose(self, generators: Sequence[random.Random] | None, warpers: Sequence[Processor]) -> list[int]:
        """As `sample`, of as many scores as `Choice.shortlisted` says."""
        if generators is None:
            return [ids[0] for ids in self.ids]
        return _draw_from_top_k(self, generators, warpers)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row of scores [B, V], falling, and their ids, [B, count]; if one, of equal ones the first."""
    if count > 1:
        return scores.topk(count)
    ids = scores.argmax(-1, keepdim=True)
    return scores.gather(1, ids), ids


def sample(
    logits: Tensor, generators: Sequence[random.Random] | None = None, warpers: Sequence[Processor] = ()
) -> list[int]:
    """The next id of each row of logits, float32 [B, V].

    With generators, one a row, a draw from softmax(logits) after the warpers: a row's draws depend on its own generator
    alone, whatever the batch and the device, and no global generator is touched. Without, the largest logit.
    """
    if generators is None:
        return logits.argmax(-1).tolist()
    if _can_draw_from_top_k(warpers, logits.shape[-1]):
        values, ids = largest(logits, _top_k(warpers) + 1)
        return _draw_from_top_k(Shortlist(values.tolist(), ids.tolist(), logits), generators, warpers)
    for warper in warpers:
        logits = warper(logits)
    probabilities = logits.softmax(-1)
    if not kind_of(logits.device).has_float64:
        probabilities = probabilities.cpu()
    sums = probabilities.double().cumsum(-1)  # [B, V]
    shares = torch.tensor([[generator.random()] for generator in generators], dtype=sums.dtype, device=sums.device)
    return torch.searchsorted(sums, shares * sums[:, -1:], right=True)[:, 0].clamp(max=sums.shape[1] - 1).tolist()


def _can_draw_from_top_k(warpers: Sequence[Processor], vocab_size: int) -> bool:
    """Whether these are warpers that `_draw_from_top_k` knows, in the order in which it applies them."""
    known = iter((Temperature, TopK, TopP, MinP))
    in_order = all(type(warper) in known for warper in warpers)  # each looks only past the one before it
    return in_order and any(type(warper) is TopK and warper.k < vocab_size for warper in warpers)


def _top_k(warpers: Sequence[Processor]) -> int:
    return next(warper.k for warper in warpers if isinstance(warper, TopK))


def _draw_from_top_k(short: Shortlist, generators: Sequence[random.Random], warpers: Sequence[Processor]) -> list[int]:
    """The same for a TopK with any of Temperature, TopP and MinP, in plain Python on the logits that TopK leaves.

    A token may take a millisecond, in which the weights drive all else out of the processor's caches: each of the
    warpers' thirty small tensor operations would cost 4 µs.
    """
    settings = {type(warper): warper for warper in warpers}
    temperature = settings[Temperature].temperature if Temperature in settings else 1.0
    removed = 1 - settings[TopP].p if TopP in settings else 0.0
    least = settings[MinP].p if MinP in settings else 0.0
    drawn = []
    for row, (values, candidates, generator) in enumerate(zip(short.values, short.ids, generators, strict=True)):
        if values[-1] == values[-2]:  # more than k: those that tie with the k-th stay, as 16-bit logits often do
            tied = (short.scores[row] >= values[-1]).nonzero()[:, 0]
            ordered, order = short.scores[row, tied].sort(descending=True, stable=True)
            values, candidates = ordered.tolist(), tied[order].tolist()
        else:
            values.pop()
        weights = [math.exp((value - values[0]) / temperature) for value in values]
        sums = list(itertools.accumulate(weights[: _kept(weights, removed, least)]))
        drawn.append(candidates[bisect.bisect_right(sums, generator.random() * sums[-1], hi=len(sums) - 1)])
    return drawn


def _kept(weights: list[float], removed: float, least: float) -> int:
    """How many of the weights, which fall from 1, are left by TopP, which removes a share of 1 - p, and MinP."""
    tail, share = 0.0, removed * sum(weights)
    for count in range(len(weights), 1, -1):
        tail += weights[count - 1]
        if tail > share and weights[count - 1] >= least:
            return count
    return 1
