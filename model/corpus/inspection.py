"""Recognises a file by its first bytes, and explains why one yields no document."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.corpus.chats import MESSAGE_KEYS, form_of
from model.corpus.pairs import is_pair
from model.corpus.reasons import REASONS, TEXT_REASONS
from model.errors import command_line, shown

BOM = b"\xef\xbb\xbf"
PACKINGS = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\x00", "bz2": b"BZh"}
PARQUET = b"PAR1"
UNREADABLE = {  # first bytes: what the file is and what to do
    b"PK\x03\x04": "a zip archive (or an office document); unpack it first: python -m zipfile -e {} FOLDER",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!\x1a\x07": "a RAR archive; unpack it first",
    b"%PDF": "a PDF; save its text as .txt first",
    b"\xd0\xcf\x11\xe0": "an office document; save its text as .txt first",
}
TAR = "a tar archive; unpack it first: python -m tarfile -e {} FOLDER"
TAR_ENDINGS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
TABLES = (".csv", ".tsv")
ENCODINGS = {"gb18030": (0xB0, 0xD7), "big5": (0xA4, 0xC6)}  # lead bytes of common characters
LIKELY_SHARE, FEWEST_CHARACTERS = 0.5, 4  # common characters needed to recognise an encoding
EXAMPLES = 20  # rejected lines inspected to explain why
MOST_KEYS = 8  # in a message
TEXT_FIELD = "optimized_data_processing.py --text_field"  # which train.py, that makes token files too, lacks
READ_AS = {  # format: what a line must be, and what one looks like
    "text": ("a document", f'one {{{{"{{text_field}}": "..."}}}} a line ({TEXT_FIELD} names the key)'),
    "chat": (
        "a usable chat",
        'one chat a line, such as {{"messages": [{{"role": "user", "content": "..."}}, ...]}}',
    ),
    "pairs": (
        "a usable pair of answers",
        'one pair a line, such as {{"prompt": "...", "chosen": "...", "rejected": "..."}}',
    ),
}
# Keys that other programs give to a question and its answer.
QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "input")
REPLIES = ("output", "answer", "response", "completion", "target", "reply")


def unreadable(name: str, head: bytes) -> str | None:
    """Describe a file that cannot hold lines of text, and what to do with it; None if it may hold some.

    Args:
        name: its path.
        head: its first bytes, unpacked.
    """
    is_known = head.startswith(tuple(UNREADABLE))  # few are
    found = next(text for magic, text in UNREADABLE.items() if head.startswith(magic)) if is_known else None
    if head[257:262] == b"ustar" or name.lower().endswith(TAR_ENDINGS):
        found = TAR
    elif not found and name.lower().endswith(TABLES):
        found = "a table; read it with --input_path datasets:csv?data_files={}"
    return found and found.format(command_line(name))


def packing_of(name: str, head: bytes) -> str:
    """A file's compression, by its ending or else its first bytes; "" if it has none."""
    ending = name.lower().rpartition(".")[2]
    if ending in PACKINGS:
        return ending
    is_packed = head.startswith(tuple(PACKINGS.values()))  # few are
    return next(packing for packing, magic in PACKINGS.items() if head.startswith(magic)) if is_packed else ""


def is_array(head: bytes) -> bool:
    """Whether a text begins as a JSON array of objects, as opposed to JSONL whose first line is damaged or a list."""
    head = head.removeprefix(BOM).lstrip()
    if not re.match(rb"\[\s*[{\]]", head):
        return False
    first, newline, rest = head.partition(b"\n")
    first, rest = first.rstrip(), rest.lstrip()
    following = (b",", b"]", b"", b"[") if first.endswith(b"]") else (b",", b"]", b"")  # or another array follows
    return not newline or first.endswith((b"[", b"{", b",")) or rest[:1] in following


def holds_documents(head: bytes, text_field: str) -> bool:
    """Whether a .json file is JSONL or an array of objects with a text or a chat, rather than one object about
    something."""
    first = head.removeprefix(BOM).lstrip().partition(b"\n")[0].strip()
    values = rb'"%b"\s*:\s*"|"(?:%b)"\s*:\s*\[|"(?:instruction|prompt|q)"\s*:'
    named = values % (re.escape(text_field.encode()), "|".join(MESSAGE_KEYS).encode())
    return first != b"{" and re.match(rb"\[?\s*\{.*?(?:%b)" % named, head.removeprefix(BOM).lstrip(), re.S) is not None


def has_only_carriage_returns(head: bytes) -> bool:
    """Whether JSONL has bare CR line ends, as on classic Mac OS."""
    first, _, rest = head.removeprefix(BOM).strip().partition(b"\r")
    return bool(rest) and b"\n" not in head and _parsed(first) is not None


