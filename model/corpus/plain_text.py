"""The documents of plain text: of one file, or of very many small ones that are read as one source."""

import codecs
import hashlib
import io
import os
from array import array
from collections.abc import Generator, Sequence
from typing import BinaryIO

import numpy as np

TXT_DOCUMENTS = ("file", "paragraph", "line")
TXT_BYTES = 1 << 20  # a longer document of a .txt is cut at the next line's end
SMALL_BYTES = 256 << 10  # a small file has at most this, and is read at once


def txt_documents(file: BinaryIO, unit: str) -> Generator:
    """The documents of plain text: the whole of it, its paragraphs (between empty lines) or its lines.

    A document of more than TXT_BYTES is cut at the next line's end. A line that is not UTF-8 is yielded alone, with a
    lone surrogate for each bad byte, so that nothing else is rejected with it.
    """
    held, size = [], 0
    for line in _txt_lines(file):
        is_good = _is_encodable(line)
        ends = size > TXT_BYTES or not is_good or unit == "line" or (unit == "paragraph" and not line.strip())
        if ends and size:
            yield "".join(held)
            held, size = [], 0
        if not is_good:
            yield line
        elif size or line.strip():
            held.append(line)
            size += len(line)
    if size:
        yield "".join(held)


def _txt_lines(file: BinaryIO) -> Generator:
    """Lines with their ends, all of which become \\n; a very long line comes in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for raw in iter(lambda: file.readline(TXT_BYTES), b""):
        text = decoder.decode(raw).replace("\r\n", "\n").replace("\r", "\n")
        yield from (line.removeprefix("\ufeff") for line in io.StringIO(text))
    yield from io.StringIO(decoder.decode(b"", final=True))


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class SmallFiles:
    """Small .txt files that are read as one source, one after another.

    Args:
        folder: which they are in, they or their folders; "" for the current one.
        shown: its name in messages and in the files beside the output.
        names: relative to the folder, with / between folders, in the order of reading.
        sizes: bytes of each.

    Attributes:
        sha256: of the names and sizes.
        line_ends: int64 [files]: how many documents the files up to each one hold; None until all were read once.
    """

    def __init__(self, folder: str, shown: str, names: Sequence[str], sizes: Sequence[int]) -> None:
        self._prefix, self._shown, self.names = os.path.join(folder, ""), shown, names
        digest = hashlib.sha256()
        for name, size in zip(names, sizes, strict=True):
            digest.update(b"%b\0%d\0" % (os.fsencode(name), size))
        self.sha256 = digest.hexdigest()
        self.line_ends: np.ndarray | None = None

    def documents(self, unit: str, progress: "BytesRead") -> Generator:
        """The documents of one file after another, as `txt_documents` makes them of each."""
        ends, count = array("q"), 0
        for name in self.names:
            raw = _read_small(self._prefix + name)
            progress.count += len(raw)
            is_small = len(raw) <= SMALL_BYTES  # or else it grew since it was found
            text = _whole_text(raw) if unit == "file" and is_small else None
            if text:
                yield text
                count += 1
            elif text is None:
                with io.BytesIO(raw) if is_small else open(self._prefix + name, "rb") as file:
                    for document in txt_documents(file, unit):
                        yield document
                        count += 1
            ends.append(count)
        self.line_ends = np.frombuffer(ends, np.int64)

    def name_of(self, line: int) -> str:
        """The name of the file that document `line`, from 0, of the source comes from; all were read once."""
        return f"{self._shown}/{spelled_out(self._name_of(line))}"

    def path_of(self, line: int) -> str:
        """The path of that file."""
        return self._prefix + self._name_of(line)

    def _name_of(self, line: int) -> str:
        return self.names[int(np.searchsorted(self.line_ends, line, side="right"))]


class BytesRead:
    """Stands for the file on disk, for the progress bar, where there are many: `tell` is what was read of all."""

    def __init__(self) -> None:
        self.count = 0

    def tell(self) -> int:
        return self.count

    def close(self) -> None:
        pass


def _read_small(path: str) -> bytes:
    """What a file holds, its first SMALL_BYTES + 1 bytes at most; unbuffered, which takes half the time."""
    with open(path, "rb", buffering=0) as file:
        raw = file.read(SMALL_BYTES + 1)
        while raw and len(raw) <= SMALL_BYTES and (more := file.read(SMALL_BYTES + 1 - len(raw))):
            raw += more
    return raw


def _whole_text(raw: bytes) -> str | None:
    """The one document that `txt_documents` makes of a small file, but faster; "" for none, None where there may be
    several."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None
    if "\ufeff" in text:
        return None
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    blank = len(text) - len(text.lstrip())  # blank lines at the start are none of it
    return text[text.rfind("\n", 0, blank) + 1 :] if blank < len(text) else ""


def spelled_out(name: str) -> str:
    """A file's name as text: bytes of it that are not UTF-8 as \\xd6."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
