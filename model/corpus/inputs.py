"""The files that `inference.py` reads whole: texts to score, chats to judge by, prompts."""

import codecs
from collections import Counter
from pathlib import Path

from model.command import say
from model.corpus.chats import as_messages, parse_chat
from model.corpus.inspection import counts_text
from model.corpus.jsonl import load_json, parse_line
from model.corpus.reasons import REASONS
from model.errors import InputError, counted

SHOWN = 5  # lines that were skipped, named one by one


def read_utf8(flag: str, path: Path) -> str:
    """A text file's content.

    Raises:
        InputError: no such file, or not UTF-8; the message names the flag.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{flag}: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{flag}: {path} is not UTF-8 (line {line}); save it as UTF-8") from error


def read_texts(path: Path) -> list[str]:
    """The texts to score: those of a JSONL, or any other file as one.

    Lines of a JSONL that hold no text are skipped, named and counted.

    Raises:
        InputError: the file cannot be read, or it holds no text.
    """
    if path.suffix != ".jsonl":
        texts, skipped = [read_utf8("score_file", path)], 0
    else:
        texts, skipped = _texts_of_lines(path)
    if skipped and not texts:
        raise InputError(f'score_file: none of {counted(skipped, "line")} of {path} is a {{"text": ...}}')
    if not any(texts):
        raise InputError(f"score_file: {path} holds no text")
    return texts


def _texts_of_lines(path: Path) -> tuple[list[str], int]:
    """The texts of a JSONL, and how many lines hold none, blank ones not counted."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise InputError(f"score_file: {path} cannot be read ({error.strerror})") from error
    texts, rejected = [], Counter()
    for number, line in enumerate(lines, 1):
        _, reason = parse_line(line)
        if reason in (None, "empty"):
            if str(line, "utf-8").strip():
                texts.append(load_json(line)["text"])  # with the white space around it, unlike parse_line's
            continue
        rejected[reason] += 1
        if rejected.total() <= SHOWN:
            say(f"score_file: line {number} of {path} is skipped: {reason} ({REASONS[reason]})")
    if rejected:
        count = len(texts) + rejected.total()
        say(f"score_file: {rejected.total():,} of {counted(count, 'line')} skipped: {counts_text(rejected)}")
    return texts, rejected.total()


def read_questions(path: Path) -> list[tuple[list[dict[str, str]], str, str]]:
    """The history, the expected last answer and the group (the key `source`, if any) of each chat in a JSONL.

    Raises:
        InputError: the file cannot be read, or a line is no usable chat.
    """
    questions = []
    for number, line in enumerate(read_utf8("judge", path).split("\n"), 1):
        if line.strip():
            chat, reason = parse_chat(line.encode())
            if chat is None:
                raise InputError(f"judge: line {number} of {path} is no chat to judge by: {REASONS[reason]}")
            group = load_json(line).get("source", "")
            messages = as_messages(chat)["messages"]
            questions.append((messages[:-1], messages[-1]["content"], group if isinstance(group, str) else ""))
    if not questions:
        raise InputError(f"judge: {path} holds no chat")
    return questions


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """Line number and text of each line that is not blank.

    Raises:
        InputError: no such file, not UTF-8, or no prompt inside.
    """
    text = read_utf8("batch_file", path)
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
    prompts = [(number, line) for number, line in lines if line.strip()]
    if not prompts:
        raise InputError(f"batch_file: {path} holds no prompt; write one per line")
    return prompts
