"""The one exception for what the user can mend, and how its message shows what was found."""

MOST_CHARACTERS = 60  # of a value that is wrong, in a message


class InputError(Exception):
    """What the user gave cannot be used: a setting, a file, a prompt.

    The message says what was found, what was expected and what to do. The scripts print it without a traceback
    and exit with code 2.
    """


def shown(value) -> str:
    """A value as messages show it: quoted as in Python, on one line, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
