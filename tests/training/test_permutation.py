"""The permutation behind the order of samples: one of any size, and as good as a shuffle."""

import math

import numpy as np
import pytest

from model.training.permutation import MOST_PLACES, derived_keys, permuted

SIZES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    97,
    255,
    256,
    257,
    1009,
    4095,
    4096,
    4097,
    65_535,
    65_536,
    65_537,
    99_991,
]
HUGE = 2_400_000_000  # samples of 10**13 tokens


def permutations(size: int, seeds: int, seed: int = 0) -> np.ndarray:
    """Whole permutations, one for each of so many keys: int64 [seeds, size]."""
    keys = np.repeat(derived_keys(seed, np.arange(seeds)), size)
    places = np.tile(np.arange(size), seeds)
    return permuted(places, size, keys).reshape(seeds, size)


def shuffles(size: int, seeds: int) -> np.ndarray:
    random = np.random.default_rng(5)
    return random.permuted(np.tile(np.arange(size), (seeds, 1)), axis=1)


MADE = pytest.mark.parametrize("made", [permutations, shuffles])  # what holds for the one must hold for the other


def deviation(counts: np.ndarray, expected: float) -> float:
    """How far counts are from the one that is expected of each, in standard deviations of chi-square."""
    degrees = counts.size - 1
    return (((counts - expected) ** 2).sum() / expected - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("size", SIZES)
def test_each_place_is_taken_once(size):
    for found in permutations(size, seeds=3):
        assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [1, 10, 97, 65_535, HUGE, MOST_PLACES])
def test_places_are_computed_alone_as_they_are_together_and_never_leave_the_size(size):
    places, keys = np.linspace(0, size - 1, 50).astype(np.int64), derived_keys(1, np.arange(50), np.arange(50) ** 2)
    together = permuted(places, size, keys)
    alone = [permuted(places[n : n + 1], size, keys[n : n + 1])[0] for n in range(50)]
    assert together.tolist() == alone and together.min() >= 0 and together.max() < size


@MADE
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_every_permutation_of_a_few_is_equally_frequent(made, size):
    seeds = 40_000
    _, counts = np.unique(made(size, seeds) @ size ** np.arange(size), return_counts=True)
    assert len(counts) == math.factorial(size) and deviation(counts, seeds / len(counts)) < 4


@MADE
@pytest.mark.parametrize("size", [7, 16, 31])
def test_every_place_goes_everywhere_equally_often_and_so_do_two_neighbours(made, size):
    seeds = 20_000
    found = made(size, seeds)
    where = np.array([np.bincount(column, minlength=size) for column in found.T])
    assert abs(deviation(where, seeds / size)) < 4
    pairs = np.bincount(found[:, 2] * size + found[:, 3], minlength=size * size).reshape(size, size)
    assert (pairs.diagonal() == 0).all()
    assert abs(deviation(pairs[~np.eye(size, dtype=bool)], seeds / size / (size - 1))) < 4


@MADE
@pytest.mark.parametrize("size", [1000, 1009, 1024, 70_001])
def test_neighbours_positions_and_epochs_show_no_pattern(made, size):
    seeds = 400 if size < 10_000 else 8
    found = made(size, seeds).astype(float)
    uniform = (found - (size - 1) / 2) / math.sqrt((size * size - 1) / 12)  # mean 0, variance 1
    assert np.abs(uniform.mean(axis=0) * math.sqrt(seeds)).max() < 4.8  # of each position, over all seeds
    for lag in (1, 2, 3, 7, 32, 33, 64):  # of each permutation with itself, some samples later
        correlation = (uniform[:, lag:] * uniform[:, :-lag]).mean()
        assert abs(correlation) * math.sqrt(seeds * (size - lag)) < 4.5
    between = (uniform[1:] * uniform[:-1]).mean()  # of one permutation with the next
    assert abs(between) * math.sqrt((seeds - 1) * size) < 4.5
    for step in (1, 2, 32):  # neighbours that stay neighbours, of which Poisson's law expects 2 in each permutation
        kept = (np.abs(np.diff(found, axis=1)) == step).sum()
        assert abs(kept - 2 * seeds) < 4.5 * math.sqrt(2 * seeds)
    fixed = (found == np.arange(size)).sum()
    assert abs(fixed - seeds) < 4.5 * math.sqrt(seeds)


@pytest.mark.parametrize("begin", [0, HUGE // 2, HUGE - 100_000])
def test_a_stretch_of_a_huge_permutation_is_scattered_evenly(begin):
    places = np.arange(begin, begin + 100_000)
    found = permuted(places, HUGE, derived_keys(42, np.arange(1)))
    assert len(np.unique(found)) == len(found) and 0 <= found.min() and found.max() < HUGE
    assert abs(deviation(np.bincount(found * 1000 // HUGE, minlength=1000), 100)) < 4
    assert abs(deviation(np.bincount(found % 1000, minlength=1000), 100)) < 4
    uniform = (found / HUGE - 0.5) * math.sqrt(12)
    for lag in (1, 2, 49_000):  # 49,000 is about the network's base
        assert abs((uniform[lag:] * uniform[:-lag]).mean()) * math.sqrt(len(found) - lag) < 4.5
    gaps = np.diff(np.sort(found)) * len(found) / HUGE  # exponentially distributed
    assert abs(deviation(np.bincount(np.minimum((np.exp(-gaps) * 100).astype(int), 99)), len(gaps) / 100)) < 4
