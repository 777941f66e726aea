"""The options of sampling, and of when a text ends. Without torch, so that a command line is read at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InputError
from model.options import check_options, is_number, is_whole, setting

DTYPE_NAMES = ("float32", "bfloat16", "float16", "int8")  # of the weights in memory
GREEDY_BELOW = 1e-4  # a temperature below this means greedy: dividing by it could overflow


def _are_stop_strings(value) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) and text for text in value)


def _is_logit_bias(value) -> bool:
    return isinstance(value, dict) and all(
        is_whole(index) and index >= 0 and (is_number(bias) or bias == -math.inf) for index, bias in value.items()
    )


@dataclass
class GenerationConfig:
    """How to choose tokens, and how many.

    Raises:
        InputError: naming every value that is refused.
    """

    do_sample: bool = setting(True, "draw tokens at random; false: greedy, the likeliest token each time")
    temperature: float = setting(0.8, "higher is more random; 0 is greedy", at_least=0)
    top_k: int = setting(50, "choose among the k likeliest tokens; 0: off", at_least=0)
    top_p: float = setting(
        0.9, "choose among the likeliest tokens that reach this probability together; 1: off", at_least=0, at_most=1
    )
    min_p: float = setting(
        0.0, "choose among tokens whose probability is this share of the likeliest's; 0: off", at_least=0, at_most=1
    )
    max_new_tokens: int = setting(100, "most tokens to generate", at_least=1)
    min_new_tokens: int = setting(0, "fewest tokens to generate: the text ends no earlier", at_least=0)
    repetition_penalty: float = setting(1.1, "higher repeats less; 1: off", above=0)
    presence_penalty: float = setting(0.0, "taken off the logits of tokens that the output has; 0: off")
    frequency_penalty: float = setting(0.0, "the same, times how often the output has them; 0: off")
    no_repeat_ngram_size: int = setting(0, "no run of this many tokens occurs twice; 0: off", at_least=0)
    stop_strings: Sequence[str] = setting(
        (), "the text ends before any of these", accepts=(_are_stop_strings, "a list of texts")
    )
    max_repeats: int = setting(
        0,
        "the text ends once its last tokens are one passage this many times; 0: off",
        accepts=(
            lambda value: is_whole(value) and value >= 0 and value != 1,
            "0 (off) or a whole number of at least 2",
        ),
    )
    logit_bias: dict[int, float] | None = setting(
        None,
        "added to the logits of these ids; -inf bans one",
        accepts=(lambda value: value is None or _is_logit_bias(value), "null or numbers by token id, -inf to ban one"),
    )
    use_cache: bool = setting(True, "false: recompute all of the text for each token, slowly, to compare")
    logprobs: bool = setting(False, "tell each token's log-probability, as the model gives it before any of the above")
    top_logprobs: int = setting(0, "tell this many of the likeliest tokens too, with theirs; 0: none", at_least=0)
    seed: int | None = setting(
        None, "equal seeds give equal text; null: different each time", at_least=0, at_most=2**63 - 1
    )

    def __post_init__(self) -> None:
        problems = check_options(self)
        if not problems and self.min_new_tokens > self.max_new_tokens:
            problems = [f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"]
        if problems:
            raise InputError("; ".join(problems))

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < GREEDY_BELOW

    def check_ids(self, vocab_size: int) -> None:
        """Refuse a bias for a token that the model lacks.

        Raises:
            InputError: naming the id and the vocabulary.
        """
        unknown = [index for index in self.logit_bias or {} if index >= vocab_size]
        if unknown:
            raise InputError(f"logit_bias: id {unknown[0]} found, the vocabulary has the ids 0 to {vocab_size - 1}")
