"""What data processing reads: JSONL as it is or compressed, Parquet, folders and globs of them, `datasets` streams.

Everything is read as JSONL: a row of Parquet or of a dataset becomes the line `{"text": ...}` that it would have been.
The input is cut into *parts*: part k of a source is the lines whose first byte lies in [k * part_bytes,
(k + 1) * part_bytes) of its text. So the parts depend on nothing but the input and `part_bytes`, each can be made again
alone, and of a plain file any process can read any part at once. Line ends are the byte `\\n` and nothing else.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs

from model.errors import InputError

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20
READ_AT_ONCE = 1 << 20  # bytes, about, of what is unpacked or made from rows
KEPT_OF_OVERSIZED = 4096  # bytes of an oversized line that its reject keeps; its offset says where the rest is
ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst", ".parquet")  # in folders, globs
OUR_ENDINGS = (".rejects.jsonl", ".changes.jsonl")  # what data processing itself left there
DATASETS = "datasets:"  # datasets:NAME?split=train&name=CONFIG: the options are load_dataset's


@dataclass(frozen=True)
class Source:
    """One file, or one dataset that `datasets` streams."""

    location: str  # a path, or datasets:NAME?…
    name: str  # what tells it apart from the others, without the folder that all of them happen to lie in
    size: int  # bytes on disk; 0 for a streamed dataset, where nobody knows
    weight: float = 1.0

    @property
    def is_dataset(self) -> bool:
        return self.location.startswith(DATASETS)

    @property
    def is_plain(self) -> bool:
        """Whether any part can be read without those before it."""
        return not self.is_dataset and not self.location.endswith((".gz", ".zst", ".parquet"))

    def part_count(self, part_bytes: int) -> int:
        """Parts of a plain file; some may hold no line."""
        return max(1, -(-self.size // part_bytes))


@dataclass(frozen=True)
class Block:
    """The lines of one part."""

    offset: int  # of the first line in the source's text, bytes
    raw: bytes  # the lines with their ends; of an oversized line, which can only be the last, the first bytes
    size: int  # bytes that they have in the source
    sha256: str  # of those bytes
    oversized: bool = False


def find_sources(
    inputs: str | Path | Sequence[str | Path], weights: Sequence[float] | None = None, leave_out: Collection[Path] = ()
) -> list[Source]:
    """The files and datasets that are meant by paths, folders, globs and `datasets:…`, in the order given.

    A folder's and a glob's files come in the order of their names. What data processing itself left there, or is about
    to leave (`leave_out`, resolved paths), is none of them.

    Raises:
        InputError: something is not there, is empty or is no file that can be read; a wrong number of weights.
    """
    inputs = list(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes) else [inputs]
    if bad := [given for given in inputs if not isinstance(given, str | Path) or not str(given).strip()]:
        raise InputError(f"input_path: {bad[0]!r} found, expected a file, a folder, a glob or datasets:NAME")
    found = []  # (location, size, weight)
    for given, weight in zip(inputs, _checked_weights(weights, len(inputs)), strict=True):
        if str(given).startswith(DATASETS):
            found.append((str(given), 0, weight))
        else:
            files = _files(Path(given), leave_out)
            found += [(str(path), path.stat().st_size, weight) for path in files]
    if not found:
        raise InputError("input_path: nothing was given")
    names = _short_names([location for location, _, _ in found])
    sources = [
        Source(location, name, size, weight) for name, (location, size, weight) in zip(names, found, strict=True)
    ]
    for source in sources:
        open_source(source).close()
    return sources


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    weights = list(weights) if isinstance(weights, Sequence) else [weights]
    if len(weights) != count:
        raise InputError(f"weights: {len(weights)} found for {count} inputs; give one for each")
    for weight in weights:
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= 1000:
            raise InputError(f"weights: {weight!r} found, expected numbers above 0 and up to 1000")
    return weights


def _files(path: Path, leave_out: Collection[Path]) -> list[Path]:
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(ENDINGS)]
        nothing = f"the folder {path} holds no file that ends in {', '.join(ENDINGS)}"
    elif path.is_file():
        return [path]
    elif glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        nothing = f"no file matches {path}"
    else:
        raise InputError(f'input_path: no file {path}; expected JSONL, one {{"text": ...}} object a line')
    found = [file for file in found if file.is_file() and not _is_ours(file) and file.resolve() not in leave_out]
    if not found:
        raise InputError(f"input_path: {nothing}")
    return sorted(found, key=lambda file: file.as_posix())


def _is_ours(file: Path) -> bool:
    """Whether data processing left it: beside an output, or in the folder of one that is half made."""
    in_job = len(file.parts) > 2 and file.parts[-2] == "merged" and file.parts[-3].endswith(".parts")
    return in_job or file.name.endswith(OUR_ENDINGS)


def _short_names(locations: Sequence[str]) -> list[str]:
    """The files' names, with as many of their folders as it takes to tell them apart; datasets as they are."""
    paths = {location: Path(os.path.abspath(location)).parts for location in locations}
    names, depth = {}, 0
    while len(set(names.values())) < len(set(paths.values())):
        depth += 1
        for location, parts in paths.items():
            names[location] = location if location.startswith(DATASETS) else "/".join(parts[-depth:])
    return [names[location] for location in locations]


