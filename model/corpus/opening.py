"""One source of texts: recognises its form and reads it as JSONL.

A row of Parquet or of a dataset, an object of a JSON array, a document of plain text: each becomes the line
`{"text": ...}` that it would have been. Memory does not grow with the file, but a .zst needs the window that it was
compressed with: 2 GiB after `zstd --long=31`.
"""

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model.corpus.inspection import (
    BOM,
    PACKINGS,
    PARQUET,
    describe_encoding,
    encoding_of,
    has_only_carriage_returns,
    is_array,
    packing_of,
    unreadable,
)
from model.corpus.plain_text import TXT_DOCUMENTS, BytesRead, SmallFiles, txt_documents
from model.corpus.streams import streamed_rows
from model.corpus.tables import csv_header, csv_rows, names_chats, parquet_rows, refuse_repeated
from model.errors import InputError, first_line

READ_AT_ONCE = 1 << 20  # bytes, about, that are unpacked or made from rows at a time
HEAD_BYTES = 16 << 10  # read to recognise a file's form
EXPECTED = 'expected JSONL, one {"text": ...} object a line'


class WrongEncoding(InputError):
    """A file is readable text, but not UTF-8; `encoding` names what it is."""

    def __init__(self, message: str, encoding: str) -> None:
        super().__init__(message)
        self.encoding = encoding


