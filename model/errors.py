"""Exceptions with a message for the user: the scripts print it as one line, without a traceback, and exit."""

MOST_CHARACTERS = 60  # of a value that is wrong, in a message


class OneLineError(Exception):
    """What a script says before it ends. The message says what was found, what was expected and what to do."""

    exit_code: int


class InputError(OneLineError):
    """What the user gave cannot be used, or a file cannot be read or written: a setting, a file, a prompt, a disk."""

    exit_code = 2


class TrainingDiverged(OneLineError):
    """Loss or gradient are not finite, or the loss leapt, too often; the weights are those of the last good step."""

    exit_code = 1


class ProcessLost(OneLineError):
    """Another process of the same job failed, or no longer answers: the message names it. Starting again helps."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What an exception says, on one line and cut where it is long; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def shown(value) -> str:
    """A value as messages show it: quoted as in Python, on one line, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
