"""How fast a run trains, and how long it will take."""

import contextlib
import time
from collections.abc import Iterator

EVALUATION_SHARE = 1 / 3  # of a step's time for as many tokens, until one was timed: a forward pass without a backward


class Clock:
    """Times the steps and evaluations of one session, from its creation on.

    The first step is left out of the rate: it allocates memory and may compile for a minute.

    Args:
        seconds_before: spent in earlier sessions of the run.
    """

    def __init__(self, seconds_before: float = 0.0) -> None:
        self.steps = 0  # of this session, skipped ones included
        self._started = self._last_log = time.perf_counter()
        self._seconds_before = seconds_before
        self._first_step_end = self._started
        self._tokens = self._tokens_since_log = 0  # read by all processes; `_tokens`: since the first step
        self._evaluations, self._evaluating, self._evaluating_since_log = 0, 0.0, 0.0  # count and seconds

    def count_step(self, tokens: int) -> None:
        """Count a step that has just ended.

        Args:
            tokens: read by all processes.
        """
        self.steps += 1
        self._tokens_since_log += tokens
        if self.steps == 1:
            self._first_step_end = time.perf_counter() - self._evaluating
        else:
            self._tokens += tokens

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time an evaluation, which the rate leaves out."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._evaluations += 1
        self._evaluating += seconds
        self._evaluating_since_log += seconds

    @property
    def run_seconds(self) -> float:
        """Seconds since the run began, over all its sessions."""
        return self._seconds_before + time.perf_counter() - self._started

    def take_rate(self) -> float:
        """Tokens per second of training since the last call; the next call starts here."""
        now = time.perf_counter()
        speed = self._tokens_since_log / (now - self._last_log - self._evaluating_since_log)
        self._last_log, self._tokens_since_log, self._evaluating_since_log = now, 0, 0.0
        return speed

    def seconds_left(self, tokens: int, evaluations: int, tokens_per_evaluation: int) -> float | None:
        """Expected seconds to the end of the run, evaluations included; None before the second step."""
        if self._tokens == 0:
            return None
        per_token = (time.perf_counter() - self._evaluating - self._first_step_end) / self._tokens
        evaluation = tokens_per_evaluation * per_token * EVALUATION_SHARE
        if self._evaluations:
            evaluation = self._evaluating / self._evaluations
        return tokens * per_token + evaluations * evaluation
