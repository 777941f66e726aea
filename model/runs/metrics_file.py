"""metrics.jsonl: one JSON object a line, an event each, which holds `step` and numbers."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path


class AppendedFile:
    """A file that a run appends to. Nothing here raises: what the system refuses is reported once, and kept until it
    can be written.

    Args:
        path: of the file.
        find_end: returns how many bytes of it count; called once, when the system allows it.
        say: prints one line for the user.
        unit: what is appended, in the plural.
    """

    def __init__(self, path: Path, find_end: Callable[[], int], say: Callable[[str], None], unit: str = "lines"):
        self.path, self._find_end, self._say, self._unit = path, find_end, say, unit
        self._end: int | None = None  # bytes of the file that count; None: unknown yet
        self._pending: list[bytes] = []  # what is not in the file yet
        self._refused = False  # whether the last attempt failed, and was reported

    def append(self, *pieces: bytes) -> None:
        """Write these and all that is pending, or none of it if the system refuses a part."""
        self._pending += pieces
        try:
            if self._end is None:
                self._end = self._find_end()
            if self._pending or self.path.exists():
                self._end = append_lines(self.path, self._end, b"".join(self._pending))
        except OSError as error:
            if not self._refused:
                reason = error.strerror or str(error)
                self._say(
                    f"{self.path}: cannot be written ({reason}); training continues, and its {self._unit} are kept for"
                    " later"
                )
            self._refused = True
            return
        if self._refused:
            self._say(f"{self.path}: can be written again; the {len(self._pending)} {self._unit} kept so far are in it")
        self._refused = False
        self._pending.clear()

    def close(self) -> None:
        """Try a last time to write what is pending."""
        if self._pending:
            self.append()
        if self._pending:
            self._say(f"{self.path}: still cannot be written; its last {len(self._pending)} {self._unit} are lost")


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
