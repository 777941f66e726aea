"""GGUF as its description has it (ggml's docs/gguf.md), with nothing checked: for files that no library would write.

It shares no line with the library `gguf` or with `model/`.
"""

import struct

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10  # types of values
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, F16, Q8_0 = 0, 1, 8  # types of tensors


class Raw:
    """The parts of a file, to be changed and put together again.

    Attributes:
        values: {key: (type, bytes)}, the bytes as they stand in the file.
        tensors: {name: (dimensions, type, bytes)}, the fastest dimension first.
        version, alignment, order: of the header; "<" for little-endian.
        counts: (tensors, values) as the header says; None: as many as there are.
        offsets: {name: offset}, where it is to be another than the tensor's place.
    """

    def __init__(self) -> None:
        self.values, self.tensors, self.offsets = {}, {}, {}
        self.version, self.alignment, self.order, self.counts = 3, 32, "<", None

    def set(self, key: str, kind: int, value) -> None:
        """A number or a text."""
        self.values[key] = kind, text(value) if kind == STRING else struct.pack(f"<{FORMS[kind]}", value)

    def set_list(self, key: str, kind: int, items) -> None:
        """An array of numbers or texts."""
        packed = b"".join(text(item) if kind == STRING else struct.pack(f"<{FORMS[kind]}", item) for item in items)
        self.values[key] = ARRAY, struct.pack("<IQ", kind, len(items)) + packed

    def number(self, key: str):
        kind, content = self.values[key]
        return struct.unpack(f"<{FORMS[kind]}", content)[0]

    def header(self) -> bytes:
        """All before the tensors' bytes."""
        counts = (len(self.tensors), len(self.values)) if self.counts is None else self.counts
        out = b"GGUF" + struct.pack(f"{self.order}IQQ", self.version, *counts)
        out += b"".join(text(key) + struct.pack("<I", kind) + content for key, (kind, content) in self.values.items())
        place = 0
        for name, (dimensions, kind, content) in self.tensors.items():
            out += text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
            out += struct.pack("<IQ", kind, self.offsets.get(name, place))
            place += self.padded(content)
        return out + bytes(-len(out) % self.alignment)

    def padded(self, content: bytes) -> int:
        return len(content) + -len(content) % self.alignment

    def __bytes__(self) -> bytes:
        contents = [content for _, _, content in self.tensors.values()]
        return self.header() + b"".join(content.ljust(self.padded(content), b"\0") for content in contents)


def text(value: str | bytes) -> bytes:
    """A string with its length before it."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def read(content: bytes) -> Raw:
    """The parts of a whole file of F32, F16 and Q8_0."""
    raw, place = Raw(), 4

    def take(form: str):
        nonlocal place
        found = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return found if len(found) > 1 else found[0]

    def take_text() -> str:
        nonlocal place
        length = take("Q")
        place += length
        return content[place - length : place].decode()

    def skip(kind: int) -> None:
        nonlocal place
        if kind == STRING:
            take_text()
        elif kind == ARRAY:
            inner, count = take("IQ")
            for _ in range(count):
                skip(inner)
        else:
            take(FORMS[kind])

    raw.version, tensors, values = take("IQQ")
    for _ in range(values):
        key, kind = take_text(), take("I")
        begin = place
        skip(kind)
        raw.values[key] = kind, content[begin:place]
    listed = []
    for _ in range(tensors):
        name, count = take_text(), take("I")
        dimensions = struct.unpack_from(f"<{count}Q", content, place)
        place += 8 * count
        listed.append((name, dimensions, *take("IQ")))
    begin = place + -place % raw.alignment
    for name, dimensions, kind, offset in listed:
        numbers = 1
        for dimension in dimensions:
            numbers *= dimension
        size = {F32: 4 * numbers, F16: 2 * numbers, Q8_0: numbers // 32 * 34}[kind]
        raw.tensors[name] = dimensions, kind, content[begin + offset : begin + offset + size]
    return raw
