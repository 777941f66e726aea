"""What a part is on the disk: its payload and, in an .npz file, its tables.

Both are written under a temporary name and renamed, the tables last, so that a part exists whole or not at all.
Checksums reveal later damage.
"""

import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model.corpus.change_samples import ChangeSamples
from model.corpus.reasons import NUMBERS

DOCUMENT = np.dtype(
    [
        ("key", "<u8", 2),  # of its text: the first 128 bits of SHA-256
        ("line", "<u4"),  # in the part, from 0
        ("characters", "<u4"),
        ("utf8_bytes", "<u4"),
        ("han_share", "<f4"),  # of Han characters among the first HEAD ones
        ("size", "<u4"),  # items of the payload: tokens, or bytes of JSONL
        ("pieces", "<u4"),  # documents of the token file that it became: 1, or more where it was split
        ("changes", "u1"),  # bit k: CHANGES[k]
        ("is_long", "u1"),  # whether it had more than max_length tokens, with bos and eos
    ]
)
CHAT = np.dtype([("turns", "<u4"), ("learned", "<u4")])  # answers, and tokens of them and their ends
REJECT = np.dtype([("offset", "<u8"), ("line", "<u4"), ("size", "<u4"), ("reason", "u1")])


@dataclass
class PartColumns:
    """What grows while a part is made; lists of arrays are joined when it is written."""

    samples: ChangeSamples
    payload: list[np.ndarray] = field(default_factory=list)
    piece_sizes: list[np.ndarray] = field(default_factory=list)
    documents: list[np.ndarray] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    chats: list[np.ndarray] = field(default_factory=list)  # CHAT, where documents are chats
    turn_characters: list[np.ndarray] = field(default_factory=list)  # uint32 [turns, 2]: of a question, of its answer
    rejects: list[tuple] = field(default_factory=list)  # line, reason, raw line
    lost_bytes: int = 0  # of the texts, for which the tokenizer has no token
    id_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # how often each id stands there

    def count_ids(self, tokens: np.ndarray) -> None:
        """Add up `id_counts`, which grows to the largest id."""
        counts = np.bincount(tokens, minlength=len(self.id_counts))
        counts[: len(self.id_counts)] += self.id_counts
        self.id_counts = counts


def payload_path(part: Path) -> Path:
    """Beside the part's tables: its tokens (or JSONL), as they will stand in the output."""
    return part.with_suffix(".payload")


def write_part(path: Path, record: dict, columns: PartColumns) -> None:
    """Write the payload and then the tables, each under a temporary name first; `record` is completed."""
    temporary, checksum = path.with_name(f"{path.name}.{os.getpid()}.tmp"), 0
    with open(temporary, "wb") as file:
        for array in columns.payload:
            content = memoryview(array).cast("B")
            file.write(content)
            checksum = zlib.crc32(content, checksum)
    os.replace(temporary, payload_path(path))
    record["crc32"] = checksum
    rejects = columns.rejects
    table = np.zeros(len(rejects), dtype=REJECT)
    if rejects:
        table["offset"], table["line"] = [row[0] for row in rejects], [row[1] for row in rejects]
        table["reason"], table["size"] = [NUMBERS[row[2]] for row in rejects], [len(row[3]) for row in rejects]
    ids = np.flatnonzero(columns.id_counts)
    arrays = {
        "record": np.frombuffer(json.dumps(record).encode(), np.uint8),
        "samples": np.frombuffer(columns.samples.packed().encode(), np.uint8),
        "rejects": table,
        "rejects_raw": np.frombuffer(b"".join([row[3] for row in rejects]), np.uint8),
        "documents": _join(columns.documents, DOCUMENT),
        "piece_sizes": _join(columns.piece_sizes, np.dtype("<u4")),
        "ids": ids.astype("<u4"),
        "id_counts": columns.id_counts[ids],
        "signatures": _join(columns.signatures, np.dtype("<u4")),
        "chats": _join(columns.chats, CHAT),
        "turn_characters": _join(columns.turn_characters, np.dtype("<u4")),
    }
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def _join(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays, dtype=dtype) if arrays else np.zeros(0, dtype=dtype)


class Damaged(Exception):
    """A part is damaged: the machine lost power, or the disk failed."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"{path}: {error}")
        self.path = path


class Part:
    """A part's files, read lazily.

    Raises:
        Damaged: it is not whole. Its files are closed then, so that Windows can replace or remove them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = np.load(path, allow_pickle=False)
        except DAMAGE as error:
            raise Damaged(path, error) from error
        try:
            self.record: dict = json.loads(self["record"].tobytes())
        except Damaged:
            self._file.close()
            raise

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._file[name]
        except DAMAGE as error:
            raise Damaged(self.path, error) from error

    def payload(self) -> np.ndarray:
        """The tokens, or the bytes of JSONL."""
        try:
            payload = np.fromfile(payload_path(self.path), dtype=self.record["dtype"])
            if len(payload) != self.record["items"] or zlib.crc32(payload) != self.record["crc32"]:
                raise ValueError("its payload is damaged")
        except (OSError, ValueError) as error:
            self._file.close()
            raise Damaged(self.path, error) from error
        return payload

    def check(self) -> None:
        """Compare all checksums."""
        if (name := self._file.zip.testzip()) is not None:
            raise Damaged(self.path, ValueError(f"{name} is damaged"))
        self.payload()

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


DAMAGE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)  # what np.load raises for it
