"""How to choose the tokens of a text, and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InputError
from model.generation.sampling import (
    LogitBias,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    OutputPenalties,
    Processor,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)

GREEDY_BELOW = 1e-4  # a temperature under this means greedy: dividing by it could overflow


@dataclass
class GenerationConfig:
    """How to choose tokens, and how many.

    Raises:
        InputError: values that cannot be used; all of them are named at once.
    """

    do_sample: bool = True  # False: greedy, the likeliest token each time
    temperature: float = 0.8  # 0 means greedy
    top_k: int = 50  # 0: off
    top_p: float = 0.9  # 1: off
    min_p: float = 0.0  # 0: off
    max_new_tokens: int = 100
    min_new_tokens: int = 0  # the text does not end before
    repetition_penalty: float = 1.1  # 1: off; small models repeat themselves without one
    presence_penalty: float = 0.0  # 0: off; of what the output holds, not the prompt
    frequency_penalty: float = 0.0  # 0: off; times the tokens' number in the output
    no_repeat_ngram_size: int = 0  # 0: off
    stop_strings: Sequence[str] = ()  # the text ends before any of these
    max_repeats: int = 0  # 0: off; the text ends once its last tokens are one passage so many times
    logit_bias: dict[int, float] | None = None  # added to the logits of these ids; -inf bans one
    use_cache: bool = True  # False recomputes the whole sequence for each token: slow, to compare with
    logprobs: bool = False  # tell each token's log-probability, as the model gives it before any of the above
    seed: int | None = None  # equal seeds give equal text; None: different each time

    def __post_init__(self) -> None:
        problems = generation_problems(self)
        if problems:
            raise InputError("; ".join(problems))

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < GREEDY_BELOW

    def processors(self, eos_ids: Sequence[int]) -> list[Processor]:
        """The bias and the penalties, in transformers' order."""
        processors: list[Processor] = []
        if self.logit_bias:
            processors.append(LogitBias(self.logit_bias))
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenalty(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            processors.append(NoRepeatNgram(self.no_repeat_ngram_size))
        if self.min_new_tokens:
            processors.append(MinNewTokens(self.min_new_tokens, eos_ids))
        if self.presence_penalty or self.frequency_penalty:
            processors.append(OutputPenalties(self.presence_penalty, self.frequency_penalty))
        return processors

    def warpers(self) -> list[Processor]:
        """What shapes the distribution that is drawn from, after the processors, in transformers' order."""
        warpers: list[Processor] = []
        if self.greedy:
            return warpers
        if self.temperature != 1:
            warpers.append(Temperature(self.temperature))
        if self.top_k:
            warpers.append(TopK(self.top_k))
        if self.top_p < 1:
            warpers.append(TopP(self.top_p))
        if self.min_p:
            warpers.append(MinP(self.min_p))
        return warpers


def generation_problems(config: GenerationConfig) -> list[str]:
    """Every value that cannot be used: one text each, naming the setting, the value and what is accepted."""

    def whole(value, least: int) -> bool:
        return type(value) is int and value >= least

    def number(value) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def usable_bias(bias) -> bool:
        return isinstance(bias, dict) and all(
            whole(index, 0) and (number(value) or value == -math.inf) for index, value in bias.items()
        )

    seed, penalty, bias, most = config.seed, config.repetition_penalty, config.logit_bias, config.max_new_tokens
    stops = config.stop_strings
    accepted = {  # setting: (is it usable, what would be)
        "do_sample": (type(config.do_sample) is bool, "true or false"),
        "temperature": (number(config.temperature) and config.temperature >= 0, "a number from 0 (greedy) up"),
        "top_k": (whole(config.top_k, 0), "a whole number from 0 (off) up"),
        "top_p": (number(config.top_p) and 0 <= config.top_p <= 1, "a number from 0 to 1 (off)"),
        "min_p": (number(config.min_p) and 0 <= config.min_p <= 1, "a number from 0 (off) to 1"),
        "max_new_tokens": (whole(most, 1), "a whole number from 1 up"),
        "repetition_penalty": (number(penalty) and penalty > 0, "a number above 0 (1: off)"),
        "min_new_tokens": (
            whole(config.min_new_tokens, 0) and (not whole(most, 1) or config.min_new_tokens <= most),
            "a whole number from 0 to max_new_tokens",
        ),
        "presence_penalty": (number(config.presence_penalty), "a number (0: off)"),
        "frequency_penalty": (number(config.frequency_penalty), "a number (0: off)"),
        "stop_strings": (
            type(stops) in (list, tuple) and all(type(stop) is str and stop for stop in stops),
            "a list of texts",
        ),
        "max_repeats": (
            whole(config.max_repeats, 0) and config.max_repeats != 1,
            "0 (off) or a whole number from 2 up",
        ),
        "logit_bias": (bias is None or usable_bias(bias), "None or numbers by token id, -inf to ban one"),
        "no_repeat_ngram_size": (whole(config.no_repeat_ngram_size, 0), "a whole number from 0 (off) up"),
        "logprobs": (type(config.logprobs) is bool, "true or false"),
        "use_cache": (type(config.use_cache) is bool, "true or false"),
        "seed": (seed is None or (whole(seed, 0) and seed < 2**63), "None or a whole number from 0 to 2**63 - 1"),
    }
    return [
        f"{name}: {getattr(config, name)!r} is not {expected}"
        for name, (usable, expected) in accepted.items()
        if not usable
    ]
