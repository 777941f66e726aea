"""Waits for a hub's answer, but not for long, and says in a line what went wrong."""

import re
import threading
from collections.abc import Callable
from typing import TypeVar

ANSWER_SECONDS = 25.0  # a hub that does not answer within these is given up: 30 with the start of the program
MOST_CAUSES = 10  # exceptions, each the cause of the one before, that are looked at
MOST_OF_REASON = 300  # characters of what a library says

Answer = TypeVar("Answer")


class NoAnswer(Exception):
    """The hub did not answer in time."""


def within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns or raises. It runs in a thread, which is left behind if it takes longer: neither the lookup
    of a host's name nor a library's retries can be stopped in another way.

    Raises:
        NoAnswer: it took longer.
    """
    outcome: list[tuple] = []

    def run() -> None:
        try:
            outcome.append((ask(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise NoAnswer(f"no answer within {seconds:g} seconds")
    answer, error = outcome[0]
    if error is not None:
        raise error
    return answer


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception of a hub's library, or one of its causes, is about; None: there was none."""
    for cause in _causes(error):
        for holder in (getattr(cause, "response", None), cause):
            if isinstance(status := getattr(holder, "status_code", None), int):
                return status
    return None


def reason_of(error: BaseException) -> str:
    """What an exception of a hub's library says, its first cause if it is a RuntimeError around others; without what
    follows a URL's `?`, which may be a signature that grants access."""
    cause = _causes(error)[-1] if isinstance(error, RuntimeError) else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    if "ConnectionPool(" in text and (system := re.search(r"\[Errno -?\d+\] [\w ]+", text)):
        return system[0]  # requests wraps what the system says in three of its objects
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)[:MOST_OF_REASON].rstrip(".")


def why_no_dataset(error: BaseException, endpoint: str, name: str, forbidden: str, log_in: str, ways_out: str) -> str:
    """Why a hub gives no dataset, in a line.

    Args:
        error: that its library raised.
        forbidden: what a 403 means there.
        log_in: how users do so.
        ways_out: where nobody answers.
    """
    absent = f"{endpoint} has no dataset {name}, or a private one"
    meanings = {
        401: f"{absent} (401); check the name, or {log_in}",
        403: forbidden,
        404: f"{absent} (404); check the name, or {log_in}",
        None: f"{endpoint} cannot be reached ({reason_of(error)}); {ways_out}",
    }
    return meanings.get(status_of(error), f"{endpoint} answers with an error ({reason_of(error)}); {ways_out}")


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (deeper := causes[-1].__cause__) is not None and len(causes) < MOST_CAUSES:
        causes.append(deeper)
    return causes
