"""Finds documents that repeat an earlier one, by sorting, with bounded memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SORTED_AT_ONCE = 4_000_000  # keys: some 200 MB while they are sorted
READ_AT_ONCE = 1 << 20  # keys


def first_occurrences(keys_path: Path, first_path: Path) -> np.ndarray:
    """For each document, the number of the first with the same key: its own or an earlier one's.

    Keys are sorted SORTED_AT_ONCE at a time: the range of their first halves is cut into slices, and the file is read
    once for each slice. Two different texts collide with a probability below n^2 / 2^129: 10^-21 for a billion.

    Args:
        keys_path: little-endian uint64 [N, 2].
        first_path: a new file for the result.

    Returns:
        int64 [N], mapped from the file.
    """
    count = keys_path.stat().st_size // 16
    if not count:
        return np.zeros(0, dtype=np.int64)
    firsts = new_mapped(first_path, count)
    slices = -(-count // SORTED_AT_ONCE)
    for number in range(slices):
        known_keys, known = np.zeros((0, 2), dtype="<u8"), np.zeros(0, dtype=np.int64)  # of this slice, without repeats
        for keys, indexes in _slice_of_keys(keys_path, number, slices):
            keys, indexes = np.concatenate([known_keys, keys]), np.concatenate([known, indexes])
            order = np.argsort(keys[:, 0])  # ten times as fast as by both halves, and nearly always enough
            ordered = keys.take(order, axis=0)
            starts = _starts(ordered)
            if not np.array_equal(starts, _starts(ordered[:, :1])):  # equal first halves, different second ones
                order = np.lexsort((keys[:, 1], keys[:, 0]))
                ordered = keys.take(order, axis=0)
                starts = _starts(ordered)
            indexes, places = indexes[order], np.flatnonzero(starts)
            known_keys, known = ordered[places], np.minimum.reduceat(indexes, places)
            firsts[indexes] = known[np.cumsum(starts) - 1]
    return firsts


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Which rows differ from the row before: [N, columns] -> bool [N]."""
    starts = np.ones(len(ordered), dtype=bool)
    starts[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in ordered.T])
    return starts


def new_mapped(path: Path, count: int) -> np.ndarray:
    """A new file of int64 [count], mapped.

    Its space is allocated first if the system can: on a full disk, writing to a mapped file would kill the process.

    Raises:
        OSError: the disk is full.
    """
    with open(path, "wb") as file:
        file.truncate(8 * count)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 8 * count)
    return np.memmap(path, dtype="<i8", mode="r+", shape=(count,))


def _slice_of_keys(path: Path, number: int, slices: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The keys whose first half lies in the number-th of `slices` equal ranges, with the documents' numbers, in order.

    Yields SORTED_AT_ONCE keys or a few more at a time; a slice holds more only if very many texts are equal.
    """
    keys, indexes, position, held = [], [], 0, 0
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, dtype="<u8", count=2 * READ_AT_ONCE)):
            block = block.reshape(-1, 2)
            chosen = np.flatnonzero((block[:, 0] >> np.uint64(32)) * np.uint64(slices) >> np.uint64(32) == number)
            keys.append(block[chosen])
            indexes.append(chosen + position)
            position += len(block)
            held += len(chosen)
            if held >= SORTED_AT_ONCE:
                yield np.concatenate(keys), np.concatenate(indexes)
                keys, indexes, held = [], [], 0
    if held:
        yield np.concatenate(keys), np.concatenate(indexes)
