"""The header of a GGUF file (ggml's docs/gguf.md): values by name, and each tensor's shape, type and place.

The library `gguf` reads it too, but believes a length of 2^60 and makes a NumPy array of every number in a list, so a
file of 1 MB takes 500 MB. Here every length is compared with the bytes that are left, and values are decoded on demand.
"""

import math
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.errors import InputError, first_line, shown

if TYPE_CHECKING:
    import gguf

MAGIC = b"GGUF"
# Limits of a header: values, tensors, bytes, and strings and lists within lists. The largest models have about 100,
# 3,000, 30 million and 1 million.
MOST_VALUES, MOST_TENSORS, MOST_BYTES, MOST_ITEMS = 4096, 1 << 14, 1 << 28, 1 << 21
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
UINT32, STRING, ARRAY = 4, 8, 9
TYPES = {  # of GGUF that each of Python's stands for
    int: {f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    float: {"FLOAT32", "FLOAT64"},
    bool: {"BOOL"},
    str: {"STRING"},
}


class Refused(Exception):
    """A file's content is refused; the message says why."""


@dataclass(frozen=True)
class Value:
    """A value as the file holds it.

    Attributes:
        types: its type; for a list, also that of its items.
        content: its bytes; for a list, those of all items.
        count: number of items in a list; 1 for a single value.
    """

    types: list["gguf.GGUFValueType"]
    content: memoryview
    count: int

    def contents(self):
        """A number, a boolean, a string, or a list of them.

        Raises:
            UnicodeDecodeError: a string is not UTF-8.
        """
        kind, *items = self.types
        if kind == STRING:
            return _text(self.content, 0)[0]
        if kind != ARRAY:
            return struct.unpack(f"<{FORMS[kind]}", self.content)[0]
        if items[0] in FORMS:
            return [*struct.unpack(f"<{self.count}{FORMS[items[0]]}", self.content)]
        texts, place = [], 0
        for _ in range(self.count):
            text, place = _text(self.content, place)
            texts.append(text)
        return texts


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file.

    Attributes:
        shape: as in torch, the row length last.
        kind: how its numbers are stored.
        rows: uint8 [rows, bytes of a row], mapped from the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: "gguf.GGMLQuantizationType"
    rows: np.ndarray


def _text(content: memoryview, place: int) -> tuple[str, int]:
    """The string that begins at `place`, and where it ends."""
    begin = place + 8
    end = begin + struct.unpack_from("<Q", content, place)[0]
    return str(content[begin:end], "utf-8"), end


class GGUFFile:
    """A GGUF file whose header and tensors all lie within it.

    Attributes:
        fields: {key: Value}.
        tensors: {name: StoredTensor}.

    Raises:
        InputError: it is another kind of file, is truncated, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._items = path, 0, 0
        try:
            self._file = np.memmap(path, np.uint8, mode="r")
            self._header = memoryview(self._file)[:MOST_BYTES]
            self.fields: dict[str, Value] = {}
            self.tensors: dict[str, StoredTensor] = {}
            self._read()
        except ValueError as error:  # an empty file, a name that is not UTF-8, an unknown type
            raise self._refusal(first_line(error)) from error

    def _read(self) -> None:
        if self._take(4) != MAGIC:
            raise self._refusal("its first bytes are not GGUF")
        version, tensors, values = self._numbers("IQQ")
        if version not in (2, 3):
            found = f"version {version}" if version & 0xFFFF else "big-endian numbers"
            raise self._refusal(f"{found}, version 2 or 3 in little-endian numbers expected")
        if tensors > MOST_TENSORS or values > MOST_VALUES:
            raise self._refusal(f"{tensors:,} tensors and {values:,} values")
        for _ in range(values):
            key = self._new_name(self.fields)
            self.fields[key] = self._value()
        listed = {}
        for _ in range(tensors):
            name = self._new_name(listed)
            listed[name] = self._numbers(f"{self._dimensions(name)}QIQ")
        self._find(listed)

    def _value(self) -> Value:
        import gguf

        (kind,) = self._numbers("I")
        types, count = [gguf.GGUFValueType(kind)], 1
        if kind == ARRAY:
            kind, count = self._numbers("IQ")
            types.append(gguf.GGUFValueType(kind))
        begin = self._place
        self._skip(kind, count)
        return Value(types, self._header[begin : self._place], count)

    def _skip(self, kind: int, count: int, depth: int = 0) -> None:
        """Skip `count` values of a type."""
        if kind in FORMS:
            self._take(count * struct.calcsize(f"<{FORMS[kind]}"))
            return
        self._items += count
        if self._items > MOST_ITEMS:
            raise self._refusal(f"{self._items:,} texts and lists, at most {MOST_ITEMS:,} expected")
        if depth > 1:
            raise self._refusal("lists in lists in lists")
        for _ in range(count):
            if kind == STRING:
                self._take(*self._numbers("Q"))
            else:
                self._skip(*self._numbers("IQ"), depth + 1)

    def _dimensions(self, name: str) -> int:
        (count,) = self._numbers("I")
        if not 1 <= count <= 4:
            raise self._refusal(f"{shown(name)} has {count:,} dimensions")
        return count

    def _find(self, listed: dict[str, tuple[int, ...]]) -> None:
        """Map each tensor, given its (dimensions, type, offset); no two may share bytes."""
        import gguf

        alignment = self._alignment()
        begin, reached = -(-self._place // alignment) * alignment, 0
        for name, (*dimensions, kind, offset) in sorted(listed.items(), key=lambda item: item[1][-1]):
            kind = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            numbers = math.prod(dimensions)
            if numbers == 0 or dimensions[0] % block:
                shape = " x ".join(map(str, dimensions))
                raise self._refusal(f"{shown(name)} of {shape} numbers is stored in blocks of {block}")
            size = numbers // block * block_bytes
            if offset < reached or offset % alignment:
                raise self._refusal(f"{shown(name)} begins at byte {offset:,} of the tensors, where it cannot")
            reached = offset + size
            if begin + reached > len(self._file):
                found = f"{shown(name)} reaches to byte {begin + reached:,}, the file has {len(self._file):,}"
                raise self._refusal(f"it is cut off: {found}")
            rows = self._file[begin + offset : begin + reached].reshape(-1, dimensions[0] // block * block_bytes)
            self.tensors[name] = StoredTensor(name, tuple(reversed(dimensions)), kind, rows)

    def _alignment(self) -> int:
        """Tensors begin at multiples of this many bytes."""
        found = self.fields.get("general.alignment")
        if found is None:
            return 32
        alignment = found.contents() if found.types == [UINT32] else 0
        if alignment == 0 or alignment & (alignment - 1):
            raise self._refusal(f"general.alignment is {shown(alignment)}, a power of 2 expected")
        return alignment

    def _new_name(self, known: Container[str]) -> str:
        name = str(self._take(*self._numbers("Q")), "utf-8")
        if name in known:
            raise self._refusal(f"{shown(name)} is there twice")
        return name

    def _numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, count: int) -> memoryview:
        begin, self._place = self._place, self._place + count
        if self._place > len(self._header):
            raise self._refusal(f"it is cut off at byte {len(self._header):,}, within its header")
        return self._header[begin : self._place]

    def _refusal(self, found: str) -> InputError:
        return InputError(f"{self._path}: damaged, or not a GGUF file ({found})")


def is_gguf(path: Path) -> bool:
    """Whether a file's first bytes or its name say that it is GGUF."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


def single_value(fields: Mapping[str, Value], key: str, kind: type):
    """A value of the given Python type; None if the key is missing.

    Raises:
        Refused: it has another type, or is not UTF-8.
    """
    field = fields.get(key)
    if field is None:
        return None
    if len(field.types) != 1 or field.types[0].name not in TYPES[kind]:
        raise Refused(f"{key} is {_named(field)}, {_expected(kind)} expected")
    return _contents(field, key)


def list_of_values(fields: Mapping[str, Value], key: str, kind: type, most: int) -> list:
    """The values of a list, at most `most`; empty if the key is missing.

    Raises:
        Refused: it is no list, has another type or more values, or is not UTF-8.
    """
    field = fields.get(key)
    if field is None or field.count == 0:
        return []
    if len(field.types) != 2 or field.types[0].name != "ARRAY" or field.types[1].name not in TYPES[kind]:
        raise Refused(f"{key} is {_named(field)}, ARRAY of {_expected(kind)} expected")
    if field.count > most:
        raise Refused(f"{key} has {field.count:,} values, at most {most:,} expected")
    return _contents(field, key)


def _named(field: Value) -> str:
    return " of ".join(found.name for found in field.types) or "nothing"


def _expected(kind: type) -> str:
    return " or ".join(sorted(TYPES[kind]))


def _contents(field: Value, key: str):
    try:
        return field.contents()
    except UnicodeDecodeError as error:
        raise Refused(f"{key} is not UTF-8 ({first_line(error)})") from error
