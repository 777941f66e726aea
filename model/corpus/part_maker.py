"""Making one part: its lines become tokens (or cleaned JSONL), a table of documents, and a table of rejects.

A part is one .npz file, written under a temporary name and renamed, so that it is there whole or not at all; the zip
format's checksums tell later whether it still is what was written. Parts do not depend on each other: duplicates among
them are found when they are merged (`model.corpus.merge`).
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model.corpus.bulk_encoder import BulkEncoder, EncoderChoice, with_bos_and_eos
from model.corpus.cleaning import CHANGES, FILTER_REASONS, Cleaner, CleaningOptions, count_han
from model.corpus.jsonl import REASONS as LINE_REASONS
from model.corpus.jsonl import parse_line
from model.corpus.long_documents import cut_document, split_document
from model.corpus.sources import Block, line_offsets, lines_of

REASONS = {  # every reason there is, in the order in which the checks are made
    **LINE_REASONS,
    **FILTER_REASONS,
    "over_max_length": "more than max_length tokens, and long_documents is drop",
    "duplicate": "exactly the text of an earlier line, after cleaning",
    "near_duplicate": "nearly the text of an earlier line (near_duplicates)",
    "not_sampled": "a source of a weight below 1: the line was not among those taken",
}
REASON_NUMBER = {reason: number for number, reason in enumerate(REASONS)}
CHUNK_BYTES = 4 << 20  # lines are handled in chunks of so many bytes at most: a few dozen MB of memory
SAMPLES_OF_A_CHANGE = 20
EXCERPT = 60  # characters shown on either side of the first difference

DOCUMENT = np.dtype(
    [
        ("key", "<u8", 2),  # of its text: the first 128 bits of SHA-256
        ("line", "<u4"),  # in the part, from 0
        ("characters", "<u4"),
        ("utf8_bytes", "<u4"),
        ("han", "<u4"),  # characters
        ("size", "<u4"),  # items of the payload: tokens, or bytes of JSONL
        ("pieces", "<u4"),  # documents of the token file that it became: 1, or more where it was split
        ("changes", "u1"),  # bit k: CHANGES[k]
        ("is_long", "u1"),  # whether it had more than max_length tokens, with bos and eos
    ]
)
REJECT = np.dtype([("offset", "<u8"), ("line", "<u4"), ("size", "<u4"), ("reason", "u1")])


@dataclass(frozen=True)
class PartOptions:
    """What a part depends on besides its lines. Can be sent to another process.

    Args:
        encoder: what makes the ids; None: the payload is cleaned JSONL.
        dtype: of the payload.
        keys: whether the texts' hashes are wanted.
        near_duplicates: whether MinHash signatures are.
    """

    text_field: str
    cleaning: CleaningOptions
    encoder: EncoderChoice | None
    bos: int = 0
    eos: int = 0
    dtype: str = "uint8"
    max_length: int = 512
    long_documents: str = "keep"
    chunk_size: int = 50_000
    keys: bool = True
    near_duplicates: bool = False


@dataclass
class _Columns:
    """What grows while a part is made; lists of arrays are joined at its end."""

    payload: list[np.ndarray] = field(default_factory=list)
    piece_sizes: list[np.ndarray] = field(default_factory=list)
    documents: list[np.ndarray] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    rejects: list[tuple] = field(default_factory=list)  # line, reason, raw line
    samples: dict[str, list] = field(default_factory=lambda: {name: [] for name in CHANGES})
    id_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # how often each id stands there

    def count_ids(self, tokens: np.ndarray) -> None:
        """Add up `id_counts`, which grows to the largest id."""
        counts = np.bincount(tokens, minlength=len(self.id_counts))
        counts[: len(self.id_counts)] += self.id_counts
        self.id_counts = counts


class PartMaker:
    """Makes parts; one in each worker process."""

    def __init__(self, options: PartOptions) -> None:
        self.options = options
        self.cleaner = Cleaner(options.cleaning)
        self.encoder = BulkEncoder(options.encoder) if options.encoder else None

    def make(self, block: Block, path: Path) -> dict:
        """Write the part of these lines to `path`; returns its record, which the file holds too."""
        columns = _Columns()
        lines = lines_of(block)
        for first, last in _chunks(lines, self.options.chunk_size):
            oversized = block.oversized and last == len(lines)
            self._add_chunk(lines[first:last], first, oversized, columns)
        if columns.rejects:
            offsets = line_offsets(block, lines)
            columns.rejects = [(offsets[line], line, reason, raw) for line, reason, raw in sorted(columns.rejects)]
        record = {
            "sha256": block.sha256,
            "size": block.size,
            "lines": len(lines),
            "items": sum(len(array) for array in columns.payload),
            "encoder": self.encoder.name if self.encoder and columns.documents else "",
        }
        _write_part(path, record, columns, np.dtype(self.options.dtype))
        return record

    def _add_chunk(
        self, lines: list[bytes], first: int, oversized: bool, columns: _Columns
    ) -> None:
        """Add the chunk that begins with the part's line `first`; `oversized`: its last line is too long to be read."""
        texts, numbers, masks = [], [], []
        cleaner, cleans, text_field = self.cleaner, self.options.cleaning.clean, self.options.text_field
        for number, raw in enumerate(lines):
            text, reason = parse_line(raw, text_field)
            mask = 0
            if cleans and text is not None:
                before = text
                text, mask = cleaner.clean(before)
                reason = cleaner.reason_to_reject(text) if text else "empty"
                if mask:
                    _sample_change(columns.samples, mask, first + number, before, text)
            if oversized and number == len(lines) - 1:
                reason = "oversized"
            if reason is not None:
                columns.rejects.append((first + number, reason, raw))
                continue
            texts.append(text)
            numbers.append(number)
            masks.append(mask)
        texts, encoded = self._as_tokens(texts) if self.encoder else self._as_jsonl(texts)
        for index in np.flatnonzero(encoded.pieces == 0).tolist():
            number = numbers[index]
            columns.rejects.append((first + number, "over_max_length", lines[number]))
        columns.payload.append(encoded.payload)
        if self.encoder:
            columns.count_ids(encoded.payload)
        columns.piece_sizes.append(encoded.piece_sizes.astype("<u4"))
        table = _table(texts, encoded, self.options.keys)
        table["line"] = first + np.array(numbers, dtype=np.int64)
        table["changes"] = masks
        kept = encoded.pieces > 0
        columns.documents.append(table[kept])
        if self.options.near_duplicates:
            from model.corpus.near_duplicates import signatures

            columns.signatures.append(signatures([text for text, keep in zip(texts, kept, strict=True) if keep]))

    def _as_jsonl(self, texts: list[str]) -> tuple[list[str], "_Encoded"]:
        """`{"text": ...}` of each text, one a line."""
        lines = [
            (json.dumps({self.options.text_field: text}, ensure_ascii=False) + "\n").encode("utf-8") for text in texts
        ]
        sizes = np.array([len(line) for line in lines], dtype=np.int64)
        one, none = np.ones(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=bool)
        return texts, _Encoded(np.frombuffer(b"".join(lines), np.uint8), sizes, one, none)

    def _as_tokens(self, texts: list[str]) -> tuple[list[str], "_Encoded"]:
        """`<bos> ids <eos>` of each text; the texts come back, cut off where long documents are truncated."""
        options, dtype = self.options, np.dtype(self.options.dtype)
        ids, lengths = self.encoder.encode(texts)
        is_long = lengths + 2 > options.max_length
        pieces = np.ones(len(texts), dtype=np.int64)
        if options.long_documents != "keep" and is_long.any():
            texts, ids, lengths, pieces = self._shorten(texts, ids, lengths, is_long)
        if len(ids) and int(ids.max()) > np.iinfo(dtype).max:  # a wrapped id would be silent damage
            raise RuntimeError(f"the tokenizer gave id {ids.max()}, which {dtype} cannot hold")
        tokens = with_bos_and_eos(ids, lengths, options.bos, options.eos, dtype)
        return texts, _Encoded(tokens, lengths + 2, pieces, is_long)

    def _shorten(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray, is_long: np.ndarray):
        """Replace each long document by its pieces: (texts, ids and lengths of all pieces, pieces of each document)."""
        limit = self.options.max_length - 2  # bos and eos
        texts = list(texts)
        starts = np.cumsum(lengths) - lengths
        all_ids, all_lengths, pieces = [], [], np.ones(len(texts), dtype=np.int64)
        for index, text in enumerate(texts):
            own_ids, own_lengths = ids[starts[index] : starts[index] + lengths[index]], lengths[index : index + 1]
            if is_long[index]:
                parts = []
                if self.options.long_documents == "split":
                    parts = split_document(text, limit, self._count_tokens)
                elif self.options.long_documents == "truncate":
                    texts[index] = cut_document(text, limit, self._count_tokens).rstrip()
                    parts = [texts[index]]
                own_ids, own_lengths = self.encoder.encode(parts)
                pieces[index] = len(parts)
            all_ids.append(own_ids)
            all_lengths.append(own_lengths)
        return texts, np.concatenate(all_ids), np.concatenate(all_lengths), pieces

    def _count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        return self.encoder.encode(texts)[1]


