"""Which documents nearly repeat an earlier one: MinHash signatures (Broder 1997) of their five-character shingles.

The signatures are rensa's (MIT, optional). Documents are compared where a band of their signatures is equal
(Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4), band by band, by sorting as for exact duplicates.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.corpus.duplicates import READ_AT_ONCE, first_occurrences, new_mapped
from model.errors import InputError

PERMUTATIONS = 128
SHINGLE = 5  # characters, without white space
SEED = 1


def require_library() -> None:
    """Raises InputError where rensa is not installed."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        raise InputError("near_duplicates: this needs rensa: pip install rensa") from None


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures, uint32 [len(texts), PERMUTATIONS]."""
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    hashes, ends = [], [0]
    for text in texts:
        own = _shingle_hashes(text)
        hashes.append(own)
        ends.append(ends[-1] + len(own))
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(hashes), np.array(ends, dtype=np.uint64), PERMUTATIONS, SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _shingle_hashes(text: str) -> np.ndarray:
    """A hash of each run of SHINGLE characters, without white space: uint64 [at least 1]."""
    characters = np.frombuffer("".join(text.split()).encode("utf-32-le"), "<u4").astype(np.uint64)
    count = max(1, len(characters) - SHINGLE + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for shift in range(min(SHINGLE, len(characters))):
        hashes = (hashes + characters[shift : shift + count]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the fewest bands, of those that use all permutations, that find documents of the wanted
    similarity; at (1 / bands) ** (1 / rows) half of the pairs are found."""
    for rows in (32, 16, 8, 4, 2):
        bands = PERMUTATIONS // rows
        if (1 / bands) ** (1 / rows) <= threshold - 0.05:
            return bands, rows
    return PERMUTATIONS, 1


def first_similar(signatures_path: Path, folder: Path, threshold: float) -> np.ndarray:
    """For each document the number of the first one found whose estimated Jaccard similarity is at least `threshold`:
    its own, or an earlier one's.

    Each document is compared with the first of those that share a band with it. Memory as `first_occurrences`.

    Args:
        signatures_path: uint32 [N, PERMUTATIONS].
        folder: for temporary files.

    Returns:
        int64 [N], mapped from a file.
    """
    count = signatures_path.stat().st_size // (4 * PERMUTATIONS)
    if not count:
        return np.zeros(0, dtype=np.int64)
    all_signatures = np.memmap(signatures_path, dtype="<u4", mode="r", shape=(count, PERMUTATIONS))
    found = new_mapped(folder / "similar", count)
    for start in range(0, count, READ_AT_ONCE):
        found[start : start + READ_AT_ONCE] = np.arange(start, min(start + READ_AT_ONCE, count))
    bands, rows = bands_for(threshold)
    for band in range(bands):
        columns = slice(band * rows, (band + 1) * rows)
        with open(folder / "band.keys", "wb") as file:
            for start in range(0, count, READ_AT_ONCE // 8):
                file.write(_band_keys(all_signatures[start : start + READ_AT_ONCE // 8, columns]))
        firsts = first_occurrences(folder / "band.keys", folder / "band.firsts")
        for start in range(0, count, READ_AT_ONCE // 64):
            block = slice(start, start + READ_AT_ONCE // 64)
            candidates = np.flatnonzero(firsts[block] < found[block]) + start
            same = all_signatures[candidates] == all_signatures[firsts[candidates]]
            similar = candidates[same.mean(axis=1) >= threshold]
            found[similar] = firsts[similar]
        del firsts  # the next band uses the same file; Windows cannot rewrite one that is mapped
    return found


def _band_keys(rows: np.ndarray) -> np.ndarray:
    """128 bits of each row of a band: uint32 [N, rows] -> uint64 [N, 2]."""
    keys = np.zeros((len(rows), 2), dtype=np.uint64)
    for column in range(rows.shape[1]):
        for half, factor in enumerate((0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)):
            keys[:, half] = (keys[:, half] ^ rows[:, column]) * np.uint64(factor)
            keys[:, half] ^= keys[:, half] >> np.uint64(31)
    return keys
