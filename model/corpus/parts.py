"""The parts of a source: groups of lines that depend only on the source and `part_bytes`.

Part k is the lines whose first byte lies in [k * part_bytes, (k + 1) * part_bytes) of the source's text as JSONL. So
each part can be remade alone, and any process can read any part of a plain file directly. Lines end with the byte
`\\n`; a carriage return between two objects also separates them, since no valid line of JSON holds one there.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from model.corpus.inspection import BOM
from model.corpus.opening import Source, naming_damage, open_source

MAX_LINE_BYTES = 64 << 20
KEPT_OF_OVERSIZED = 4096  # bytes of an oversized line that the rejects file keeps, beside its offset


@dataclass(frozen=True)
class Block:
    """The lines of one part."""

    offset: int  # of the first line in the source's text, bytes
    raw: bytes  # the lines with their ends; of an oversized line, which can only be the last, the first bytes
    size: int  # bytes in the source
    sha256: str  # of the bytes in the source
    oversized: bool = False


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
    with open_source(source, text_field) as file, naming_damage(source.location):
        disk, position = getattr(file, "disk", None), 0
        while True:
            index = position // part_bytes
            block = _read_block(file, position, (index + 1) * part_bytes)
            if block is None:
                return
            yield index, block, disk.tell() if disk else 0
            position += block.size


def _read_block(file: BinaryIO, position: int, end: int) -> Block | None:
    """The lines that begin before `end`; the file stands at `position`, a line's start. Holds a block and a line."""
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
    if b"\r" in raw:  # files with different line ends were joined
        raw = raw.replace(b"}\r{", b"}\n{")
    return Block(position, raw, size, digest.hexdigest(), oversized)


def lines_of(block: Block) -> list[bytes]:
    """The block's lines without their ends and without byte-order marks, which concatenated files may have before any
    line."""
    lines = block.raw.split(b"\n")
    if lines[-1] in (b"", BOM):
        lines.pop()
    return [line.removeprefix(BOM) for line in lines] if BOM in block.raw else lines


def line_offsets(block: Block) -> list[int]:
    """Where each of `lines_of(block)` begins in the source's text, bytes."""
    raw = block.raw
    ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == ord("\n")) + 1
    starts = [0, *ends.tolist()] if raw else []
    if starts and raw[starts[-1] :] in (b"", BOM):
        starts.pop()
    return [block.offset + start + len(BOM) * raw.startswith(BOM, start) for start in starts]
