"""Permutations of any size, of which single places are computed: no list of all places is ever made."""

import numpy as np

MOST_PLACES = 2**40
ROUNDS = 16  # as many as even permutations of a handful of places need to be as good as a shuffle
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd


def permuted(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where keyed permutations take some places: int64 [N], each below its size.

    A Feistel network on the two digits of a place to the bases `rows` and `columns`, about the square root of the size
    each: every round adds a hash of one digit to the other. That is the generalized Feistel cipher of Black and Rogaway
    (2002, "Ciphers with arbitrary finite domains"). What leaves the size goes through the network again until it is
    inside (cycle walking, same paper); of large sizes that is one place in thousands. The hash is the finalizer of
    SplitMix64 (Steele, Lea and Flood, 2014). Being integer arithmetic, it is the same on every machine and with every
    version of NumPy.

    Args:
        places: int64 [N], each from 0 to its size - 1.
        sizes: int64 [N], of each place's permutation, from 1 to MOST_PLACES.
        keys: uint64 [N], of each place's permutation; see `derived_keys`.
    """
    rows = 2 * np.ceil(np.sqrt(sizes) / 2).astype(np.int64)  # even: odd bases would yield even permutations only
    bases = np.stack((rows, -(-sizes // rows))).astype(np.uint64)
    found = _encrypted(places, bases, keys)
    while len(outside := np.flatnonzero(found >= sizes)):
        found[outside] = _encrypted(found[outside], bases[:, outside], keys[outside])
    return found


def derived_keys(seed: int, *numbers: np.ndarray) -> np.ndarray:
    """A key for each row of numbers, such as (file, pass): uint64 [N].

    Args:
        seed: 0 to 2**64 - 1.
        numbers: int64 [N] each.
    """
    keys = np.full(len(numbers[0]), seed, dtype=np.uint64)
    for values in numbers:
        keys = _mixed(keys + GOLDEN_GAMMA) ^ values.astype(np.uint64)
    return _mixed(keys + GOLDEN_GAMMA)


def _encrypted(places: np.ndarray, bases: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass through the network, for places below rows * columns: int64 [N].

    Args:
        bases: rows and columns, uint64 [2, N].
    """
    rows, columns = bases
    left, right = np.divmod(places.astype(np.uint64), columns)
    round_keys = keys + GOLDEN_GAMMA * np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None]  # [ROUNDS, N]
    for key, next_key in zip(round_keys[::2], round_keys[1::2], strict=True):
        left += _mixed(key ^ right) >> np.uint64(32)  # in place: for a batch NumPy's own time is what counts
        left %= rows
        right += _mixed(next_key ^ left) >> np.uint64(32)
        right %= columns
    return (left * columns + right).astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (the constants are David Stafford's Mix13), which writes over its argument: uint64 [N]."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
