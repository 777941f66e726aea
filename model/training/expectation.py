"""What held-out bits per byte a run will reach: the answer to "my loss stays at 4, is that right?".

A rule fitted to finished runs (`benchmarks/expectation.py`, figures in benchmarks/RESULTS.md), of the form of Hoffmann
et al., 2022: how surprising a text is by its tokens' frequencies and by how well it can be packed, times

    FLOOR + BY_SIZE / parameters ** SIZE_POWER + BY_TOKENS / tokens ** TOKENS_POWER

That tells texts apart: verse has more of a surprise in each byte than a program's help, which repeats itself.
"""

import bz2
import math
from dataclasses import dataclass

import numpy as np

from model.training.data import TrainingData

RULE = (0.3213, 200.8, 0.60, 3.320, 0.15)  # FLOOR, BY_SIZE, SIZE_POWER, BY_TOKENS, TOKENS_POWER
SPREAD = 0.12  # of the bits, either way, between texts: those of five lie up to 0.04 off
SPREAD_BEYOND = 0.06  # more of it for each factor of ten outside what was measured
MOST_BEYOND = 3.0  # factors of ten, of size and tokens together: farther away the rule says nothing
MEASURED_PARAMETERS, MEASURED_TOKENS = (1e6, 1e7), (2e5, 5e6)  # of the runs behind the rule
FEWEST_TOKENS = 5e4  # of fewer it says nothing: the warm-up decides
WHILE_RATE_IS_HIGH = 0.03  # more bits at a run's begin than at the end of a run that ends there; less as it goes on
WORTH_OF_PASSES = 15.4  # Muennighoff et al., 2023: after about so many passes more of them teach nothing
SHARE_OF_TOKENS = {"muon": 1.0, "adamw": 0.3, "adam": 0.3}  # with a good rate, to the same loss with Muon
MOST_COUNTED, PIECES = 2_000_000, 64  # tokens that frequencies are counted of, in so many places
MOST_PACKED = 300_000  # tokens that are packed
BY_COMPRESSION = 0.8  # how much packing counts beside frequencies


@dataclass(frozen=True)
class Expectation:
    """Bits per byte of held-out text: a run with good settings ends between low and high."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}"


def unigram_bits_per_byte(ids: np.ndarray, lengths: np.ndarray, is_text: np.ndarray) -> float:
    """Bits per byte of text for a model that knows the tokens' frequencies alone.

    Args:
        ids: of a part of the text, any shape.
        lengths, is_text: as TokenBytes has them, by id.
    """
    counts = np.bincount(ids.ravel(), minlength=len(lengths))[: len(lengths)].astype(np.float64)
    shares = counts[counts > 0] / counts.sum()
    bits = -(counts[counts > 0] * np.log2(shares))
    of_text = is_text[counts > 0]
    return float(bits[of_text].sum() / max(1.0, (counts * lengths)[is_text].sum()))


def compressed_bits_per_byte(ids: np.ndarray, lengths: np.ndarray, is_text: np.ndarray) -> float:
    """Bits per byte of text to which bzip2 packs the ids as uint16: fewer where the text repeats itself.

    Args:
        ids, lengths, is_text: as `unigram_bits_per_byte` takes them.
    """
    packed = 8 * len(bz2.compress(ids.astype("<u2").tobytes()))
    return packed / max(1.0, float(lengths[ids][is_text[ids]].sum()))


def text_bits_of_data(data: TrainingData) -> float:
    """How surprising the texts are that are trained on, in bits per byte: the mean, weighted by BY_COMPRESSION and
    geometric, of what their tokens cost by frequency and by repetition; from pieces spread over their files."""
    files, about = data.train.token_arrays(), (data.token_bytes.lengths, data.token_bytes.is_text)
    total = sum(map(len, files))

    def some(most: int) -> np.ndarray:
        return np.concatenate([_spread(tokens, round(most * len(tokens) / total)) for tokens in files])

    unigram = unigram_bits_per_byte(some(MOST_COUNTED), *about)
    return unigram ** (1 - BY_COMPRESSION) * compressed_bits_per_byte(some(MOST_PACKED), *about) ** BY_COMPRESSION


def _spread(tokens: np.ndarray, most: int) -> np.ndarray:
    """At most so many tokens, in pieces spread evenly: a disk reads each of them at once."""
    if len(tokens) <= most:
        return np.asarray(tokens)
    length = max(1, most // PIECES)
    begins = np.linspace(0, len(tokens) - length, PIECES).astype(np.int64)
    return np.concatenate([tokens[begin : begin + length] for begin in begins.tolist()])


def worth(tokens: float, epoch_tokens: float) -> float:
    """New tokens that teach as much as these, some of which are read again (Muennighoff et al., 2023)."""
    again = max(0.0, tokens / epoch_tokens - 1)
    return min(tokens, epoch_tokens) * (1 + WORTH_OF_PASSES * (1 - math.exp(-again / WORTH_OF_PASSES)))


def share_of_text_bits(parameters: float, tokens: float, rule: tuple[float, ...] = RULE) -> float:
    """The rule: the bits per byte of a run's end, divided by those of frequencies alone."""
    floor, by_size, size_power, by_tokens, tokens_power = rule
    return floor + by_size / parameters**size_power + by_tokens / tokens**tokens_power


@dataclass(frozen=True)
class Outlook:
    """What a run on texts, from random weights, will reach with recipe best or settings as good.

    Attributes:
        text_bits: `text_bits_of_data`.
        parameters: of the model that compute a token.
        epoch_tokens: of one pass over the text.
        total_tokens: of the run.
        optimizer_type: as in the settings.
    """

    text_bits: float
    parameters: int
    epoch_tokens: int
    total_tokens: int
    optimizer_type: str = "muon"

    @property
    def at_end(self) -> Expectation:
        """Of the whole run."""
        return self.after(self.total_tokens)

    def after(self, tokens: float) -> Expectation:
        """Of the run after so many tokens, while its learning rate has not fallen yet."""
        taught = SHARE_OF_TOKENS.get(self.optimizer_type, 1.0) * worth(max(1.0, tokens), self.epoch_tokens)
        middle = self.text_bits * min(1.0, share_of_text_bits(self.parameters, taught))
        middle *= 1 + WHILE_RATE_IS_HIGH * max(0.0, 1 - tokens / self.total_tokens)
        spread = 1 + SPREAD + SPREAD_BEYOND * self.tens_beyond
        return Expectation(middle / spread, middle, middle * spread)

    @property
    def is_known(self) -> bool:
        """Whether the rule says something of this run."""
        return self.total_tokens >= FEWEST_TOKENS and self.tens_beyond <= MOST_BEYOND

    @property
    def tens_beyond(self) -> float:
        """Factors of ten by which this run lies outside those that the rule was made from, in size and in tokens."""
        return _tens_outside(self.parameters, MEASURED_PARAMETERS) + _tens_outside(self.total_tokens, MEASURED_TOKENS)


def _tens_outside(value: float, limits: tuple[float, float]) -> float:
    return max(0.0, math.log10(limits[0] / value), math.log10(value / limits[1]))