@dataclass(frozen=True)
class Source:
    """One file, one dataset that is streamed, or many small .txt that are read as one file."""

    location: str  # a path, datasets:NAME?… or ms:NAME?…; of many files what a glob for them would be
    name: str  # unique and short: the folders that all sources share are omitted
    size: int  # bytes on disk; 0 for a streamed dataset, whose size is unknown
    weight: float = 1.0
    form: str = "jsonl"  # or cr (JSONL with CR line ends), array, parquet, csv, dataset; or one of TXT_DOCUMENTS
    packing: str = ""  # one of PACKINGS; "": not compressed
    keys: tuple[str, ...] = ()  # the columns to take of a table that has them; (): the text field alone
    files: SmallFiles | None = None  # None: it is one

    @property
    def is_plain(self) -> bool:
        """Whether any part can be read without those before it."""
        return self.form == "jsonl" and not self.packing

    def part_count(self, part_bytes: int) -> int:
        """Parts of a plain file; some may hold no line."""
        return max(1, -(-self.size // part_bytes))

    def path_of(self, line: int) -> str:
        """The path of the file that holds line `line`, from 0, of a source that was read to its end."""
        return self.location if self.files is None else self.files.path_of(line)

    def place_of(self, line: int, prefix: str = "") -> dict:
        """`{"file": name}` of that file, with a prefix to the key; {} where the source is one file."""
        return {} if self.files is None else {f"{prefix}file": self.files.name_of(line)}


def recognise(path: str | Path, txt_documents: str = "file") -> tuple[str, str, bytes]:
    """(form, packing, the first bytes unpacked) of a file.

    Raises:
        InputError: it is an archive, damaged from the start, or its reader is not installed.
        WrongEncoding: it is text in another encoding.
    """
    name, (packing, head) = str(path), _head(path)
    stem = name.lower().removesuffix(f".{packing}")
    columns = csv_header(head) if stem.endswith(".csv") else []
    is_txt, is_csv = stem.endswith(".txt"), bool(columns) and names_chats(columns)
    if not is_csv and (problem := unreadable(name, head)):
        raise InputError(f"input_path: {path} is {problem}")
    if packing and (head.startswith(PARQUET) or packing_of("", head)):
        raise InputError(f"input_path: {path} holds a compressed file within a compressed one; unpack it first")
    if stem.endswith(".parquet") or head.startswith(PARQUET):
        return "parquet", packing, head
    if (encoding := encoding_of(head)) and (is_txt or is_csv or encoding == "utf-16"):
        raise WrongEncoding(f"input_path: {path} {describe_encoding(path, encoding)}", encoding)
    if is_csv:
        refuse_repeated(path, columns)
        return "csv", packing, head
    if is_txt:
        return txt_documents, packing, head
    form = "cr" if has_only_carriage_returns(head) else "jsonl"
    return "array" if is_array(head) else form, packing, head


def is_chat_table(path: str | Path) -> bool:
    """Whether the first line of a CSV file names the columns of a chat, such as history,q,a.

    Raises:
        InputError: it is damaged from the start, or its reader is not installed.
    """
    return names_chats(csv_header(_head(path)[1]))


def _head(path: str | Path) -> tuple[str, bytes]:
    """A file's packing, and its first bytes unpacked."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEAD_BYTES)
    if packing := packing_of(str(path), head):
        with _unpacked(path, packing) as file, naming_damage(str(path)):
            head = file.read(HEAD_BYTES)
    return packing, head


def open_source(source: Source, text_field: str = "text") -> BinaryIO:
    """The source's text as JSONL, from its first byte.

    Raises:
        InputError: its reader is not installed, or it cannot be read.
    """
    keys = source.keys or (text_field,)
    if source.form == "dataset":
        return _as_file(_as_jsonl(streamed_rows(source.location), keys))
    if source.files is not None:
        progress = BytesRead()
        return _as_file(_as_jsonl(source.files.documents(source.form, progress), (text_field,)), progress)
    path = Path(source.location)
    if source.form == "parquet":
        return _as_file(_as_jsonl(parquet_rows(path, keys), keys))
    file = _unpacked(path, source.packing)
    if source.form == "csv":
        return _as_file(_as_jsonl(csv_rows(file)), file)
    if source.form == "array":
        return _as_file(_array_elements(file), file)
    if source.form == "cr":
        return _as_file((block.replace(b"\r", b"\n") for block in _blocks(file)), file)
    if source.form in TXT_DOCUMENTS:
        return _as_file(_as_jsonl(txt_documents(file, source.form), (text_field,)), file)
    return file


def _unpacked(path: str | Path, packing: str) -> BinaryIO:
    disk = open(path, "rb")  # noqa: SIM115 (closed by what is returned)
    try:
        return _as_file(_UNPACKERS[packing](disk), disk) if packing else disk
    except ImportError as error:
        disk.close()
        package = {"zst": "zstandard: pip install zstandard"}.get(packing, f"a Python that was built with {error.name}")
        raise InputError(f"input_path: reading {path} needs {package}") from None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(READ_AT_ONCE), b"")


def _unpacked_blocks(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read1(READ_AT_ONCE), b"")  # as little as possible: damage may lie further on


def _gz(disk: BinaryIO) -> Iterator[bytes]:
    return _unpacked_blocks(gzip.GzipFile(fileobj=disk))


def _bz2(disk: BinaryIO) -> Iterator[bytes]:
    import bz2

    return _unpacked_blocks(bz2.BZ2File(disk))


def _xz(disk: BinaryIO) -> Iterator[bytes]:
    import lzma

    return _unpacked_blocks(lzma.LZMAFile(disk))


def _zst(disk: BinaryIO) -> Iterator[bytes]:
    import zstandard

    return _zst_frames(disk, zstandard.ZstdDecompressor(max_window_size=1 << 31))


def _zst_frames(file: BinaryIO, decompressor) -> Generator:
    """What a .zst file holds. Unlike zstandard's own reader, it fails where the file was cut off."""
    frame = None
    while packed := file.read(4 << 10):  # little at a time: 4 bytes may stand for 128 KiB of one character
        while packed:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the file ends in the middle of a frame")


_UNPACKERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {"gz": _gz, "bz2": _bz2, "xz": _xz, "zst": _zst}
assert _UNPACKERS.keys() == PACKINGS.keys()


@contextlib.contextmanager
def naming_damage(location: str) -> Iterator[None]:
    """Turn what the decompressors raise for a damaged file into an InputError."""
    try:
        yield
    except Exception as error:
        of_library = type(error).__name__ in ("ZstdError", "LZMAError")
        of_bz2_or_gzip = isinstance(error, OSError) and error.errno is None  # the system's own errors have a number
        if not (of_library or of_bz2_or_gzip or isinstance(error, EOFError | zlib.error)):
            raise
        raise InputError(f"input_path: {location} is damaged ({first_line(error)}); fetch it again") from error


# ------------------------------------------------------------------------------------------ rows, elements, documents


# The bytes that decide where an array's element ends: a string's start, brackets, commas between elements.
_STRUCTURE = re.compile(rb'["{}\[\],]')
_IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def _array_elements(file: BinaryIO) -> Generator:
    """The elements of JSON arrays, one per line, unchanged except that line ends within them become spaces.

    Nothing is parsed: a damaged element becomes a line that is rejected. An array may be followed by more arrays, or by
    JSONL, which passes unchanged.
    """
    depth, in_array, in_string, begun, rest = 0, False, False, False, b""  # begun: the current line has content
    for block in _blocks(file):
        block, rest, pieces, start, at = rest + block, b"", [], 0, 0
        while True:
            if in_string:
                at = _IN_STRING.match(block, at).end()
                if at == len(block) or block[at : at + 1] == b"\\":  # the string, or an escape, continues in the next
                    break
                in_string, at = False, at + 1
            found = _STRUCTURE.search(block, at)
            if found is None:
                at = len(block)
                break
            at, mark = found.end(), found[0]
            if mark == b'"':
                in_string = True
            elif depth or mark == b"{" or (mark == b"[" and in_array):  # within an element
                depth += {b"{": 1, b"[": 1, b",": 0}.get(mark, -1)
            elif mark == b"[" or (in_array and mark != b"}"):  # an array begins, an element ends, or the array does
                piece = _piece_of_line(block[start : at - 1], in_array, begun)
                pieces.append(piece + b"\n" if piece or begun else b"")
                begun, start, in_array = False, at, mark != b"]"
        piece, rest = _piece_of_line(block[start:at], in_array, begun), block[at:]
        begun = bool(piece or begun) and not piece.endswith(b"\n")
        yield b"".join([*pieces, piece])
    if in_array:
        raise EOFError("its JSON array is not closed")


def _piece_of_line(piece: bytes, in_array: bool, begun: bool) -> bytes:
    """A piece of an element without line ends, or of text outside arrays; `begun`: the line already has content."""
    piece = piece.replace(b"\n", b" ").replace(b"\r", b" ") if in_array else piece.replace(BOM, b"")
    return piece if begun else piece.lstrip()


# ------------------------------------------------------------------------------------------------- file-like objects


class _Generated(io.RawIOBase):
    """A file of the bytes that an iterator yields; closing it closes the generator, and the file that it reads."""

    def __init__(self, contents: Iterator[bytes], file: BinaryIO | None) -> None:
        self._contents, self._file, self._rest = contents, file, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            content = next(self._contents, None)
            if content is None:
                return 0
            self._rest = memoryview(content)
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        if hasattr(self._contents, "close"):
            self._contents.close()
        if self._file is not None:
            self._file.close()
        super().close()


def _as_file(contents: Iterator[bytes], file: BinaryIO | None = None) -> BinaryIO:
    """These bytes, made from `file`, as a file whose `disk` attribute is the file on disk, for the progress bar."""
    made = io.BufferedReader(_Generated(contents, file), READ_AT_ONCE)
    made.disk = getattr(file, "disk", file)
    return made


def _as_jsonl(rows: Generator, keys: Sequence[str] = ()) -> Generator:
    """The rows as lines of JSONL, some READ_AT_ONCE characters at a time; of `keys` alone if there are some."""
    encode = json.JSONEncoder(ensure_ascii=False, default=_not_json).encode  # json.dumps would make one for each row
    with contextlib.closing(rows):
        lines, characters = [], 0
        begin = f"{{{encode(keys[0])}: " if keys else ""
        for row in rows:
            is_text = isinstance(row, str) and keys  # the same line, made faster
            lines.append(f"{begin}{encode(row)}}}\n" if is_text else encode(_taken(row, keys)) + "\n")
            characters += len(lines[-1])
            if characters > READ_AT_ONCE:
                yield "".join(lines).encode("utf-8", "surrogatepass")
                lines, characters = [], 0
        yield "".join(lines).encode("utf-8", "surrogatepass")


def _taken(row, keys: Sequence[str]) -> dict:
    """What is read of a row, {key: value} of the keys that it has, or of a text, `{keys[0]: text}`."""
    if not keys:
        return row
    if not isinstance(row, dict):
        row = {keys[0]: row}
    if len(keys) > 1:
        return {key: row[key] for key in keys if key in row}
    return {keys[0]: row.get(keys[0])}


def _not_json(value) -> dict | str:
    """Stands for a value that JSON cannot hold, such as a date or a picture; the line is rejected."""
    if isinstance(value, bytes):  # those that are not UTF-8 become lone surrogates, and the line a bad_utf8
        return value.decode("utf-8", "surrogateescape")
    return {type(value).__name__: str(value)}