# ------------------------------------------------------------------------------------------------------ opening one


def open_source(source: Source, text_field: str = "text") -> BinaryIO:
    """The source's text as JSONL, from its first byte.

    Raises:
        InputError: it is not there, empty, UTF-16, damaged from the start, or its reader is not installed.
    """
    if source.is_dataset:
        return _as_file(_as_jsonl(_dataset_rows(source.location), text_field))
    path = Path(source.location)
    if not path.is_file():
        raise InputError(f'input_path: no file {path}; expected JSONL, one {{"text": ...}} object a line')
    if path.stat().st_size == 0:
        raise InputError(f'input_path: {path} is empty; expected JSONL, one {{"text": ...}} object a line')
    if source.location.endswith(".parquet"):
        return _as_file(_as_jsonl(_parquet_rows(path, text_field), text_field))
    if source.location.endswith(".gz"):
        file = gzip.open(path, "rb")
        file.disk = file.fileobj
    elif source.location.endswith(".zst"):
        file = _open_zst(path)
    else:
        file = open(path, "rb")
    try:
        with _damage(source.location):
            start = file.peek(2)[:2]
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"input_path: {path} is UTF-16; save it as UTF-8 first")
    except BaseException:
        file.close()
        raise
    return file


def _open_zst(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"input_path: reading {path} needs zstandard: pip install zstandard") from None
    file = open(path, "rb")
    unpacked = _as_file(_zst_frames(file, zstandard.ZstdDecompressor(max_window_size=1 << 31)), file)
    unpacked.disk = file  # knows how far the reading is
    return unpacked


def _zst_frames(file: BinaryIO, decompressor) -> Generator:
    """What a .zst file holds. Unlike zstandard's own reader it tells a file that was cut off from one that ends."""
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


def _parquet_rows(path: Path, text_field: str) -> Generator:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"input_path: reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path, buffer_size=1 << 20) as file:  # pages are read one by one, not whole row groups
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise InputError(f"text_field: {path} has no column {text_field}; its columns are {', '.join(columns)}")
            for batch in file.iter_batches(batch_size=128, columns=[text_field]):
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    column = column.cast(pyarrow.large_binary())  # it may hold what is not UTF-8, and to_pylist raise
                yield from column.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"input_path: {path} cannot be read as Parquet ({reason}); fetch it again") from error


