"""TensorBoard's event file: the scalars of metrics.jsonl, written without TensorFlow or tensorboard.

A file is a row of records, each framed as in TFRecord: length (uint64), its CRC, data, the data's CRC, little-endian.
The data is one protobuf message `Event` (tensorflow/core/util/event.proto), of which this writes what scalars need.
"""

import contextlib
import functools
import math
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

EVENT_FILES = "events.out.tfevents.*.mateconv"  # TensorBoard finds them by how their names begin
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types


def event_files(folder: Path) -> list[Path]:
    """The files of a run's sessions, in their order, which is that of their names and that of TensorBoard's reading."""
    return sorted(path for path in folder.glob(EVENT_FILES) if path.name.split(".")[3].isdecimal())


def next_event_file(folder: Path) -> Path:
    """The file of a session that begins now: the Unix time is in its name, or one that is later than all others."""
    seconds = max([int(time.time()), *(int(path.name.split(".")[3]) + 1 for path in event_files(folder))])
    return folder / EVENT_FILES.replace("*", f"{seconds:010}")


def withdraw(files: list[Path]) -> None:
    """Take back the files of earlier sessions: the last one becomes empty, since a TensorBoard that has read it goes on
    to the next only if it is still there; the others are removed."""
    for path in files:
        with contextlib.suppress(OSError):
            os.truncate(path, 0) if path == files[-1] else path.unlink()


class EventEncoder:
    """Turns events, as metrics.jsonl has them, into records.

    Args:
        began: Unix time at which the run began; an event's time is this and its `elapsed`.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self._step, self._names = -1, set()  # the newest step, and what is written of it

    def head(self) -> bytes:
        """The records that a file begins with: its version, and that whatever an earlier file says is void."""
        version = _field(1, FIXED64, self._began) + _field(3, BYTES, b"brain.Event:2")
        start = _field(1, FIXED64, self._began) + _field(2, VARINT, 0) + _field(7, BYTES, _field(1, VARINT, 1))
        return _record(version) + _record(start)

    def record(self, event: Mapping) -> bytes:
        """An event's scalars; those that an earlier event of the same step had, such as `tokens`, come once."""
        if event["step"] != self._step:
            self._step, self._names = event["step"], {"step"}
        scalars = {name: value for name, value in event.items() if value is not None and name not in self._names}
        self._names |= scalars.keys()
        seconds = self._began + _number(event.get("elapsed") or 0.0)
        values = b"".join(_field(1, BYTES, _scalar(name, value)) for name, value in scalars.items())
        return _record(_field(1, FIXED64, seconds) + _field(2, VARINT, event["step"]) + _field(5, BYTES, values))


def _scalar(name: str, value: float) -> bytes:
    """Summary.Value: a tag and a float32."""
    return _tag(name) + _field(2, FIXED32, _number(value))


@functools.cache
def _tag(name: str) -> bytes:
    return _field(1, BYTES, name.encode())


def _number(value: float) -> float:
    """A float64; infinite where a whole number is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _field(number: int, wire_type: int, value) -> bytes:
    """A field of a protobuf message."""
    key = _varint(number << 3 | wire_type)
    if wire_type == VARINT:
        return key + _varint(value)
    if wire_type == BYTES:
        return key + _varint(len(value)) + value
    return key + (struct.pack("<d", value) if wire_type == FIXED64 else _float32(value))


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # a float64 beyond float32's range
        return struct.pack("<f", math.copysign(math.inf, value))


@functools.lru_cache
def _varint(value: int) -> bytes:
    encoded, value = bytearray(), value & 0xFFFFFFFFFFFFFFFF
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecord has it: a CRC over data that holds CRCs is weak."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


_TABLE = _crc_table()
