"""Reads a user's messages from a terminal: line editing for Chinese in any locale, and a paste as one message."""

import contextlib
import locale
import os
import select
import sys
import time

PASTE_SECONDS = 0.03  # within which the next line of a paste arrives
UTF8_LOCALES = ("C.UTF-8", "en_US.UTF-8", "UTF-8")  # every system has at least one
READLINE_SETTINGS = (
    "set enable-bracketed-paste on",  # the lines of a paste stay in the line that is edited
    "set input-meta on",  # bytes above 127 are characters, not keys with Meta held: as such they listed files
    "set output-meta on",
    "set convert-meta off",
    "set disable-completion on",
)


def prepare_input() -> None:
    """Set up stdin for `read_message`. A pipe is UTF-8; bytes that are not valid become U+FFFD."""
    at_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(encoding=None if at_terminal else "utf-8", errors="replace")
    if not at_terminal:
        return
    _leave_ascii_locale()
    with contextlib.suppress(ImportError):  # Windows has none; its console edits lines by itself
        import readline  # importing it gives input() line editing and history

        readline.set_completer(lambda text, state: None)  # a tab, or a stray key, lists no files
        for setting in READLINE_SETTINGS:
            readline.parse_and_bind(setting)


def _leave_ascii_locale() -> None:
    """Replace the C locale, also in place of one that is not installed, by a UTF-8 one: readline would edit bytes."""
    if not hasattr(locale, "nl_langinfo") or locale.nl_langinfo(locale.CODESET).upper().startswith("UTF"):
        return
    if locale.setlocale(locale.LC_CTYPE) not in ("C", "POSIX"):
        return
    for name in UTF8_LOCALES:
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            os.environ["LC_ALL"] = name  # readline reads it
            return


def read_message(prompt: str) -> str:
    """The next line of stdin; at a terminal, with the lines that arrive at once with it: a paste is one message.

    Raises:
        EOFError: stdin has ended.
    """
    if not sys.stdin.isatty():
        return input(prompt)
    typed_ahead = _more_arrives(0)  # what was typed during an answer is several messages
    lines = [input(prompt)]
    with contextlib.suppress(EOFError):
        while not typed_ahead and _more_arrives(PASTE_SECONDS):
            lines.append(input())
    return "\n".join(lines)


def _more_arrives(seconds: float) -> bool:
    """Whether the terminal has more input within this time."""
    if os.name == "nt":
        import msvcrt

        time.sleep(seconds)
        return msvcrt.kbhit()
    return bool(select.select([sys.stdin], [], [], seconds)[0])
