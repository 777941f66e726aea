"""Which of several ways to compute the same is fastest on this processor, found by trying."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from model.errors import InputError
from model.storage.files import read_json, write_json

ROUNDS = 3
CLEARLY = 1.2
BUSY = 0.8  # of its time that this thread must have had to decide anything


def fastest_way(
    kept: Path, ways: dict[str, Callable[[], object]], say: Callable[[str, str], None], clearly: float = CLEARLY
) -> str:
    """The fastest of some ways, the first unless another is clearly faster.

    The result is kept in a file, since ways differ in the last bit: a text with a seed stays the same.

    Args:
        kept: names what the choice depends on.
        ways: by their names.
        say: called with the way and the times when something was tried.
        clearly: times faster than the first way another must be.
    """
    names = list(ways)
    try:
        found = read_json(kept)["way"] if kept.exists() else None
    except (InputError, KeyError, OSError):
        found = None
    if found in names:
        return found
    for way in ways.values():  # which loads code and fills caches
        way()
    seconds = dict.fromkeys(names, math.inf)
    start, ran = time.perf_counter(), time.thread_time()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    if time.thread_time() - ran < BUSY * (time.perf_counter() - start):
        return names[0]
    fastest = min(names, key=lambda name: seconds[name])
    if seconds[names[0]] < clearly * seconds[fastest]:
        fastest = names[0]
    _keep(kept, fastest)
    say(fastest, ", ".join(f"{name} {1000 * seconds[name]:.3g} ms" for name in names))
    return fastest


def _keep(kept: Path, way: str) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(kept, {"way": way})
    except OSError:  # it is tried again then
        pass
