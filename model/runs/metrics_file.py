"""metrics.jsonl: one JSON object a line, an event each, which holds `step` and numbers."""

import contextlib
import json
from pathlib import Path


def end_of_step(path: Path, step: int) -> int:
    """Bytes of a metrics.jsonl that hold the events up to `step`; 0 without a file."""
    end = position = 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            position += len(line)
            event = parse_event(line)
            if event is not None and event["step"] > step:
                break
            if event is not None and line.endswith(b"\n"):  # half a line, or the zeros after a power cut, are no event
                end = position
    return end


def append_lines(path: Path, end: int, lines: bytes) -> int:
    """Append to the first `end` bytes of a file, dropping what follows them; returns how many bytes count now.

    Raises:
        OSError: the system refuses it; nothing half-written stays.
    """
    with open(path, "ab", buffering=0) as file:  # without a buffer, which would write its rest at closing
        size = file.tell()
        if size > end:
            file.truncate(end)
        end = min(size, end)
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    return end + len(lines)


def parse_event(line: bytes) -> dict | None:
    """The event in a line of metrics.jsonl; None for any other line, such as a last one that a crash cut short."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and type(event.get("step")) is int and all(map(_is_number, event.values()))
    return event if is_event else None


def read_metrics(path: Path) -> list[dict]:
    """The events of a metrics.jsonl."""
    return [event for line in path.read_bytes().split(b"\n") if (event := parse_event(line)) is not None]


def _is_number(value) -> bool:
    return value is None or type(value) in (int, float)
