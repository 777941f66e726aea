"""Merges the parts: drops duplicates and writes the documents in the input's order.

Memory does not grow with the input: it holds two parts, the keys that `model.corpus.duplicates` sorts, and pages of
mapped files.
"""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from model.corpus.change_samples import ChangeSamples
from model.corpus.documents import LEARNED
from model.corpus.duplicates import first_occurrences
from model.corpus.jsonl import reject_line
from model.corpus.near_duplicates import first_similar
from model.corpus.opening import Source
from model.corpus.options import ProcessingOptions
from model.corpus.part_file import Part
from model.corpus.parts import line_offsets, lines_of, read_part, stream_parts
from model.corpus.reasons import NAMES
from model.corpus.statistics import Statistics
from model.errors import InputError
from model.storage.files import flush_to_disk


@dataclass(frozen=True)
class _Fates:
    """The fate of each of a part's documents."""

    reason: np.ndarray  # int64: index into NAMES; -1: it is kept
    repeats: np.ndarray  # int64: the number of the earlier document
    copies: np.ndarray  # int64: how often it is written
    validation: np.ndarray  # bool

    @property
    def kept(self) -> np.ndarray:
        return self.reason < 0


class Merger:
    """Merges parts into one or two document files, the rejects and the samples of what cleaning changed.

    Args:
        paths: the parts by (source, index), in order.
        folder: where the files go.

    Raises (`merge`):
        Damaged: a part is damaged.
    """

    def __init__(
        self,
        paths: dict[tuple[int, int], Path],
        sources: Sequence[Source],
        raw_lines: "RawLines",
        options: ProcessingOptions,
        statistics: Statistics,
        folder: Path,
    ) -> None:
        self.paths, self.sources, self.raw_lines, self.options = paths, sources, raw_lines, options
        self.statistics, self.folder = statistics, folder
        self._lines_before: dict[tuple[int, int], int] = {}  # lines of the source before the part
        self._source_starts: list[int] = []  # documents before the source's first

    def merge(self, main: "DocumentFile", validation: "DocumentFile") -> None:
        """Write everything; the files are closed and complete afterwards."""
        self._index()
        first = similar = None
        if self.options.deduplicate:
            first = first_occurrences(self.folder / "keys", self.folder / "first")
        if self.options.near_duplicates:
            similar = first_similar(self.folder / "signatures", self.folder, self.options.near_duplicates)
        position = 0
        samples = ChangeSamples(self.options.cleaning)
        with main, validation, _text_file(self.folder / "rejects") as rejects:
            for key, part, payload in self._parts_read_ahead():
                with part:
                    table = part["documents"]
                    fates = self._fates(self.sources[key[0]], table, position, first, similar)
                    position += len(table)
                    self._write_documents(key[0], part, payload, table, fates, main, validation)
                    rejects.writelines(self._reject_lines(key, part, table, fates))
                    packed = part["samples"].tobytes().decode()
                    samples.add_all(packed, self._lines_before[key], self.sources[key[0]])
        with _text_file(self.folder / "changes") as changes:
            changes.writelines(samples.lines())
        self._line_numbers = None  # a mapped file could not be removed on Windows

    def _parts_read_ahead(self) -> Iterator[tuple[tuple[int, int], Part, np.ndarray]]:
        """Every part and its payload; the next payload is read while one is processed."""
        with ThreadPoolExecutor(1) as reader:
            waiting = deque()
            for key, path in self.paths.items():
                part = Part(path)
                waiting.append((key, part, reader.submit(part.payload)))
                if len(waiting) > 1:
                    ready, part, payload = waiting.popleft()
                    yield ready, part, payload.result()
            for ready, part, payload in waiting:
                yield ready, part, payload.result()

    def _index(self) -> None:
        """Read every part's record and table; write keys, signatures and line numbers into one file each."""
        lines = documents = 0
        source = -1
        with (
            open(self.folder / "keys", "wb") as keys,
            open(self.folder / "lines", "wb") as numbers,
            open(self.folder / "signatures", "wb") as signatures,
        ):
            for key, path in self.paths.items():
                if key[0] != source:
                    lines = 0
                while source < key[0]:
                    self._source_starts.append(documents)
                    source += 1
                with Part(path) as part:
                    table = part["documents"]
                    own_keys = np.ascontiguousarray(table["key"])
                    left_out = np.flatnonzero(_copies(self.sources[key[0]], table) == 0)
                    own_keys[left_out, 1] = documents + left_out  # unique: it is no one's duplicate
                    keys.write(own_keys)
                    numbers.write(table["line"].astype("<i8") + lines + 1)
                    if self.options.near_duplicates and len(table):
                        own_signatures = part["signatures"]
                        own_signatures[left_out] = (documents + left_out)[:, None]
                        signatures.write(own_signatures)
                    self._lines_before[key] = lines
                    lines += part.record["lines"]
                    documents += len(table)
        self._line_numbers = np.memmap(self.folder / "lines", "<i8", "r") if documents else np.zeros(0, "<i8")

    def _fates(self, source: Source, table: np.ndarray, position: int, first, similar) -> _Fates:
        own = np.arange(position, position + len(table))
        reason, repeats = np.full(len(table), -1), own.copy()
        for name, firsts in (("near_duplicate", similar), ("duplicate", first)):  # the latter wins
            if firsts is not None and len(table):
                found = np.array(firsts[position : position + len(table)])
                reason[found != own] = NAMES.index(name)
                repeats = np.where(found != own, found, repeats)
        copies = _copies(source, table)
        reason[(reason < 0) & (copies == 0)] = NAMES.index("not_sampled")
        copies = np.where(reason < 0, copies, 0)
        validation = (table["key"][:, 0] < self.options.val_share * 2.0**64) & (reason < 0)
        return _Fates(reason, repeats, np.where(validation, 1, copies), validation)

    def _write_documents(
        self,
        source: int,
        part: Part,
        payload: np.ndarray,
        table: np.ndarray,
        fates: _Fates,
        main: "DocumentFile",
        validation: "DocumentFile",
    ) -> None:
        if not len(table):
            return
        piece_sizes = part["piece_sizes"].astype(np.int64)
        kept_pieces = np.repeat(fates.kept, table["pieces"])
        self.statistics.add_documents(source, table[fates.kept], piece_sizes[kept_pieces])
        chats = part["chats"] if self.options.is_chat else None
        if chats is not None:
            kept_turns = np.repeat(fates.kept, chats["turns"])
            self.statistics.add_chats(chats[fates.kept], table["size"][fates.kept], part["turn_characters"][kept_turns])
        plain = fates.kept.all() and (fates.copies == 1).all() and not fates.validation.any()
        for file, chosen in ((main, fates.kept & ~fates.validation), (validation, fates.validation)):
            for copy in range(int(fates.copies[chosen].max(initial=0))):
                wanted = chosen & (fates.copies > copy)
                items = payload if plain else payload[np.repeat(wanted, table["size"])]
                sizes = piece_sizes[np.repeat(wanted, table["pieces"])]
                learned = 0
                if file.learn_path:
                    items, learned = file.write_learned(items, int(chats["turns"][wanted].sum()))
                file.write(items, sizes)
                tokens = len(items) if self.statistics.vocab_size else 0
                self.statistics.add_written(source, len(sizes), tokens, validation=file is validation, learned=learned)
                if tokens and file is main:
                    counts = part["id_counts"] if plain else np.bincount(items)
                    self.statistics.add_ids(part["ids"] if plain else np.arange(len(counts)), counts)

    def _reject_lines(self, key: tuple[int, int], part: Part, table: np.ndarray, fates: _Fates) -> list[str]:
        """The part's lines of the rejects file, in the order of its lines."""
        found: list[tuple[int, str]] = []  # (line in the part, text)
        before, source = self._lines_before[key], self.sources[key[0]]
        named = {"source": source.name} if len(self.sources) > 1 else {}
        rejects = part["rejects"]
        if len(rejects):
            raw, end = part["rejects_raw"].tobytes(), 0
            for offset, line, size, number in rejects.tolist():
                where = {**named, **source.place_of(before + line), "line": before + line + 1, "offset": offset}
                found.append((line, reject_line(where, NAMES[number], raw[end : end + size])))
                end += size
        dropped = np.flatnonzero(~fates.kept)
        raw_lines, offsets = [], []
        if any(NAMES[number] != "not_sampled" for number in fates.reason[dropped].tolist()):
            raw_lines, offsets = self.raw_lines.of_part(*key, part.record["sha256"])
        for index in dropped.tolist():
            line, reason = int(table["line"][index]), NAMES[fates.reason[index]]
            where = {**named, **source.place_of(before + line), "line": before + line + 1}
            if reason == "not_sampled":  # a good line, which the input still holds
                found.append((line, reject_line(where, reason, None)))
            else:
                where |= {"offset": offsets[line]} | self._where(int(fates.repeats[index]))
                found.append((line, reject_line(where, reason, raw_lines[line])))
        reasons = [NAMES[number] for number in [*rejects["reason"].tolist(), *fates.reason[dropped].tolist()]]
        self.statistics.add_rejected(key[0], reasons)
        return [text for _, text in sorted(found)]

    def _where(self, document: int) -> dict:
        """The line that a document came from, as `duplicate_of`."""
        number = int(self._line_numbers[document])
        source = self.sources[int(np.searchsorted(self._source_starts, document, side="right")) - 1]
        where = {"duplicate_of": number}
        if len(self.sources) > 1:
            where["duplicate_of_source"] = source.name
        return where | source.place_of(number - 1, "duplicate_of_")


