"""Which layout of the weights reads one row faster on this processor, found by trying."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from model.errors import InputError, shown
from model.storage.files import read_json, write_json

ASKED = "MATECONV_LAYOUT"  # the environment's variable that decides instead
ROUNDS = 3
CLEARLY = 1.2  # times faster than packed weights another layout must be
BUSY = 0.8  # of its time that this thread must have had to decide anything


def faster_layout(kept: Path, ways: dict[str, Callable[[], object]], say: Callable[[str], None]) -> str:
    """The fastest of the ways to multiply with all weights once, the first unless another is clearly faster.

    The result is kept in a file, since layouts differ in the last bit: a text with a seed stays the same. The variable
    MATECONV_LAYOUT names one instead.

    Args:
        kept: names what the choice depends on.
        ways: by the names of their layouts.
        say: called with a line when something was tried.

    Raises:
        InputError: MATECONV_LAYOUT names another.
    """
    names = list(ways)
    if asked := os.environ.get(ASKED):
        if asked not in names:
            raise InputError(f"{ASKED}: {shown(asked)} found, {' or '.join(names)} expected; or leave it unset")
        return asked
    try:
        found = read_json(kept)["layout"] if kept.exists() else None
    except (InputError, KeyError, OSError):
        found = None
    if found in names:
        return found
    seconds = dict.fromkeys(names, math.inf)
    start, ran = time.perf_counter(), time.thread_time()
    for _ in range(ROUNDS + 1):  # the first is for the caches
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    if time.thread_time() - ran < BUSY * (time.perf_counter() - start):
        return names[0]
    fastest = min(names, key=lambda name: seconds[name])
    if seconds[names[0]] < CLEARLY * seconds[fastest]:
        fastest = names[0]
    _keep(kept, fastest)
    times = ", ".join(f"{name} {1000 * seconds[name]:.3g} ms" for name in names)
    say(f"weights: {fastest} ones read one text's row ({times}); kept in {kept.parent}")
    return fastest


def _keep(kept: Path, layout: str) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(kept, {"layout": layout})
    except OSError:  # it is tried again then
        pass