def encoding_of(text: bytes) -> str | None:
    """The encoding of a text that is not UTF-8: "utf-16", "gb18030" or "big5"; None for UTF-8 or unknown."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if text.count(0) > len(text) // 4 and text.strip(b"\0 \r\n"):
        return "utf-16-le" if text[1:2] == b"\0" else "utf-16-be"
    if _decodes(text, "utf-8"):
        return None
    as_utf8 = re.sub(r"[\x00-\x7f]", "", text.decode("utf-8", "replace"))
    if as_utf8.count("\ufffd") < len(as_utf8) / 2:
        return None  # UTF-8 with some damage
    likely = {name: _common_share(text, *leads) for name, leads in ENCODINGS.items() if _decodes(text, name)}
    best = max(likely, key=likely.get, default=None)
    return best if best and likely[best] >= LIKELY_SHARE else None


def _decodes(text: bytes, encoding: str) -> bool:
    """Whether this is the start of a text in an encoding; its last character may be cut."""
    try:
        text.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start > 0 and error.start >= len(text) - 3
    return True


def _common_share(text: bytes, lowest: int, highest: int) -> float:
    """The share of two-byte characters whose first byte lies in a range; 0 of a few, which say nothing."""
    leads = [pair[0] for pair in re.findall(rb"[\x81-\xfe][\x40-\xfe]", text)]
    return sum(lowest <= lead <= highest for lead in leads) / len(leads) if len(leads) >= FEWEST_CHARACTERS else 0.0


def how_to_convert(path: str | Path, encoding: str) -> str:
    """A command that turns a file into UTF-8."""
    target = Path(path).with_name(f"utf8_{Path(path).name}")
    code = (
        f'import shutil, sys; shutil.copyfileobj(open(sys.argv[1], encoding="{encoding}", newline=""), '
        'open(sys.argv[2], "w", encoding="utf-8", newline=""))'
    )
    return command_line("python", "-c", code, path, target)


def describe_encoding(path: str | Path, encoding: str) -> str:
    """'is GB18030, UTF-8 expected; convert it: …'."""
    plain = str(path)[: -len(packing) - 1] if (packing := packing_of(str(path), b"")) else path
    first = f"unpack it to {command_line(plain)} and " if packing else ""
    return f"is {encoding.upper()}, UTF-8 expected; {first}convert it: {how_to_convert(plain, encoding)}"


def counts_text(counts: Mapping[str, int]) -> str:
    """'bad_json 3, empty 1'."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def nothing_read(sources: str, rejected: Mapping[str, int], seen: str, format: str, text_field: str) -> str:
    """Explain that every line was rejected: the reasons, what was expected, and what the lines hold.

    Args:
        seen: as `describe_lines` returned it.
        format: a key of READ_AS.
    """
    reasons, count = counts_text(dict(sorted(rejected.items()))), sum(rejected.values())
    what, example = READ_AS[format]
    found = f"none of {count:,} lines is {what}" if count > 1 else f"its only line is not {what}"
    most = max(rejected, key=rejected.get)
    expected = f"expected {example.format(text_field=text_field)}"
    why = f"{most}: {REASONS[most]}" if most in TEXT_REASONS else expected  # other lines would not help
    return f"{sources}: {found} ({reasons}); {why}{seen}"


def describe_lines(lines: Sequence[bytes], reason: str, format: str, text_field: str, path: str | Path) -> str:
    """Describe what rejected lines hold and what to do about it: '; ' and a clause, or ''.

    Args:
        lines: examples that were rejected for `reason`.
        format: as which they were read, a key of READ_AS.
        path: the file they come from.
    """
    encoding = encoding_of(b"\n".join(lines)) if reason in ("bad_utf8", "bad_json") else None
    if encoding:
        clause = f"the text {describe_encoding(path, encoding)}"
    elif format != "pairs" and (pairs := [value for value in map(_parsed, lines) if _is_pair(value)]):
        clause = f"these are pairs of answers (keys {_listed(pairs)}): --format pairs reads them"
    elif reason in ("bad_json", "not_an_object", "no_text", "no_chat", "no_pair"):
        clause = _describe(lines, text_field if format == "text" else None)
    else:
        clause = ""
    return f"; {clause}" if clause else ""