def _dataset_rows(location: str) -> Generator:
    name, _, query = location.removeprefix(DATASETS).partition("?")
    options: dict = {"split": "train"}
    for key, values in parse_qs(query.replace("+", "%2B"), keep_blank_values=True).items():  # a + is no space
        options[key] = values[0] if len(values) == 1 else values  # data_files=a&data_files=b are two files
    if not name:
        raise InputError(f"input_path: {location} names no dataset; expected datasets:NAME?split=train")
    try:
        import datasets
    except ImportError:
        raise InputError(f"input_path: {location} needs datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, streaming=True, trust_remote_code=False, **options)
        yield from rows
    except Exception as error:  # it raises whatever its readers do: OSError, ValueError, KeyError, errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"input_path: {location} cannot be streamed ({reason})") from error


class _Generated(io.RawIOBase):
    """A file of the bytes that a generator yields; closing it closes the generator, and the file that it reads."""

    def __init__(self, contents: Generator, file: BinaryIO | None) -> None:
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
        self._contents.close()
        if self._file is not None:
            self._file.close()
        super().close()


def _as_file(contents: Generator, file: BinaryIO | None = None) -> BinaryIO:
    return io.BufferedReader(_Generated(contents, file), READ_AT_ONCE)


def _as_jsonl(rows: Generator, text_field: str) -> Generator:
    """The rows as lines of JSONL, some READ_AT_ONCE characters at a time."""
    with contextlib.closing(rows):
        lines, characters = [], 0
        for row in rows:
            lines.append(_line(row.get(text_field) if isinstance(row, dict) else row, text_field))
            characters += len(lines[-1])
            if characters > READ_AT_ONCE:
                yield "".join(lines).encode("utf-8", "surrogatepass")
                lines, characters = [], 0
        yield "".join(lines).encode("utf-8", "surrogatepass")


def _line(value, text_field: str) -> str:
    if isinstance(value, bytes):  # bytes that are not UTF-8 become lone surrogates, and the line a bad_utf8
        value = value.decode("utf-8", "surrogateescape")
    return json.dumps({text_field: value}, ensure_ascii=False, default=_not_json) + "\n"


def _not_json(value) -> dict:
    """What stands for a date, a picture or the like, which is no text."""
    return {type(value).__name__: str(value)}


class _damage:
    """Turns what the decompressors raise for a damaged file into an InputError."""

    def __init__(self, location: str) -> None:
        self.location = location

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        zst = kind is not None and kind.__name__ == "ZstdError"
        if zst or isinstance(error, EOFError | gzip.BadGzipFile | zlib.error):
            raise InputError(f"input_path: {self.location} is damaged ({error}); fetch it again") from error


# ---------------------------------------------------------------------------------------------------- reading parts


def read_part(source: Source, index: int, part_bytes: int) -> Block | None:
    """Part `index` of a plain file; None where no line begins in it."""
    start, end = index * part_bytes, (index + 1) * part_bytes
    with open(source.location, "rb") as file:
        if start:
            file.seek(start - 1)  # the byte before: if it ends a line, the next one begins at `start`
            start -= 1
            while start < end and (rest := file.readline(1 << 20)):
                start += len(rest)
                if rest.endswith(b"\n"):
                    break
            else:
                return None
        return _read_block(file, start, end)


def stream_parts(source: Source, part_bytes: int, text_field: str) -> Iterator[tuple[int, Block, int]]:
    """Every part of a source that can only be read from its start: (index, block, bytes read from the disk so far).

    Raises:
        InputError: a compressed file is cut off or damaged.
    """
    with open_source(source, text_field) as file, _damage(source.location):
        disk, position = getattr(file, "disk", None), 0
        while True:
            index = position // part_bytes
            block = _read_block(file, position, (index + 1) * part_bytes)
            if block is None:
                return
            yield index, block, disk.tell() if disk else 0
            position += block.size


def _read_block(file: BinaryIO, position: int, end: int) -> Block | None:
    """The lines that begin before `end`; the file stands at `position`, a line's start. Memory: a block, a line."""
    raw = file.read(end - position) if position < end else b""
    if not raw:
        return None
    digest, oversized = hashlib.sha256(raw), False
    if not raw.endswith(b"\n"):
        last = raw.rfind(b"\n") + 1  # where the last line begins
        room = MAX_LINE_BYTES - (len(raw) - last)
        tail = file.readline(room)
        digest.update(tail)
        size = len(raw) + len(tail)
        oversized = len(tail) == room and not tail.endswith(b"\n")
        if oversized:
            while rest := file.readline(1 << 20):
                digest.update(rest)
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            kept = raw[last : last + KEPT_OF_OVERSIZED]
            raw = raw[:last] + kept + tail[: KEPT_OF_OVERSIZED - len(kept)]
        else:
            raw += tail
    else:
        size = len(raw)
    return Block(position, raw, size, digest.hexdigest(), oversized)


def lines_of(block: Block) -> list[memoryview]:
    """The block's lines without their ends, not copied; a byte-order mark at the source's start is none of the text."""
    raw, content, lines = block.raw, memoryview(block.raw), []
    start = len(BOM) if block.offset == 0 and raw.startswith(BOM) else 0
    while start < len(raw):
        end = raw.find(b"\n", start)
        if end < 0:
            end = len(raw)
        lines.append(content[start:end])
        start = end + 1
    return lines


def line_offsets(block: Block, lines: Sequence[memoryview]) -> list[int]:
    """Where each line begins in the source's text, bytes."""
    starts = [len(BOM) if block.offset == 0 and block.raw.startswith(BOM) else block.offset]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    return starts[: len(lines)]
