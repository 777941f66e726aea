"""Making one part: its lines become tokens (or cleaned JSONL), a table of documents, and a table of rejects.

Parts do not depend on each other: duplicates among them are found when they are merged (`model.corpus.merge`).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.corpus.bulk_encoder import BulkEncoder, EncoderChoice, with_bos_and_eos
from model.corpus.change_samples import ChangeSamples
from model.corpus.cleaning import Cleaner, CleaningOptions, count_han
from model.corpus.jsonl import holds_escapes, parse_line
from model.corpus.long_documents import cut_document, split_document
from model.corpus.lost_text import LossCounter
from model.corpus.near_duplicates import signatures
from model.corpus.part_file import DOCUMENT, PartColumns, write_part
from model.corpus.parts import Block, line_offsets, lines_of
from model.text.tokenization import Delimiters

CHUNK_BYTES = 1 << 20  # most bytes of lines that are processed together: a few dozen MB of memory
HEAD = 512  # characters of a document by which its share of Han characters is measured


@dataclass(frozen=True)
class PartOptions:
    """What a part depends on besides its lines; can be pickled.

    Args:
        encoder: what makes the ids; None: the payload is cleaned JSONL.
        delimiters: around the ids of each document.
        dtype: of the payload.
        keys: whether to hash the texts.
        near_duplicates: whether to make MinHash signatures.
    """

    text_field: str
    cleaning: CleaningOptions
    encoder: EncoderChoice | None
    delimiters: Delimiters | None = None
    dtype: str = "uint8"
    max_length: int = 512
    long_documents: str = "keep"
    chunk_size: int = 50_000
    keys: bool = True
    near_duplicates: bool = False


class PartMaker:
    """Makes parts; one in each worker process."""

    def __init__(self, options: PartOptions) -> None:
        self.options = options
        self.cleaner = Cleaner(options.cleaning)
        self.encoder = BulkEncoder(options.encoder) if options.encoder else None
        self.losses = LossCounter(options.encoder.tokenizer_json) if options.encoder else None

    def make(self, block: Block, path: Path) -> dict:
        """Write the part of these lines to `path`; returns its record, which the file holds too."""
        columns = PartColumns(ChangeSamples(self.options.cleaning))
        lines, escapes = lines_of(block), holds_escapes(block.raw)
        for first, last in _chunks(lines, self.options.chunk_size):
            oversized = block.oversized and last == len(lines)
            self._add_chunk(lines[first:last], first, oversized, escapes, columns)
        if columns.rejects:
            offsets = line_offsets(block)
            columns.rejects = [(offsets[line], line, reason, raw) for line, reason, raw in sorted(columns.rejects)]
        record = {
            "sha256": block.sha256,
            "lines": len(lines),
            "items": sum(len(array) for array in columns.payload),
            "dtype": self.options.dtype,
            "encoder": self.encoder.name if self.encoder and columns.documents else "",
            "lost_bytes": columns.lost_bytes,
        }
        write_part(path, record, columns)
        return record

    def _add_chunk(self, lines: list[bytes], first: int, oversized: bool, escapes: bool, columns: PartColumns) -> None:
        """Add the chunk that begins with the part's line `first`; `oversized`: its last line is too long."""
        texts, numbers, masks = [], [], None
        for number, raw in enumerate(lines):
            text, reason = parse_line(raw, self.options.text_field, escapes)
            if oversized and number == len(lines) - 1:
                text, reason = None, "oversized"
            if text is None:
                columns.rejects.append((first + number, reason, raw))
            else:
                texts.append(text)
                numbers.append(number)
        if self.options.cleaning.clean:
            texts, numbers, masks = self._clean(texts, numbers, lines, first, columns)
        if self.losses:
            columns.lost_bytes += self.losses.count(texts)
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
        if masks is not None:
            table["changes"] = masks
        kept = encoded.pieces > 0
        columns.documents.append(table[kept])
        if self.options.near_duplicates:
            columns.signatures.append(signatures([text for text, keep in zip(texts, kept, strict=True) if keep]))

    def _clean(self, texts: list[str], numbers: list[int], lines: list[bytes], first: int, columns: PartColumns):
        """Clean and filter texts, which are the chunk's lines `numbers`: (texts, numbers, masks) of the rest."""
        cleaned, masks = self.cleaner.clean_all(texts)
        kept = []
        for index, text in enumerate(cleaned):
            if masks[index]:
                columns.samples.add(masks[index], first + numbers[index], texts[index], text)
            reason = self.cleaner.reason_to_reject(text) if text else "empty"
            if reason is None:
                kept.append(index)
            else:
                columns.rejects.append((first + numbers[index], reason, lines[numbers[index]]))
        if len(kept) == len(cleaned):
            return cleaned, numbers, masks
        return [cleaned[index] for index in kept], [numbers[index] for index in kept], [masks[index] for index in kept]

    def _as_jsonl(self, texts: list[str]) -> tuple[list[str], "_Encoded"]:
        """`{"text": ...}` of each text, one a line."""
        lines = [
            (json.dumps({self.options.text_field: text}, ensure_ascii=False) + "\n").encode("utf-8") for text in texts
        ]
        sizes = np.array([len(line) for line in lines], dtype=np.int64)
        one, none = np.ones(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=bool)
        return texts, _Encoded(np.frombuffer(b"".join(lines), np.uint8), sizes, one, none)

    def _as_tokens(self, texts: list[str]) -> tuple[list[str], "_Encoded"]:
        """Each text's ids between its delimiters; the texts come back, cut off where long documents are truncated."""
        options, dtype, delimiters = self.options, np.dtype(self.options.dtype), self.options.delimiters
        ids, lengths = self.encoder.encode(texts)
        is_long = lengths + delimiters.count > options.max_length
        pieces = np.ones(len(texts), dtype=np.int64)
        if options.long_documents != "keep" and is_long.any():
            texts, ids, lengths, pieces = self._shorten(texts, ids, lengths, is_long)
        if len(ids) and int(ids.max()) > np.iinfo(dtype).max:  # a wrapped id would be silent damage
            raise RuntimeError(f"the tokenizer gave id {ids.max()}, which {dtype} cannot hold")
        tokens = with_bos_and_eos(ids, lengths, delimiters.bos_id, delimiters.eos_id, dtype)
        return texts, _Encoded(tokens, lengths + delimiters.count, pieces, is_long)

    def _shorten(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray, is_long: np.ndarray):
        """Replace each long document by its pieces: (texts, ids and lengths of all pieces, pieces of each document)."""
        limit = self.options.max_length - self.options.delimiters.count
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
    if with_keys:
        contents = [text.encode("utf-8") for text in texts]
        keys = b"".join([hashlib.sha256(content).digest()[:16] for content in contents])
        table["key"] = np.frombuffer(keys, "<u8").reshape(-1, 2)
        table["utf8_bytes"] = [len(content) for content in contents]
    else:
        table["utf8_bytes"] = [len(text.encode("utf-8")) for text in texts]
    table["characters"] = [len(text) for text in texts]
    heads = [text[:HEAD].encode("utf-8") for text in texts]
    table["han_share"] = count_han(heads) / np.clip(table["characters"], 1, HEAD)
    table["pieces"], table["is_long"] = encoded.pieces, encoded.is_long
    piece_ends = np.concatenate([[0], np.cumsum(encoded.piece_sizes)])
    table["size"] = np.diff(piece_ends[np.concatenate([[0], np.cumsum(encoded.pieces)])])
    return table
