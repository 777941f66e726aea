"""Exceptions with a message for the user: the scripts print it as one line, without a traceback, and exit."""

import os
import re
import shlex
import subprocess
import traceback

MOST_CHARACTERS = 60  # of a value that is wrong, in a message
MOST_OF_WORD = 300  # of a word without spaces, such as a path
MOST_OF_MESSAGE = 4000  # characters of a whole message: all wrong settings of a file are one
# What a terminal obeys instead of showing: control characters (C0, DEL, C1), marks that reorder text (Unicode's
# Bidi_Control), line and paragraph separators, annotation marks, and halves of characters, which cannot be encoded.
_OBEYED = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff"
_IN_TEXT, _IN_MESSAGE = re.compile(f"[{_OBEYED}]"), re.compile(f"[{_OBEYED}\t\n]")
_LONG_WORD = re.compile(rf"\S{{{MOST_OF_WORD + 1},}}")


class OneLineError(Exception):
    """What a script says before it ends: what was found, what was expected and what to do.

    Several things that are wrong, each an argument, make a line each.
    """

    exit_code: int

    def __str__(self) -> str:
        return "\n       ".join(map(str, self.args))


class InputError(OneLineError):
    """What the user gave cannot be used, or a file cannot be read or written: a setting, a file, a prompt, a disk."""

    exit_code = 2


class TrainingDiverged(OneLineError):
    """Loss or gradient were not finite, or the loss spiked, too often; the weights are those of the last good step."""

    exit_code = 1


class ProcessLost(OneLineError):
    """Another process of the same job failed, or no longer answers: the message names it. Starting again helps."""

    exit_code = 3


class NodesMissing(ProcessLost):
    """The other machines of a job did not come, or the one where they meet is gone. Starting again waits for them."""

    exit_code = 4


def check_type(name: str, value, kind: type, remedy: str) -> None:
    """Refuse what a caller of ours gave in the place of another type, before something far inside fails on it.

    Args:
        name: of the argument.
        remedy: what gives one of the right type.

    Raises:
        InputError: the value is not of this type.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name}: {type(value).__name__} found, {kind.__name__} expected; {remedy}")


def printable(text: str) -> str:
    """The text with nothing that a terminal obeys but newline and tab: other control characters, text direction
    overrides and the like become visible (`\\x1b`, `\\u202e`), carriage returns go."""
    return _IN_TEXT.sub(_visible, text.replace("\r", ""))


def one_line(message) -> str:
    """A message as one line that no terminal obeys, cut at MOST_OF_MESSAGE characters; line breaks become visible."""
    text = str(message)
    if len(text) > MOST_OF_MESSAGE:
        text = text[: MOST_OF_MESSAGE - 1] + "…"
    return _IN_MESSAGE.sub(_visible, text)


def elided(message) -> str:
    """A message without the middle of words of more than MOST_OF_WORD characters, such as a path that nobody typed."""
    return _LONG_WORD.sub(lambda match: f"{match[0][:200]}…{match[0][-80:]}", str(message))


def _visible(match: re.Match) -> str:
    return repr(match[0])[1:-1]  # as Python writes it: \n, \x1b, \u202e


def first_line(error: BaseException) -> str:
    """What an exception says, on one line and cut where it is long; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def fault_text(error: BaseException, whose: str = "") -> str:
    """'KeyError: 'a' (in model/x.py:12)': an exception that nobody foresaw, with where it arose.

    Args:
        whose: stands before the place, of a fault in another process.
    """
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} (in {whose}{innermost.filename}:{innermost.lineno})"


def command_line(*words) -> str:
    """A command as the user's shell takes it: words with spaces or signs are quoted."""
    words = list(map(str, words))
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """'1 text', '1,234 texts'."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def shown(value) -> str:
    """A value as messages show it: quoted as in Python, on one line, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
