"""Chats in a token file: where each lies (`X.ends`), and which of its tokens are learned (`X.learn`).

Learned are the answers with the token that ends each. Whole chats are packed into samples; one that is longer than a
sample, or in which nothing is learned, is left out.

Of pairs (`chat.pairs` in the manifest), every two chats are the chosen and the rejected answer to one question. They
stay together: both are in one sample, or both are left out.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import InputError
from model.token_file.manifest import Manifest, ends_path, file_sha256, learn_path
from model.token_file.packing import Packing, pack_whole

BLOCK_TOKENS = 16 << 20  # read at a time
AGAIN = "make the file again with optimized_data_processing.py"


@dataclass
class Chats:
    """The chats of a token file that training can use. Its unit is a chat, or a pair of two.

    Attributes:
        learned: uint8 [tokens of the file], 1 where a token is learned; a memory map.
        begins, lengths: int64 [chats], in tokens, ascending.
        targets: int64 [chats], learned tokens.
        answers: int64 [chats], learned tokens that end an answer.
        too_long, unlearned: units that are left out: longer than a sample, or without a learned token.
        numbers: int64 [chats], their places among the documents of the file.
        are_pairs: whether chats 2k and 2k + 1 are a pair, the chosen answer and then the rejected one.
    """

    learned: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    too_long: int
    unlearned: int
    numbers: np.ndarray
    are_pairs: bool = False

    def __len__(self) -> int:
        """The units: chats, or pairs of them."""
        return len(self.begins) // self._chats_of_a_unit

    @property
    def _chats_of_a_unit(self) -> int:
        return 2 if self.are_pairs else 1

    def pack(self, seq_len: int, units: np.ndarray | None = None) -> Packing:
        """Pack units into samples of at most `seq_len + 1` tokens, in the order of the file; each chat is a run.

        Args:
            units: which of them, int64, ascending; None: all.
        """
        units, count = np.arange(len(self)) if units is None else units, self._chats_of_a_unit
        lengths = self.lengths.reshape(-1, count)[units]
        packing = pack_whole(self.begins[::count][units], lengths.sum(axis=1), seq_len)
        chats = self.find(packing.starts)[:, None] + np.arange(count)  # [units, count], in the order of the samples
        chats = chats.reshape(-1)
        packing = Packing(self.begins[chats], self.lengths[chats], count * packing.first, packing.targets)
        if len(units):
            packing.targets = np.add.reduceat(self.targets[chats], packing.first[:-1])
        return packing

    def find(self, begins: np.ndarray) -> np.ndarray:
        """The chats that begin at these tokens, int64."""
        return np.searchsorted(self.begins, begins)

    def chosen(self, units: np.ndarray) -> np.ndarray:
        """The chats of these units, int64; of pairs those with the chosen answer."""
        return units * self._chats_of_a_unit

    def turns(self, tokens: np.ndarray, chats: np.ndarray) -> list[tuple[list[int], list[int]]]:
        """Of each answer in some chats: the ids up to where it begins, and its own, the end included.

        Args:
            tokens: of the file, [N].
        """
        found = []
        for chat in chats:
            begin, length = int(self.begins[chat]), int(self.lengths[chat])
            ids, learned = tokens[begin : begin + length], self.learned[begin : begin + length] != 0
            changes = np.flatnonzero(np.diff(learned, prepend=False, append=False))
            found += [(ids[:start].tolist(), ids[start:end].tolist()) for start, end in changes.reshape(-1, 2)]
        return found


def read_chats(path: Path, manifest: Manifest, tokens: np.ndarray, seq_len: int) -> Chats:
    """The chats of a token file.

    Args:
        manifest: of the file, with `chat`.
        tokens: of the file, [N].
        seq_len: tokens that the model reads of a sample; a chat of up to one token more fits.

    Raises:
        InputError: `.ends` or `.learn` is missing or does not fit the token file; no chat fits a sample; or none has a
            learned token that ends an answer, so that the model would never learn to stop.
    """
    ends = _read_beside(ends_path(path), "<u8", manifest.documents, "documents").astype(np.int64)
    if not len(ends) or ends[-1] != len(tokens) or (np.diff(ends, prepend=0) <= 0).any():
        raise InputError(f"{ends_path(path)}: not where the chats of {path} end; {AGAIN}")
    learned = _read_beside(learn_path(path), "u1", len(tokens), "tokens")
    begins = np.append(0, ends[:-1])
    targets, answers = _count_learned(learned, tokens, begins, ends, manifest.chat["end_ids"])
    lengths, are_pairs = ends - begins, bool(manifest.chat.get("pairs"))
    together = lengths.reshape(-1, 2).sum(axis=1) if are_pairs else lengths  # of a unit
    fits, learns = together <= seq_len + 1, (targets.reshape(len(together), -1) > 0).all(axis=1)
    if not fits.any():
        raise InputError(
            f"{path}: none of its {len(fits):,} {'pairs' if are_pairs else 'chats'} fits a sample of max_seq_len + 1 ="
            f" {seq_len + 1} tokens (the shortest has {together.min():,}); raise max_seq_len, which the"
            " weights of init_from limit"
        )
    kept = np.repeat(fits & learns, len(lengths) // len(fits))
    if not answers[kept].any():
        names = ", ".join(map(str, manifest.chat["end_ids"]))
        raise InputError(
            f"{path}: no chat has a learned token that ends an answer (ids {names}), so that the model would never"
            f" learn to stop; {AGAIN}"
        )
    parts = (begins[kept], lengths[kept], targets[kept], answers[kept])
    too_long, unlearned = int((~fits).sum()), int((fits & ~learns).sum())
    return Chats(learned, *parts, too_long, unlearned, np.flatnonzero(kept), are_pairs)


def _read_beside(path: Path, dtype: str, count: int, what: str) -> np.ndarray:
    """A headerless file beside a token file, as a memory map."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, which a token file of chats needs beside it; {AGAIN}")
    size, expected = os.path.getsize(path), count * np.dtype(dtype).itemsize
    if size != expected or not count:
        raise InputError(f"{path}: {size:,} bytes, {expected:,} expected for {count:,} {what}; {AGAIN}")
    return np.memmap(path, dtype=dtype, mode="r")


