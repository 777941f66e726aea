"""The rows of tables as dictionaries: CSV with a header that names the columns of a chat, and Parquet."""

import csv
import io
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from model.corpus.chats import BAD_ROW, KEYS_OF_FORM
from model.corpus.inspection import BOM
from model.corpus.pairs import PAIR_KEYS, is_pair
from model.errors import InputError, first_line, shown

MAX_CSV_FIELD = 64 << 20  # characters


def csv_header(head: bytes) -> list[str]:
    """The names of a CSV file's columns, from its first bytes; [] where its first line is no row."""
    first = head.removeprefix(BOM).lstrip(b"\r\n").splitlines()[:1]
    try:
        return next(csv.reader([line.decode("utf-8", "replace") for line in first]), [])
    except csv.Error:
        return []


def names_chats(names: Sequence[str]) -> bool:
    """Whether columns of these names are those of a chat or a pair, such as history, q, a."""
    row = dict.fromkeys(names, "")
    return is_pair(row) or any(keys <= row.keys() for keys in KEYS_OF_FORM.values())


def refuse_repeated(path: Path, names: Sequence[str], keys: Sequence[str] = PAIR_KEYS) -> None:
    """Refuse a table with two columns of one name, of which only one could be read.

    Raises:
        InputError: it has.
    """
    if repeated := [name for name in keys if names.count(name) > 1]:
        raise InputError(f"input_path: {path} has {names.count(repeated[0])} columns {repeated[0]}; rename all but one")


def csv_rows(file: BinaryIO) -> Generator:
    """The rows of a CSV file with a header, {column: text}.

    What is no row of the header's columns, or has misplaced quotes, becomes {BAD_ROW: its text}. A quote that is never
    closed takes only its own line along, where complete rows follow.
    """
    taken: list[str] = []  # lines of the row that is being read
    again: list[str] = []  # lines to be read once more, the first one last
    text = io.TextIOWrapper(io.BufferedReader(_Unclosed(file)), "utf-8-sig", errors="surrogateescape", newline="")

    def read_rows() -> Iterator[list[str]]:
        lines = iter(lambda: again.pop() if again else text.readline(MAX_CSV_FIELD), "")
        return csv.reader((taken.append(line) or line for line in lines), strict=True)

    csv.field_size_limit(MAX_CSV_FIELD)
    rows, header = read_rows(), None
    while True:
        taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            row, rows = None, read_rows()
            if header and len(taken) > 1 and all(_is_row(line, len(header)) for line in taken[1:4]):
                again += reversed(taken[1:])
                del taken[1:]
        if row == []:  # an empty line
            continue
        if header is None and row:
            header = row
            continue
        good = row is not None and header is not None and len(row) == len(header)
        yield dict(zip(header, row, strict=True)) if good else {BAD_ROW: "".join(taken)}


def _is_row(line: str, columns: int) -> bool:
    """Whether a line of CSV is a row by itself."""
    try:
        return len(next(csv.reader([line], strict=True), [])) == columns
    except csv.Error:
        return False


class _Unclosed(io.RawIOBase):
    """Reads a file, and leaves it open when it is closed itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def parquet_rows(path: Path, keys: Sequence[str]) -> Generator:
    """The rows of a Parquet file, {column: value}, of the columns that are there of `keys`; texts are bytes.

    Raises:
        InputError: pyarrow is not installed, there is none of these columns, or the file cannot be read.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"input_path: reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path, buffer_size=1 << 20) as file:  # pages are read one by one, not whole row groups
            names = file.schema_arrow.names
            if not (columns := [key for key in keys if key in names]):
                found = f"its columns are {shown(', '.join(names))[1:-1]}"
                if len(keys) == 1:
                    raise InputError(f"text_field: {path} has no column {keys[0]}; {found}")
                raise InputError(
                    f"input_path: {path} has no column of a chat, such as messages; {found}; process files of texts and"
                    " of chats into one output each"
                )
            refuse_repeated(path, names, keys)
            for batch in file.iter_batches(batch_size=128, columns=columns):
                # to_pylist would raise for text that is not UTF-8
                values = [column.cast(_with_bytes(column.type)).to_pylist() for column in batch.columns]
                for row in zip(*values, strict=True):
                    yield dict(zip(batch.schema.names, row, strict=True))
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise InputError(
            f"input_path: {path} cannot be read as Parquet ({first_line(error)}); fetch it again"
        ) from error


def _with_bytes(kind):
    """An Arrow type with bytes wherever it has text."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        made = pa.large_list if pa.types.is_large_list(kind) else pa.list_
        return made(kind.value_field.with_type(_with_bytes(kind.value_type)))
    if pa.types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    return kind
