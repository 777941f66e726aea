"""Making one part: its lines become tokens (or cleaned JSONL), a table of documents, and a table of rejects.

Parts do not depend on each other: duplicates among them are found when they are merged (`model.corpus.merge`).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.corpus.bulk_encoder import BulkEncoder, EncoderChoice
from model.corpus.change_samples import ChangeSamples
from model.corpus.cleaning import Cleaner, CleaningOptions, count_han
from model.corpus.documents import LEARNED, ChatDocuments, Documents, Encoded, TextDocuments, chat_table
from model.corpus.jsonl import holds_escapes
from model.corpus.lost_text import LossCounter
from model.corpus.near_duplicates import signatures
from model.corpus.pair_documents import PairDocuments
from model.corpus.part_file import DOCUMENT, PartColumns, write_part
from model.corpus.parts import Block, line_offsets, lines_of
from model.text.chat_ids import ChatFormat
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
        chats: whether the lines are chats, in which `text_field` and `delimiters` play no role.
        pairs: whether they are pairs of chats that differ in their last answer.
        chat_format: how the tokenizer writes chats; None: the payload is cleaned JSONL.
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
    chats: bool = False
    pairs: bool = False
    chat_format: ChatFormat | None = None


class PartMaker:
    """Makes parts; one in each worker process."""

    def __init__(self, options: PartOptions) -> None:
        self.options = options
        self.cleaner = Cleaner(options.cleaning)
        self.encoder = BulkEncoder(options.encoder) if options.encoder else None
        self.losses = LossCounter(options.encoder.tokenizer_json) if options.encoder else None
        limits = options.max_length, options.long_documents
        self.documents: Documents
        if options.chats:
            kind = PairDocuments if options.pairs else ChatDocuments
            self.documents = kind(self.encoder, options.chat_format, *limits)
        else:
            about = options.text_field, self.encoder, options.delimiters, options.dtype
            self.documents = TextDocuments(*about, *limits)

    def make(self, block: Block, path: Path) -> dict:
        """Write the part of these lines to `path`; returns its record, which the file holds too."""
        columns = PartColumns(ChangeSamples(self.options.cleaning))
        if self.options.chats:
            self.documents.forms.clear()
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
        if self.options.chats:
            record["forms"] = dict(self.documents.forms)
        write_part(path, record, columns)
        return record

    def _add_chunk(self, lines: list[bytes], first: int, oversized: bool, escapes: bool, columns: PartColumns) -> None:
        """Add the chunk that begins with the part's line `first`; `oversized`: its last line is too long."""
        kind, numbers, masks, texts = self.documents, [*range(len(lines))], None, None
        documents, reasons = kind.parse(lines, escapes)
        if oversized:
            reasons[len(lines) - 1] = "oversized"
        if reasons:
            columns.rejects += [(first + number, reason, lines[number]) for number, reason in reasons.items()]
            numbers = [number for number in numbers if number not in reasons]
            documents = [documents[number] for number in numbers]
        if self.options.cleaning.clean:
            documents, numbers, masks, texts = self._clean(documents, numbers, lines, first, columns)
        if self.losses:
            columns.lost_bytes += self.losses.count(kind.contents(documents))
        given = documents
        documents, encoded = kind.encode(documents) if self.encoder else self._as_jsonl(documents)
        for index in np.flatnonzero(encoded.pieces == 0).tolist():
            number = numbers[index]
            columns.rejects.append((first + number, encoded.reasons[index], lines[number]))
        columns.payload.append(encoded.payload)
        if self.encoder:
            columns.count_ids(encoded.payload & (LEARNED - 1) if self.options.chats else encoded.payload)
        columns.piece_sizes.append(encoded.piece_sizes.astype("<u4"))
        texts = texts if texts is not None and documents is given else kind.texts(documents)
        contents = [text.encode("utf-8") for text in texts]
        table = _table(texts, contents, encoded, kind.keys(documents, contents) if self.options.keys else None)
        table["line"] = first + np.array(numbers, dtype=np.int64)
        if masks is not None:
            table["changes"] = masks
        kept = encoded.pieces > 0
        columns.documents.append(table[kept])
        if self.options.near_duplicates:
            columns.signatures.append(signatures([text for text, keep in zip(texts, kept, strict=True) if keep]))
        if self.options.chats:
            chats = [kind.turns(document) for document, keep in zip(documents, kept, strict=True) if keep]
            rows, characters = chat_table(chats, None if encoded.learned is None else encoded.learned[kept])
            columns.chats.append(rows)
            columns.turn_characters.append(characters)

    def _clean(self, documents: list, numbers: list[int], lines: list[bytes], first: int, columns: PartColumns):
        """Clean and filter the documents of the chunk's lines `numbers`: (documents, numbers, masks, texts) of the
        rest."""
        cleaned, masks, changed = self.documents.clean(documents, self.cleaner)
        for index, mask, before, after in changed:
            columns.samples.add(mask, first + numbers[index], before, after)
        texts = self.documents.texts(cleaned)
        reasons = {index: reason for index, text in enumerate(texts) if (reason := self.cleaner.reason_to_reject(text))}
        for index, *_ in changed:
            if emptied := self.documents.empty_reason(cleaned[index]):
                reasons[index] = emptied
        if not reasons:
            return cleaned, numbers, masks, texts
        columns.rejects += [(first + numbers[index], why, lines[numbers[index]]) for index, why in reasons.items()]
        kept = [index for index in range(len(cleaned)) if index not in reasons]
        return tuple([values[index] for index in kept] for values in (cleaned, numbers, masks, texts))

    def _as_jsonl(self, documents: list) -> tuple[list, Encoded]:
        """`{"text": ...}` or `{"messages": ...}` of each document, one a line."""
        values = map(self.documents.as_jsonl, documents)
        lines = [(json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8") for value in values]
        sizes = np.array([len(line) for line in lines], dtype=np.int64)
        one, none = np.ones(len(documents), dtype=np.int64), np.zeros(len(documents), dtype=bool)
        return documents, Encoded(np.frombuffer(b"".join(lines), np.uint8), sizes, one, none, [None] * len(documents))


def _chunks(lines: list[bytes], chunk_size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of chunks of at most `chunk_size` lines that end once they hold CHUNK_BYTES."""
    ends = np.cumsum(np.fromiter(map(len, lines), dtype=np.int64, count=len(lines)))
    first, before = 0, 0
    while first < len(lines):
        last = int(np.searchsorted(ends, before + CHUNK_BYTES)) + 1
        last = min(last, first + chunk_size, len(lines))
        yield first, last
        first, before = last, int(ends[last - 1])


def _table(
    texts: Sequence[str], contents: Sequence[bytes], encoded: Encoded, keyed: Sequence[bytes] | None
) -> np.ndarray:
    """The documents' rows, DOCUMENT [len(texts)]; their lines and changes are for the caller to fill in.

    Args:
        contents: the texts in UTF-8.
        keyed: what their keys are made of; None: they have none.
    """
    table = np.zeros(len(texts), dtype=DOCUMENT)
    if keyed is not None:
        keys = b"".join([hashlib.sha256(content).digest()[:16] for content in keyed])
        table["key"] = np.frombuffer(keys, "<u8").reshape(-1, 2)
    table["utf8_bytes"] = [*map(len, contents)]
    table["characters"] = [*map(len, texts)]
    heads = [
        content if len(content) <= HEAD else text[:HEAD].encode("utf-8")
        for text, content in zip(texts, contents, strict=True)
    ]
    table["han_share"] = count_han(heads) / np.clip(table["characters"], 1, HEAD)
    table["pieces"], table["is_long"] = encoded.pieces, encoded.is_long
    piece_ends = np.concatenate([[0], np.cumsum(encoded.piece_sizes)])
    table["size"] = np.diff(piece_ends[np.concatenate([[0], np.cumsum(encoded.pieces)])])
    return table