def _count_learned(
    learned: np.ndarray, tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, end_ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Learned tokens of each chat, and how many of them end an answer: int64 [chats] each.

    A chat's first token counts in neither: nothing precedes it, so that it cannot be predicted.
    """
    targets, answers = np.zeros((2, len(begins)), dtype=np.int64)
    chat = 0
    while chat < len(begins):
        after = max(chat + 1, int(np.searchsorted(ends, begins[chat] + BLOCK_TOKENS, "right")))
        place = slice(begins[chat], ends[after - 1])
        first = begins[chat:after] - begins[chat]
        counts = learned[place] != 0
        counts[first] = False
        targets[chat:after] = np.add.reduceat(counts, first, dtype=np.int64)
        answers[chat:after] = np.add.reduceat(counts & np.isin(tokens[place], end_ids), first, dtype=np.int64)
        chat = after
    return targets, answers


def verify_companions(path: Path, manifest: Manifest) -> None:
    """Read `X.learn` and `X.ends` whole, before hours are spent on them.

    Raises:
        InputError: they are not the files that the manifest describes, `X.learn` holds other bytes than 0 and 1, or one
            cannot be read to its end.
    """
    _compare_hash(learn_path(path), _hash_learned(learn_path(path)), manifest.chat["learn_sha256"])
    if "ends_sha256" in manifest.chat:
        _compare_hash(ends_path(path), file_sha256(ends_path(path)), manifest.chat["ends_sha256"])


def _hash_learned(file_path: Path) -> str:
    """SHA-256 (hex) of a file of the bytes 0 and 1."""
    digest, read = hashlib.sha256(), 0
    try:
        with open(file_path, "rb") as file:
            while block := file.read(BLOCK_TOKENS):
                digest.update(block)
                flags = np.frombuffer(block, np.uint8)
                if flags.max() > 1:
                    place = int(np.argmax(flags > 1))
                    raise InputError(f"{file_path}: {flags[place]} at token {read + place:,}, 0 or 1 expected; {AGAIN}")
                read += len(block)
    except OSError as error:
        raise InputError(f"{file_path}: cannot be read past byte {read:,} ({error.strerror})") from error
    return digest.hexdigest()


def _compare_hash(file_path: Path, found: str, recorded: str) -> None:
    if recorded != found:
        raise InputError(
            f"{file_path}: changed since its manifest was made (sha256 {recorded[:12]}… then, {found[:12]}… now);"
            f" {AGAIN}"
        )
