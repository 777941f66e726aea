"""Reading JSONL line by line: every line becomes a text or a reason why it did not, and nothing stops the reading.

Lines are split at the byte `\\n` and decoded one by one, so that a bad byte costs its line and not the file.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError

# Why a line is not a document, in the order in which the checks are made.
REASONS = {
    "bad_utf8": "not UTF-8, or a text with a lone surrogate, which UTF-8 cannot hold",
    "bad_json": "not JSON",
    "not_an_object": "JSON, but not an object",
    "no_text": "an object without the text field, or whose text is not a string",
    "empty": "an empty line, or a text of nothing but white space",
    "too_long": "a line longer than 64 MiB, which would not fit the bounded memory",
    "duplicate": "exactly the text of an earlier line",
}
MAX_LINE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"
KEPT_OF_TOO_LONG = 4096  # bytes of a too long line that its reject keeps; its offset says where the rest is


@dataclass(slots=True)
class Line:
    """One input line: `text` is set, or `reason` is (a key of REASONS)."""

    number: int  # from 1
    offset: int  # of its first byte in the (uncompressed) input
    end: int  # the offset of the next line
    raw: bytes  # with its line ending
    text: str | None
    reason: str | None
    duplicate_of: int | None = None  # the line number of the first such text

    def reject(self) -> str:
        """The line of the rejects file, ending in a newline: where it was, why, and what it held."""
        record = {"line": self.number, "offset": self.offset, "reason": self.reason}
        if self.duplicate_of is not None:
            record["duplicate_of"] = self.duplicate_of
        raw = self.raw.rstrip(b"\n")
        try:
            record["raw"] = raw.decode("utf-8")
        except UnicodeDecodeError:
            record["raw_base64"] = base64.b64encode(raw).decode("ascii")
        return json.dumps(record, ensure_ascii=False) + "\n"


def parse_line(raw: bytes, text_field: str = "text") -> tuple[str | None, str | None]:
    """(text, None) for a good line, (None, reason) for a bad one. White space around the text is cut off."""
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None, "bad_utf8"
    if not content.strip():
        return None, "empty"
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
        return None, "bad_json"
    if not isinstance(value, dict):
        return None, "not_an_object"
    text = value.get(text_field)
    if not isinstance(text, str):
        return None, "no_text"
    text = text.strip()
    if not text:
        return None, "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is JSON, but no text
        return None, "bad_utf8"
    return text, None


def open_jsonl(path: str | Path) -> BinaryIO:
    """Open a .jsonl or .jsonl.gz file for reading bytes.

    Raises:
        InputError: there is no such file, it is empty, or it is UTF-16.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'input_path: no file {path}; expected JSONL, one {{"text": ...}} object a line')
    if path.stat().st_size == 0:
        raise InputError(f'input_path: {path} is empty; expected JSONL, one {{"text": ...}} object a line')
    file = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb", buffering=1 << 20)
    try:
        start = file.read(2)
        file.seek(0)
    except (OSError, EOFError, zlib.error) as error:
        file.close()
        raise InputError(f"input_path: {path} cannot be read ({error})") from error
    if start in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise InputError(f"input_path: {path} is UTF-16; save it as UTF-8 first")
    return file


def bytes_read(file: BinaryIO) -> int:
    """How far the reading is in the file as it lies on disk: of a .gz, in compressed bytes."""
    return file.fileobj.tell() if isinstance(file, gzip.GzipFile) else file.tell()


def read_lines(
    file: BinaryIO, text_field: str = "text", offset: int = 0, lines: int = 0, digest=None
) -> Iterator[Line]:
    """Read lines from byte `offset`, where the file stands, after `lines` lines.

    `digest` (of hashlib) is fed with every byte up to the line that was given last. Memory: one line, at most
    MAX_LINE_BYTES.

    Raises:
        InputError: a compressed file is cut off or damaged.
    """
    feed = digest.update if digest else lambda content: None
    try:
        while raw := file.readline(MAX_LINE_BYTES):
            lines += 1
            start, size = offset, len(raw)
            feed(raw)
            if size == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                while rest := file.readline(1 << 20):
                    feed(rest)
                    size += len(rest)
                    if rest.endswith(b"\n"):
                        break
                raw, text, reason = raw[:KEPT_OF_TOO_LONG], None, "too_long"
            else:
                text, reason = parse_line(raw.removeprefix(BOM) if start == 0 else raw, text_field)
            offset += size
            yield Line(lines, start, offset, raw, text, reason)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"the input is damaged after byte {offset} of its text ({error}); unpack it again") from error
