"""The order in which training reads its samples, computed for the samples that are asked for."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from model.dataset import PretrainDataset, SampleRange
from model.errors import InputError
from model.training.permutation import MOST_PLACES, derived_keys, permuted

BLOCK = 1 << 12  # positions whose samples are found together: of a few, NumPy's own time would be most


class Source(NamedTuple):
    """Samples that have a share of their own in the data, and how many of them an epoch reads."""

    samples: SampleRange
    per_epoch: int  # at least 1


class SampleOrder:
    """Which sample is read at each position of a run, by all processes together; a position is the number of samples
    read before.

    An epoch reads `per_epoch` samples of each source, spread evenly (`spread`). Each source is read in a random order,
    all of it before any of it is read again: an epoch goes on where the last one left off, and each pass has an order
    of its own. So where an epoch reads a whole source, it reads each sample once.

    The sample is a pure function of (seed, sources, position), computed without the order of the others
    (`permutation.permuted`). So resuming is exact, the order does not depend on how many processes share a step, and
    neither time nor memory depend on the size of the files.

    Args:
        sources: at least one.
        rows_per_step: samples of a step.

    Raises:
        InputError: there are more than MOST_PLACES samples.
    """

    def __init__(self, sources: Sequence[Source], seed: int, rows_per_step: int) -> None:
        self.sources, self.seed, self.rows_per_step = sources, seed, rows_per_step
        self._per_epoch = np.array([source.per_epoch for source in sources], dtype=np.int64)  # [sources]
        self.per_epoch = int(self._per_epoch.sum())  # samples
        self._block = functools.lru_cache(maxsize=2)(self._samples_of_block)
        if (most := max(self.per_epoch, *(len(source.samples) for source in sources))) > MOST_PLACES:
            raise InputError(f"{most:,} samples of training data, at most {MOST_PLACES:,} expected; raise max_seq_len")
        self._counted = 0, 0  # a position, and the tokens that the samples before it predict

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.per_epoch // self.rows_per_step)

    def steps_left(self, position: int, epochs: int) -> int:
        """Steps from `position` to the end of `epochs` epochs."""
        epoch, start = divmod(position, self.per_epoch)
        if epoch >= epochs:
            return 0
        return -(-(self.per_epoch - start) // self.rows_per_step) + (epochs - epoch - 1) * self.steps_per_epoch

    def next_step(self, position: int) -> np.ndarray:
        """The samples of the step that begins at `position`, int64; the last step of an epoch may have fewer rows."""
        rows = min(self.rows_per_step, self.per_epoch - position % self.per_epoch)
        first, last = position // BLOCK, (position + rows - 1) // BLOCK
        samples = np.concatenate([self._block(number) for number in range(first, last + 1)])
        return samples[position - first * BLOCK :][:rows]

    def _samples_of_block(self, number: int) -> np.ndarray:
        return self.samples_at(np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64))

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """The samples that are read at these positions, int64 [N] as they are."""
        epochs, places = np.divmod(positions, self.per_epoch)
        numbers, places = spread(places, self._per_epoch)  # of sources, and what an epoch has read of each before
        found = np.empty_like(places)
        for number, (samples, per_epoch) in enumerate(self.sources):
            its = np.flatnonzero(numbers == number)
            passes, within = np.divmod(epochs[its] * per_epoch + places[its], len(samples))
            for one_pass in np.unique(passes).tolist():
                of_pass = passes == one_pass
                key = derived_keys(self.seed, np.array([number]), np.array([one_pass]))
                found[its[of_pass]] = samples[permuted(within[of_pass], len(samples), key)]
        return found

    def count_targets(self, position: int, dataset: PretrainDataset) -> int:
        """Tokens that all samples before `position` predict, over all epochs."""
        if dataset.packing is None:
            return position * dataset.seq_len
        begin, tokens = self._counted if self._counted[0] <= position else (0, 0)
        while begin < position:
            end = min(position, (begin // BLOCK + 1) * BLOCK)
            tokens += dataset.count_targets(self._block(begin // BLOCK)[begin % BLOCK :][: end - begin])
            begin = end
        self._counted = position, tokens
        return tokens


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights that add up to `total` (by largest remainders), but at least 1 each."""
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    counts = [int(share) for share in exact]
    largest_first = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in largest_first[: total - sum(counts)]:
        counts[number] += 1
    return [max(1, count) for count in counts]


def spread(places: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of several sequences each place of their even mixture comes from, and which place of that one it is.

    The sequences are halved again and again. Of the first n places of any half, the left part of it has
    round(n * left / (left + right)), so that each prefix of the mixture has the right shares, to within a sample or
    two, and the whole of it has them exactly.

    Args:
        places: int64 [N], each below the sum of `counts`.
        counts: int64 [S], the lengths of the sequences, at least 1 each; together at most MOST_PLACES.

    Returns:
        numbers of sequences, and places in them: int64 [N] each.
    """
    ends = np.concatenate(([0], counts.cumsum()))
    first, after = np.zeros_like(places), np.full_like(places, len(counts))  # the sequences that it may come from
    for _ in range((len(counts) - 1).bit_length()):
        middle = (first + after) // 2
        left, both = ends[middle] - ends[first], ends[after] - ends[first]
        before = _rounded_share(places, left, both)
        is_left = _rounded_share(places + 1, left, both) > before
        places = np.where(is_left, before, places - before)
        first, after = np.where(is_left, first, middle), np.where(is_left, middle, after)
    return first, places


def _rounded_share(count: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """round(count * part / whole), halves up, for count and part up to `whole`; the product may need 80 bits."""
    quotient, rest = np.divmod((count >> 20) * part, whole)
    return (quotient << 20) + ((rest << 20) + (count & 0xFFFFF) * part + whole // 2) // whole
