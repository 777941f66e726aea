"""Generation speed."""

import time
from typing import NamedTuple

from model.errors import counted


class Speed(NamedTuple):
    """How fast a text was generated; an eos does not count."""

    first: float  # seconds to the first token, prefill included
    tokens: int
    seconds: float  # to the last token

    def __str__(self) -> str:
        later = f", {(self.tokens - 1) / (self.seconds - self.first):.1f} tokens/s after it" if self.tokens > 1 else ""
        return (
            f"{counted(self.tokens, 'token')} in {self.seconds:.2f} s:"
            f" the first after {self.first * 1000:.0f} ms{later}"
        )


class Stopwatch:
    """Times a text."""

    def __init__(self) -> None:
        self._start = self._first = self._newest = time.perf_counter()
        self._tokens = 0

    def token(self) -> None:
        """Count a token."""
        self._tokens += 1
        self._newest = time.perf_counter()
        if self._tokens == 1:
            self._first = self._newest

    def speed(self) -> Speed | None:
        """None: no token was counted."""
        if not self._tokens:
            return None
        return Speed(self._first - self._start, self._tokens, self._newest - self._start)
