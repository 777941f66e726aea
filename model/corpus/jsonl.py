"""One line of JSONL: a text, or the reason why it is none."""

import base64
import json

# Why a line is not a document, in the order in which the checks are made.
REASONS = {
    "bad_utf8": "not UTF-8, or a text with a lone surrogate, which UTF-8 cannot hold",
    "bad_json": "not JSON",
    "not_an_object": "JSON, but not an object",
    "no_text": "an object without the text field, or whose text is not a string",
    "empty": "an empty line, or a text of nothing but white space",
    "oversized": "a line longer than 64 MiB, which would not fit the bounded memory",
}

JSON_SPACE = " \t\r\n"
_scan = json.JSONDecoder().scan_once  # the value that begins at a place, and where it ends; json.loads without its calls


def parse_line(raw: bytes, text_field: str = "text") -> tuple[str | None, str | None]:
    """(text, None) for a good line, (None, reason) for a bad one. White space around the text is cut off."""
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None, "bad_utf8"
    try:
        value, end = _scan(content, 0)
        if end != len(content) and content[end:].strip(JSON_SPACE):
            return None, "bad_json"
    except (StopIteration, ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
        trimmed = content.lstrip(JSON_SPACE)
        if trimmed and trimmed != content:
            return parse_line(trimmed.encode("utf-8"), text_field)
        return None, "bad_json" if trimmed.strip() else "empty"
    if not isinstance(value, dict):
        return None, "not_an_object"
    text = value.get(text_field)
    if not isinstance(text, str):
        return None, "no_text"
    text = text.strip()
    if not text:
        return None, "empty"
    if b"\\u" in raw:  # only an escape can make a lone surrogate, which is JSON, but no text
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None, "bad_utf8"
    return text, None


def reject_line(where: dict, reason: str, raw: bytes | None) -> str:
    """The line of the rejects file, ending in a newline: where the line was, why it was rejected, what it held.

    A raw line that is not UTF-8 is kept as base64, so that every byte of it can be had back.
    """
    record = {**where, "reason": reason}
    if raw is not None:
        try:
            record["raw"] = raw.decode("utf-8")
        except UnicodeDecodeError:
            record["raw_base64"] = base64.b64encode(raw).decode("ascii")
    return json.dumps(record, ensure_ascii=False) + "\n"
