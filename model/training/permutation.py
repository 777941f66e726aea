"""Permutations of any size, of which single places are computed: no list of all places is ever made."""

import numpy as np

MOST_PLACES = 2**40
SMALL = 2**16  # places

# SplitMix64's numbers, the multipliers and shifts those of David Stafford's Mix13. They are arrays without dimensions,
# for which NumPy takes half the time that it takes for scalars: of a batch its own time is what counts.
GOLDEN_GAMMA = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)  # 2**64 / golden ratio, odd
MULTIPLIERS = [np.array(number, dtype=np.uint64) for number in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)]
SHIFTS = [np.array(number, dtype=np.uint64) for number in (30, 27, 31)]
HALF = np.array(32, dtype=np.uint64)  # of the bits of a hash


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
    # Each round key has its row. Few places need more rounds until every permutation of them is equally likely.
    rounds = np.arange(1, 17 if size < SMALL else 9, dtype=np.uint64)[:, None]
    round_keys = keys + GOLDEN_GAMMA * rounds  # [rounds, 1 or N]
    found = _encrypted(places, rows, columns, round_keys)
    while len(outside := np.flatnonzero(found >= size)):
        inside = round_keys[:, outside] if len(keys) > 1 else round_keys
        found[outside] = _encrypted(found[outside], rows, columns, inside)
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


def _encrypted(places: np.ndarray, rows: int, columns: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass through the network, for places below rows * columns: int64 [N]."""
    rows, columns = np.array(rows, dtype=np.uint64), np.array(columns, dtype=np.uint64)
    left, right = np.divmod(places.astype(np.uint64), columns)
    for key, next_key in zip(round_keys[::2], round_keys[1::2], strict=True):
        left += _mixed(key ^ right) >> HALF
        left %= rows
        right += _mixed(next_key ^ left) >> HALF
        right %= columns
    return (left * columns + right).astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, which writes over its argument: uint64 [N]."""
    values ^= values >> SHIFTS[0]
    values *= MULTIPLIERS[0]
    values ^= values >> SHIFTS[1]
    values *= MULTIPLIERS[1]
    values ^= values >> SHIFTS[2]
    return values
