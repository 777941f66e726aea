"""Samples that begin where documents do, made of stretches of a token file."""

import functools
from dataclasses import dataclass

import numpy as np

BLOCK_TOKENS = 16 << 20  # searched at a time


@dataclass
class Packing:
    """Runs of tokens, and the runs that each sample is made of. A run's first token is not predicted."""

    starts: np.ndarray  # int64 [runs], places in the token file
    lengths: np.ndarray  # int64 [runs], tokens
    first: np.ndarray  # int64 [samples + 1]: sample s is made of runs first[s] to first[s + 1] - 1
    targets: np.ndarray  # int64 [samples], tokens that each predicts

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Tokens that the model reads of each sample, predicted or not, without the padding: int64 [samples]."""
        return np.add.reduceat(self.lengths - 1, self.first[:-1]) if len(self.lengths) else np.zeros(0, dtype=np.int64)

    def followed_by(self, other: "Packing") -> "Packing":
        """The samples of both."""
        return Packing(
            np.concatenate((self.starts, other.starts)),
            np.concatenate((self.lengths, other.lengths)),
            np.concatenate((self.first, self.first[-1] + other.first[1:])),
            np.concatenate((self.targets, other.targets)),
        )


def find_documents(tokens: np.ndarray, bos_id: int | None, eos_id: int | None) -> np.ndarray:
    """Where documents begin: int64 [documents], ascending; none where no delimiter is found.

    At each bos; without a bos, at the file's start and after each eos. Where one token is both (GPT-2), the first of
    two in a row ends a document and the second begins one. Reads a memory map in blocks.
    """
    if bos_id is not None:
        begins = _places(tokens, bos_id)
        return begins[np.diff(begins, append=len(tokens)) > 1] if bos_id == eos_id else begins
    ends = _places(tokens, eos_id) + 1
    return np.append(0, ends[ends < len(tokens)]) if len(ends) else ends


def _places(tokens: np.ndarray, index: int) -> np.ndarray:
    """The positions of an id: int64 [places]."""
    blocks = range(0, len(tokens), BLOCK_TOKENS)
    found = [np.flatnonzero(tokens[begin : begin + BLOCK_TOKENS] == index) + begin for begin in blocks]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def pack_documents(begins: np.ndarray, tokens: int, seq_len: int) -> Packing:
    """Pack documents into samples of at most `seq_len + 1` tokens, so that each token but a document's first is
    predicted once.

    A document longer than a sample fills whole samples; each starts with the last token of the one before. Its
    tail is packed with the other documents, by best fit, the longest first (Ding et al., 2024, "Fewer truncations
    improve language modeling"). Space that no document fits stays empty. The samples are in the order of the file.

    Args:
        begins: int64 [documents], ascending: where they begin; tokens before the first are one more.
        tokens: of the file.
    """
    begins = np.union1d(begins, [0])
    ends = np.append(begins[1:], tokens)
    full = np.where(ends - begins > seq_len + 1, (ends - begins - 1) // seq_len, 0)  # whole samples of each, int64 [N]
    within = np.arange(full.sum()) - np.repeat(full.cumsum() - full, full)
    full_starts = np.repeat(begins, full) + within * seq_len

    starts = begins + full * seq_len
    has_target = ends - starts > 1
    starts, lengths = starts[has_target], (ends - starts)[has_target]
    sample = _best_fit(lengths, seq_len + 1) + len(full_starts)  # the full ones come first, for the moment

    starts = np.concatenate((full_starts, starts))
    lengths = np.concatenate((np.full(len(full_starts), seq_len + 1), lengths))
    return _in_file_order(starts, lengths, np.concatenate((np.arange(len(full_starts)), sample)))


def pack_whole(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> Packing:
    """Pack documents whole into samples of at most `seq_len + 1` tokens, by best fit as `pack_documents` does.

    Args:
        starts, lengths: int64 [documents], places ascending, lengths at most `seq_len + 1`.
    """
    return _in_file_order(starts, lengths, _best_fit(lengths, seq_len + 1))


def _in_file_order(starts: np.ndarray, lengths: np.ndarray, sample: np.ndarray) -> Packing:
    """The packing of these runs, with the samples numbered by where their first runs lie.

    Args:
        starts: ascending within each sample.
        sample: of each run, int64 [runs], numbered from 0 without gaps.
    """
    order = np.argsort(sample, kind="stable")
    first = np.flatnonzero(np.diff(sample[order], prepend=-1))  # of the sorted runs, each sample's first
    by_place = np.empty(len(first), dtype=np.int64)
    by_place[np.argsort(starts[order][first], kind="stable")] = np.arange(len(first))  # sample -> its final number
    sample = by_place[sample]
    order = np.argsort(sample, kind="stable")
    starts, lengths, sample = starts[order], lengths[order], sample[order]
    first = np.searchsorted(sample, np.arange(len(by_place) + 1))
    targets = np.add.reduceat(lengths - 1, first[:-1]) if len(starts) else np.zeros(0, dtype=np.int64)
    return Packing(starts, lengths, first, targets)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit-decreasing bin packing: the bin of each item, int64 [items], numbered from 0 without gaps.

    Items of one length are placed together, so that the work grows with the square of the number of lengths, not with
    the number of items.
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    bins = np.empty(len(lengths), dtype=np.int64)
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # bins by the space they have left
    roomy = np.zeros(capacity + 1, dtype=bool)
    opened = done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        items = order[done : done + counts[length]]
        done += len(items)
        for left in [*(np.flatnonzero(roomy[length:]) + length).tolist(), capacity]:
            if not len(items):
                break
            most = left // length  # items that a bin takes
            needed = -(-len(items) // most)
            if roomy[left]:
                open_bins = np.concatenate(room[left])
            else:
                open_bins = np.arange(opened, opened + needed)
                opened += needed
            used, unused = open_bins[:needed], open_bins[needed:]
            room[left], roomy[left] = [unused] if len(unused) else [], len(unused) > 0
            into = np.repeat(used, most)[: len(items)]
            bins[items[: len(into)]] = into
            items = items[len(into) :]
            taken = np.bincount(np.arange(len(into)) // most)  # per used bin: the last may take fewer
            for count in {most, int(taken[-1])}:
                rest, some = left - count * length, used[taken == count]
                if rest and len(some):
                    room[rest].append(some)
                    roomy[rest] = True
    return bins