def _describe(lines: Sequence[bytes], text_field: str | None) -> str:
    values = [value for line in lines if (value := _parsed(line)) is not None]
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        return _describe_objects(objects, text_field)
    if values:
        return _describe_values(values, text_field)
    lines = [line.removeprefix(BOM).strip() for line in lines]
    lines = [line for line in lines if line] or [b""]
    if any(lines) and not any(line.strip(b"\0") for line in lines):
        return "they are NUL bytes, which a crash or a full disk leaves; fetch the file again"
    start, following = lines[0], lines[1] if len(lines) > 1 else b""
    if re.match(rb"\{\s*'", start + following):
        return "the lines are Python's notation, not JSON: strings need double quotes, as json.dumps writes them"
    if start.endswith(b",") and isinstance(_parsed(start[:-1]), dict):
        return "each line ends in a comma, as in an array without its brackets; remove the commas, or add [ and ]"
    if start == b"[" and following.startswith(b'"'):
        return _describe_values([[""]], text_field)
    if start[:1] in (b"{", b"["):
        error, at = _json_error(start)
        if at == len(start) and following and not following.startswith(start[:1]):
            return "each object must stand on one line, as `jq -c .` writes it"
        return f"the JSON of such a line is damaged at byte {at + 1:,}: {error}"
    if start.startswith(b"<"):
        return "it looks like HTML or XML"
    return "it looks like plain text; a file named .txt is read as text" if start else ""


def _describe_values(values: Sequence, text_field: str | None) -> str:
    """What lines hold that are JSON, but not objects."""
    kinds = sorted({{list: "arrays", str: "strings"}.get(type(value), "numbers") for value in values})
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    said = f"the lines are JSON {' and '.join(kinds)}, not objects"
    if len(kinds) > 1 or not items or not all(isinstance(item, str) for item in items):
        return said
    each = ".[] | " if kinds == ["arrays"] else ""
    key = json.dumps(text_field or "text")
    return f"{said}; make each string a document: {_jq(f'{each}{{{key}: .}}')}"


def _jq(program: str) -> str:
    return f"{command_line('jq', '-c', program)} FILE"


def _describe_objects(objects: Sequence[dict], text_field: str | None) -> str:
    keys = list(dict.fromkeys(key for value in objects for key in value))
    if text_field in keys:
        found = next(value[text_field] for value in objects if text_field in value)
        return f"the value of {text_field} is {shown(found)}, a string expected"
    listed = _listed(objects)
    if any(map(form_of, objects)):
        return f"these are chats (keys {listed}): --format chat reads them"
    if {"role", "content"} <= {*keys} or {"from", "value"} <= {*keys}:
        return 'each object is a single message; write the messages of a chat on one line: {"messages": [...]}'
    if clause := _describe_messages(objects):
        return clause
    for key, found in ((key, found) for value in objects for key, found in value.items()):
        if isinstance(found, list) and any(isinstance(item, dict) and text_field in item for item in found):
            return f"the documents are in the list {shown(key)[1:-1]}; take them out: {_jq(_jq_key(key) + '[]')}"
    asked, answered = (next(filter(keys.__contains__, names), None) for names in (QUESTIONS, REPLIES))
    if asked and answered:
        program = f"{{prompt: .{asked}, completion: .{answered}}}"
        return f"the keys found: {listed}; if they are questions and answers, make chats of them: {_jq(program)}"
    strings = {key: len(value) for item in reversed(objects) for key, value in item.items() if isinstance(value, str)}
    if text_field is None:
        strings = {}
    advice = f"; perhaps {TEXT_FIELD} {command_line(max(strings, key=strings.get))}" if strings else ""
    return f"the keys found: {listed}{advice}"


def _listed(objects: Sequence[dict]) -> str:
    """The keys of objects: 'prompt, chosen, rejected'."""
    keys = list(dict.fromkeys(key for value in objects for key in value))
    return ", ".join([shown(key)[1:-1] for key in keys[:MOST_KEYS]] + ["…"] * (len(keys) > MOST_KEYS)) or "no keys"


def _is_pair(value) -> bool:
    return isinstance(value, dict) and is_pair(value)


def _describe_messages(objects: Sequence[dict]) -> str:
    """What stands where the messages of a chat should; '' where no object has a key for them."""
    found = next(((key, value[key]) for value in objects for key in MESSAGE_KEYS if key in value), None)
    if found is None:
        return ""
    key, value = found
    said = f"the value of {key} is {shown(value)}, a list of messages expected"
    if isinstance(value, str) and isinstance(_parsed(value.encode("utf-8", "replace")), list):
        said += f"; it is JSON within a string, which this unpacks: {_jq(f'.{key} |= fromjson')}"
    return said


def _jq_key(key: str) -> str:
    return f".{key}" if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key) else f".[{json.dumps(key)}]"


def _json_error(line: bytes) -> tuple[str, int]:
    """Why a line is not JSON, and at which of its bytes, from 0."""
    try:
        json.loads(text := line.decode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        return error.msg, len(text[: error.pos].encode())
    except RecursionError:
        return "nested too deep", 0
    except ValueError:
        return "a number of thousands of digits", 0
    return "not UTF-8", 0


def _parsed(line: bytes):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
