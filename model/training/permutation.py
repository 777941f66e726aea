"""Permutations of any size, of which single places are computed: no list of all places is ever made."""

import numpy as np

MOST_PLACES = 2**40
ROUNDS = 16  # as many as a handful of places need until each of their permutations is equally likely
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation takes some places: int64 [N], each below `size`.

    A Feistel network on the two digits of a place to the bases `rows` and `columns`, about the square root of the size
    each: every round adds a hash of one digit to the other. That is the generalized Feistel cipher of Black and Rogaway
    (2002, "Ciphers with arbitrary finite domains"). What leaves the size goes through the network again until it is
    inside (cycle walking, same paper); of large sizes that is one place in thousands. The hash is the finalizer of
    SplitMix64 (Steele, Lea and Flood, 2014). Being integer arithmetic, it is the same on every machine and with every
    version of NumPy.

    Args:
        places: int64 [N], each from 0 to size - 1.
        size: from 1 to MOST_PLACES.
        keys: uint64 [1], or [N] of each place's permutation; see `derived_keys`.
    """
    rows = 2 * int(np.ceil(np.sqrt(size) / 2))  # even: odd bases would yield even permutations only
    columns = -(-size // rows)
    found = _encrypted(places, rows, columns, keys)
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = _encrypted(found[outside], rows, columns, keys[outside] if len(keys) > 1 else keys)
    return found


def derived_keys(seed: int, *numbers: np.ndarray) -> np.ndarray:
    """A key for each row of numbers, such as (source, pass): uint64 [N].

    Args:
        seed: 0 to 2**64 - 1.
        numbers: int64 [N] each.
    """
    keys = np.full(len(numbers[0]), seed, dtype=np.uint64)
    for values in numbers:
        keys = _mixed(keys + GOLDEN_GAMMA) ^ values.astype(np.uint64)
    return _mixed(keys + GOLDEN_GAMMA)


def _encrypted(places: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """One pass through the network, for places below rows * columns: int64 [N]."""
    rows, columns = np.uint64(rows), np.uint64(columns)
    left, right = np.divmod(places.astype(np.uint64), columns)
    for _ in range(ROUNDS // 2):
        keys = keys + GOLDEN_GAMMA
        left = (left + _digest(keys, right)) % rows
        keys = keys + GOLDEN_GAMMA
        right = (right + _digest(keys, left)) % columns
    return (left * columns + right).astype(np.int64)


def _digest(keys: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """A hash of 32 bits, to which a digit can be added without overflow: uint64 [N]."""
    return _mixed(keys ^ digits) >> np.uint64(32)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, with the constants of David Stafford's Mix13: uint64 [N]."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
