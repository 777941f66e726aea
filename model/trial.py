"""Which of several ways to compute the same is fastest on this machine: tried, since it differs from maker to maker."""

import math
import time
from collections.abc import Callable, Mapping

ROUNDS = 3  # at least: the first one may allocate memory
BUSY = 0.8  # of the time that this thread ran: below, others kept it from running, and the times say nothing


def fastest_of(
    ways: Mapping[str, Callable[[], float]], usual: str, clearly: float, seconds: float = 0.0
) -> tuple[str | None, dict[str, float]]:
    """The fastest way, and the least seconds of each; None: the machine is too busy to say. It is the usual one unless
    another is clearly faster: a close race must not make two equal runs differ.

    Args:
        ways: compute something, and return how many seconds that took.
        clearly: how many times faster than the usual one another must be.
        seconds: that the trial may take, if ROUNDS take less.
    """
    least, rounds = dict.fromkeys(ways, math.inf), 0
    start, ran = time.perf_counter(), time.thread_time()
    while rounds < ROUNDS or time.perf_counter() - start < seconds:
        for name, way in ways.items():
            least[name] = min(least[name], way())
        rounds += 1
    if time.thread_time() - ran < BUSY * (time.perf_counter() - start):
        return None, least
    fastest = min(least, key=lambda name: least[name])
    return (usual if least[usual] < clearly * least[fastest] else fastest), least


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times_text(least: Mapping[str, float]) -> str:
    """What each way took, for a line."""
    return ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in least.items())
