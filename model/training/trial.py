"""Which way to compute the same trains fastest on this CPU: tried, since it differs from maker to maker."""

import math
import time
from collections.abc import Callable, Sequence

ROUNDS = 3  # at least: the first one allocates memory
SECONDS = 0.1  # of the trial, if that allows more rounds
CLEARLY = 1.1  # times faster another way must be than the usual one: a close race must not make two equal runs differ
BUSY = 0.8  # of the time that this thread ran: below, others kept it from running, and the times say nothing


def fastest_way(ways: Sequence[str], seconds_of: Callable[[str], float], usual: str, what: str) -> tuple[str, str]:
    """The fastest of some ways, and why; the usual one unless another is clearly faster.

    Args:
        seconds_of: computes one way; returns how long that took.
        what: is computed, for the reason.
    """
    seconds, rounds = dict.fromkeys(ways, math.inf), 0
    start, ran = time.perf_counter(), time.thread_time()
    while rounds < ROUNDS or time.perf_counter() - start < SECONDS:
        for way in ways:
            seconds[way] = min(seconds[way], seconds_of(way))
        rounds += 1
    if time.thread_time() - ran < BUSY * (time.perf_counter() - start):
        return usual, "the machine is too busy to try others"
    fastest = min(ways, key=lambda way: seconds[way])
    if seconds[usual] < CLEARLY * seconds[fastest]:
        fastest = usual
    times = ", ".join(f"{way} {1000 * seconds[way]:.3g} ms" for way in ways)
    return fastest, f"tried with {what}: {times}"
