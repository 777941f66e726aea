"""Parses a line of JSONL into a text, or the reason to reject it."""

import base64
import contextlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

try:
    import orjson  # optional: the same texts, in half of the time
except ImportError:
    orjson = None


def load_json(raw: bytes | str):
    """The value of a line that was parsed before, by whichever library takes it: orjson nests deeper than json.

    Raises:
        ValueError, RecursionError: neither takes it.
    """
    if orjson is not None:
        with contextlib.suppress(ValueError):
            return orjson.loads(raw)
    return json.loads(raw)


def parse_line(raw: bytes, text_field: str = "text", escapes: bool = True) -> tuple[str | None, str | None]:
    """(text, None) for a good line, (None, a key of REASONS) for a bad one. White space around the text is cut off.

    `escapes`: whether the line may hold \\u escapes; see `holds_escapes`.
    """
    (text,), reasons = parse_lines([raw], text_field, escapes)
    return text, reasons.get(0)


def parse_lines(
    lines: Sequence[bytes], text_field: str, escapes: bool = True
) -> tuple[list[str | None], dict[int, str]]:
    """`parse_line` of each: the texts, None for a bad line, and the reasons by the bad lines' indices."""
    texts, reasons = [], {}
    for index, raw in enumerate(lines):
        text = None
        if orjson is not None:
            try:
                text = orjson.loads(raw)[text_field].strip()  # it takes no lone surrogates
            except (ValueError, LookupError, TypeError, AttributeError):
                pass
        if not text:  # json says why; it also takes what orjson doesn't
            text, reason = _parse_with_json(raw, text_field, escapes)
            if text is None:
                reasons[index] = reason
        texts.append(text)
    return texts, reasons


def parse_object(raw: bytes) -> tuple[dict | None, str | None]:
    """(object, None) of a line of JSONL, (None, a key of REASONS) for one that holds none; by the `json` library."""
    try:
        content = str(raw, "utf-8")
    except UnicodeDecodeError:
        return None, "bad_utf8"
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
        return None, "bad_json" if content.strip() else "empty"
    return (value, None) if isinstance(value, dict) else (None, "not_an_object")


def _parse_with_json(raw: bytes, text_field: str, escapes: bool) -> tuple[str | None, str | None]:
    value, reason = parse_object(raw)
    if value is None:
        return None, reason
    text = value.get(text_field)
    if not isinstance(text, str):
        return None, "no_text"
    text = text.strip()
    if not text:
        return None, "empty"
    if escapes:  # only an escape can make a lone surrogate, which is JSON, but no text
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None, "bad_utf8"
    return text, None


def holds_escapes(raw: bytes) -> bool:
    """Whether \\u stands anywhere in these bytes; five times as fast as `in`."""
    content = np.frombuffer(raw, dtype=np.uint8)
    for start in range(0, len(content), 1 << 17):  # a block stays in the cache
        block = content[start : start + (1 << 17) + 1]
        after = np.flatnonzero(block[:-1] == ord("\\")) + 1
        if (block[after] == ord("u")).any():
            return True
    return False


def reject_line(where: dict, reason: str, raw: bytes | None) -> str:
    """The line of the rejects file, ending in a newline: where the line was, why it was rejected, what it held.

    A raw line that is not UTF-8 is kept as base64, so that every byte of it is there.
    """
    record = {**where, "reason": reason}
    if raw is not None:
        try:
            record["raw"] = str(raw, "utf-8")
        except UnicodeDecodeError:
            record["raw_base64"] = base64.b64encode(raw).decode("ascii")
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_rejects(path: Path, reason: str, most: int) -> list[tuple[dict, bytes]]:
    """The first `most` lines that a rejects file names for this reason: (where the line was, what it held)."""
    with open(path, encoding="utf-8") as file:
        records = (record for line in file if (record := json.loads(line))["reason"] == reason)
        return [
            (record, base64.b64decode(record["raw_base64"]) if "raw_base64" in record else record["raw"].encode())
            for record in islice(records, most)
        ]