@dataclass(frozen=True)
class _Encoded:
    payload: np.ndarray  # tokens or bytes of all pieces
    piece_sizes: np.ndarray  # int64 [pieces]
    pieces: np.ndarray  # int64 [documents]; 0: dropped
    is_long: np.ndarray  # bool [documents]


def _chunks(lines: list[bytes], chunk_size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of chunks of at most `chunk_size` lines that end once they hold CHUNK_BYTES."""
    ends = np.cumsum(np.fromiter(map(len, lines), dtype=np.int64, count=len(lines)))
    first, before = 0, 0
    while first < len(lines):
        last = int(np.searchsorted(ends, before + CHUNK_BYTES)) + 1
        last = min(last, first + chunk_size, len(lines))
        yield first, last
        first, before = last, int(ends[last - 1])


def _table(texts: list[str], encoded: _Encoded, with_keys: bool) -> np.ndarray:
    """The documents' rows, DOCUMENT [len(texts)]; their lines and changes are for the caller to fill in."""
    table = np.zeros(len(texts), dtype=DOCUMENT)
    contents = [text.encode("utf-8") for text in texts]
    if with_keys:
        keys = b"".join([hashlib.sha256(content).digest()[:16] for content in contents])
        table["key"] = np.frombuffer(keys, "<u8").reshape(-1, 2)
    table["characters"] = [len(text) for text in texts]
    table["utf8_bytes"] = [len(content) for content in contents]
    table["han"] = count_han(contents)
    table["pieces"], table["is_long"] = encoded.pieces, encoded.is_long
    piece_ends = np.concatenate([[0], np.cumsum(encoded.piece_sizes)])
    table["size"] = np.diff(piece_ends[np.concatenate([[0], np.cumsum(encoded.pieces)])])
    return table


def _sample_change(samples: dict[str, list], mask: int, line: int, before: str, after: str) -> None:
    """Keep, for each kind of change, those of the smallest hashes: a sample spread over the whole input, always the
    same however the work is divided."""
    key = hashlib.sha256(before.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    for number, name in enumerate(CHANGES):
        if mask >> number & 1:
            found = samples[name]
            if len(found) < SAMPLES_OF_A_CHANGE or key < found[-1]["key"]:
                found.append({"key": key, "line": line, **_excerpts(before, after)})
                found.sort(key=lambda sample: (sample["key"], sample["line"]))
                del found[SAMPLES_OF_A_CHANGE:]


def _excerpts(before: str, after: str) -> dict[str, str]:
    """The two texts around their first difference."""
    first = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    around = slice(max(0, first - EXCERPT), first + EXCERPT)
    return {"before": before[around], "after": after[around]}


# ----------------------------------------------------------------------------------------------------- the part's file


def _write_part(path: Path, record: dict, columns: _Columns, dtype: np.dtype) -> None:
    rejects = columns.rejects
    table = np.zeros(len(rejects), dtype=REJECT)
    if rejects:
        table["offset"], table["line"] = [row[0] for row in rejects], [row[1] for row in rejects]
        table["reason"], table["size"] = [REASON_NUMBER[row[2]] for row in rejects], [len(row[3]) for row in rejects]
    arrays = {
        "record": np.frombuffer(json.dumps(record).encode(), np.uint8),
        "samples": np.frombuffer(json.dumps(columns.samples).encode(), np.uint8),
        "rejects": table,
        "rejects_raw": np.frombuffer(b"".join([row[3] for row in rejects]), np.uint8),
        "documents": _join(columns.documents, DOCUMENT),
        "piece_sizes": _join(columns.piece_sizes, np.dtype("<u4")),
        "payload": _join(columns.payload, dtype),
    }
    arrays["ids"] = np.flatnonzero(columns.id_counts).astype("<u4")
    arrays["id_counts"] = columns.id_counts[arrays["ids"]].astype("<u4")
    if columns.signatures:
        arrays["signatures"] = np.concatenate(columns.signatures)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def _join(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    if not arrays:
        return np.zeros(0, dtype=dtype)
    return arrays[0].astype(dtype, copy=False) if len(arrays) == 1 else np.concatenate(arrays, dtype=dtype)


class Damaged(Exception):
    """A part is not what was written: the machine lost power, or the disk failed."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"{path}: {error}")
        self.path = path


class Part:
    """A part's file, of which only what is asked for is read.

    Raises:
        Damaged: it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = np.load(path, allow_pickle=False)
        except DAMAGE as error:
            raise Damaged(path, error) from error
        self.record: dict = json.loads(self["record"].tobytes())

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._file[name]
        except DAMAGE as error:
            raise Damaged(self.path, error) from error

    def check(self) -> None:
        """Compare all checksums."""
        if (name := self._file.zip.testzip()) is not None:
            raise Damaged(self.path, ValueError(f"{name} is damaged"))

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


DAMAGE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)  # what np.load raises for it