def _copies(source: Source, table: np.ndarray) -> np.ndarray:
    """How many copies of each document are taken, by the source's weight and the text's hash: int64 [len(table)]."""
    whole, share = divmod(source.weight, 1)
    return int(whole) + (table["key"][:, 1] < share * 2.0**64).astype(np.int64)


@contextlib.contextmanager
def _text_file(path: Path) -> Iterator[TextIO]:
    """A new UTF-8 text file, flushed to the disk when the block ends."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        yield file
        flush_to_disk(file)


FLUSHED_AT_ONCE = 16 << 20  # items


class DocumentFile:
    """The tokens (or JSONL) of documents one after another, and in a second file where each ends, uint64.

    Args:
        path, ends_path: the two files; `ends_path` None: no ends.
        learn_path: of chats, a third file: which tokens are learned, one byte each; None: no chats.
        dtype: of the tokens; used for chats.
    """

    def __init__(
        self, path: Path, ends_path: Path | None, learn_path: Path | None = None, dtype: np.dtype | None = None
    ) -> None:
        self.path, self.ends_path, self.learn_path, self.dtype = path, ends_path, learn_path, dtype
        self.items = self.documents = self.learned = self.turns = 0
        self.sha256 = self.learn_sha256 = self.ends_sha256 = ""

    def __enter__(self) -> "DocumentFile":
        self._digest, self._flushed = hashlib.sha256(), 0  # items that are on their way to the disk
        self._learn_digest, self._ends_digest = hashlib.sha256(), hashlib.sha256()
        # A thread each: a slow hash or disk delays the writing only when the next call is due.
        self._hasher, self._flusher = _Background(), _Background()
        self._file = open(self.path, "wb")
        self._ends = open(self.ends_path, "wb") if self.ends_path else None
        self._learn = open(self.learn_path, "wb") if self.learn_path else None
        return self

    def write_learned(self, payload: np.ndarray, turns: int) -> tuple[np.ndarray, int]:
        """Append which tokens of chats are learned; returns the tokens, for `write`, and how many are learned.

        Args:
            payload: uint32, with LEARNED in those that are.
            turns: answers in it.
        """
        learned = (payload >> 31).astype(np.uint8)
        self._learn_digest.update(learned)
        self._learn.write(memoryview(learned))
        count = int(learned.sum())
        self.learned += count
        self.turns += turns
        return (payload & (LEARNED - 1)).astype(self.dtype), count

    def write(self, payload: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents of these sizes (items of the payload).

        Raises:
            OSError: this write failed, or flushing an earlier one did.
        """
        content = memoryview(payload).cast("B")
        self._hasher.submit(self._digest.update, content)
        self._file.write(content)
        if self.items - self._flushed > FLUSHED_AT_ONCE:  # early, so that the end waits for little
            self._flusher.submit(os.fsync, self._file.fileno())
            self._flushed = self.items
        if self._ends:
            ends = (np.cumsum(sizes) + self.items).astype("<u8")
            self._ends_digest.update(ends)
            self._ends.write(ends)
        self.items += len(payload)
        self.documents += len(sizes)

    def __exit__(self, kind=None, *error) -> None:
        with contextlib.ExitStack() as closing:  # closes everything, whatever fails, and raises what failed
            for file in filter(None, (self._file, self._ends, self._learn)):
                closing.callback(file.close)
            closing.callback(self._hasher.close)
            closing.callback(self._flusher.close)
            if kind is None:
                for file in filter(None, (self._file, self._ends, self._learn)):
                    flush_to_disk(file)
        digests = self._digest, self._learn_digest, self._ends_digest
        self.sha256, self.learn_sha256, self.ends_sha256 = (digest.hexdigest() for digest in digests)


