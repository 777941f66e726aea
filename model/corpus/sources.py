"""What data processing reads: JSONL as it is or compressed, Parquet, folders and globs of them, `datasets` streams.

Everything is read as JSONL: a row of Parquet or of a dataset becomes the line `{"text": ...}` that it would have been.
The input is cut into *parts*: part k of a source is the lines whose first byte lies in [k * part_bytes,
(k + 1) * part_bytes) of its text. So the parts depend on nothing but the input and `part_bytes`, each can be made again
alone, and of a plain file any process can read any part at once. Line ends are the byte `\\n` and nothing else.
"""

import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

from model.errors import InputError

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20
KEPT_OF_OVERSIZED = 4096  # bytes of an oversized line that its reject keeps; its offset says where the rest is
ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst", ".parquet")  # in folders, globs
OUR_ENDINGS = (".rejects.jsonl", ".changes.jsonl")  # what data processing itself left there
DATASETS = "datasets:"  # datasets:NAME?split=train&name=CONFIG: the options are load_dataset's


@dataclass(frozen=True)
class Source:
    """One file, or one dataset that `datasets` streams."""

    location: str  # a path, or datasets:NAME?…
    size: int  # bytes on disk; 0 for a streamed dataset, where nobody knows
    entry: int = 0  # which of the given inputs it belongs to
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What tells it apart from others, without the folder that it happens to lie in."""
        return self.location if self.is_dataset else Path(self.location).name

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


def find_sources(inputs: str | Path | Sequence, weights: Sequence[float] | None = None) -> list[Source]:
    """The files and datasets that are meant by paths, folders, globs and `datasets:…`, in the order given.

    A folder's and a glob's files come in the order of their names.

    Raises:
        InputError: something is not there, is empty or is no file that can be read; a wrong number of weights.
    """
    inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    weights = [1.0] * len(inputs) if weights is None else list(weights)
    if len(weights) != len(inputs):
        raise InputError(f"weights: {len(weights)} found for {len(inputs)} inputs; give one for each")
    if bad := [weight for weight in weights if not 0 < weight <= 1000]:
        raise InputError(f"weights: {bad[0]} found, expected numbers above 0 and up to 1000")
    sources = []
    for entry, (given, weight) in enumerate(zip(inputs, weights, strict=True)):
        if str(given).startswith(DATASETS):
            sources.append(Source(str(given), 0, entry, weight))
        else:
            files = _files(Path(given))
            sources += [Source(str(path), path.stat().st_size, entry, weight) for path in files]
    if not sources:
        raise InputError("input_path: nothing was given")
    for source in sources:
        with open_source(source):
            pass
    return sources


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _is_input(file)]
        if not found:
            raise InputError(f"input_path: the folder {path} holds no file that ends in {', '.join(ENDINGS)}")
        return sorted(found, key=lambda file: file.as_posix())
    if path.is_file():
        return [path]
    if glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        found = [file for file in found if file.is_file() and not file.name.endswith(OUR_ENDINGS)]
        if not found:
            raise InputError(f"input_path: no file matches {path}")
        return sorted(found, key=lambda file: file.as_posix())
    raise InputError(f'input_path: no file {path}; expected JSONL, one {{"text": ...}} object a line')


def _is_input(file: Path) -> bool:
    return file.name.endswith(ENDINGS) and not file.name.endswith(OUR_ENDINGS)


# ------------------------------------------------------------------------------------------------------ opening one


def open_source(source: Source, text_field: str = "text") -> BinaryIO:
    """The source's text as JSONL, from its first byte.

    Raises:
        InputError: it is not there, empty, UTF-16, damaged from the start, or its reader is not installed.
    """
    if source.is_dataset:
        return _open_rows(_dataset_rows(source.location), text_field)
    path = Path(source.location)
    if not path.is_file():
        raise InputError(f'input_path: no file {path}; expected JSONL, one {{"text": ...}} object a line')
    if path.stat().st_size == 0:
        raise InputError(f'input_path: {path} is empty; expected JSONL, one {{"text": ...}} object a line')
    if source.location.endswith(".parquet"):
        return _open_rows(_parquet_rows(path, text_field), text_field)
    if source.location.endswith(".gz"):
        file = gzip.open(path, "rb")
        file.disk = file.fileobj
    elif source.location.endswith(".zst"):
        file = _open_zst(path)
    else:
        file = open(path, "rb")
    with _damage(source.location):
        start = file.peek(2)[:2]
    if start in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise InputError(f"input_path: {path} is UTF-16; save it as UTF-8 first")
    return file


def _open_zst(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"input_path: reading {path} needs zstandard: pip install zstandard") from None
    file = open(path, "rb")
    unpacked = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), 1 << 20)
    unpacked.disk = file  # knows how far the reading is
    return unpacked


def _parquet_rows(path: Path, text_field: str) -> Iterator:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise InputError(
                f"text_field: {path} has no column {text_field}; its columns are {', '.join(file.schema_arrow.names)}"
            )
        for batch in file.iter_batches(batch_size=1000, columns=[text_field]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"input_path: {path} cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _dataset_rows(location: str) -> Iterator:
    name, _, query = location.removeprefix(DATASETS).partition("?")
    options = {"split": "train", **dict(parse_qsl(query))}
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


class _Rows(io.RawIOBase):
    """The rows as a file of JSONL."""

    def __init__(self, rows: Iterable, text_field: str) -> None:
        self._rows, self._text_field, self._rest = iter(rows), text_field, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while len(self._rest) < len(buffer):
            lines = []
            for row in self._rows:
                value = row.get(self._text_field) if isinstance(row, dict) else row
                lines.append(json.dumps({self._text_field: value}, ensure_ascii=False, default=str) + "\n")
                if len(lines) == 256:
                    break
            if not lines:
                break
            self._rest += "".join(lines).encode("utf-8", "surrogatepass")
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _open_rows(rows: Iterable, text_field: str) -> BinaryIO:
    return io.BufferedReader(_Rows(rows, text_field), 1 << 20)


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
            raw = (
                raw[: last + KEPT_OF_OVERSIZED]
                if len(raw) - last >= KEPT_OF_OVERSIZED
                else raw + tail[:KEPT_OF_OVERSIZED]
            )
        else:
            raw += tail
    else:
        size = len(raw)
    return Block(position, raw, size, digest.hexdigest(), oversized)


def lines_of(block: Block) -> list[bytes]:
    """The block's lines without their ends; a byte-order mark at the source's very start is none of the text."""
    raw = block.raw.removeprefix(BOM) if block.offset == 0 else block.raw
    lines = raw.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def line_offsets(block: Block, lines: Sequence[bytes]) -> list[int]:
    """Where each line begins in the source's text, bytes."""
    starts = [block.offset]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    if block.offset == 0 and block.raw.startswith(BOM):  # it counts as a part of the first line
        starts[1:] = [start + len(BOM) for start in starts[1:]]
    return starts[: len(lines)]