class _Background:
    """A thread that runs one call at a time. The next `submit`, or `close`, raises what the call raised: the system
    reports a failed fsync only once."""

    def __init__(self) -> None:
        self._thread, self._last = ThreadPoolExecutor(1), None

    def submit(self, function: Callable, *arguments) -> None:
        """Call a function in the thread, once the call before has ended."""
        self._wait()
        self._last = self._thread.submit(function, *arguments)

    def close(self) -> None:
        """Wait for the last call and end the thread."""
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()


class RawLines:
    """Rereads the input's lines for the rejects file: any part of a plain file; of others, in order."""

    def __init__(self, sources: Sequence[Source], part_bytes: int, text_field: str) -> None:
        self._sources, self._part_bytes, self._text_field = sources, part_bytes, text_field
        self._source, self._stream = -1, iter(())

    def of_part(self, source: int, index: int, sha256: str) -> tuple[list[bytes], list[int]]:
        """The part's lines without their ends, and their offsets.

        Raises:
            InputError: the input changed.
        """
        if self._sources[source].is_plain:
            block = read_part(self._sources[source], index, self._part_bytes)
        else:
            if source != self._source:
                self._source = source
                self._stream = stream_parts(self._sources[source], self._part_bytes, self._text_field)
            block = next((block for number, block, _ in self._stream if number == index), None)
        if block is None or block.sha256 != sha256:
            raise InputError(
                f"{self._sources[source].location} changed while it was processed; change it back, or start over with "
                "--resume false"
            )
        lines = lines_of(block)
        return lines, line_offsets(block)
