"""A trial of ways to compute the same, whose result is kept: ways differ in the last bit, a text with a seed stays."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from model.errors import InputError
from model.storage.files import read_json, write_json
from model.trial import fastest_of, seconds_of, times_text

CLEARLY = 1.2


def fastest_way(
    kept: Path, ways: Mapping[str, Callable[[], object]], say: Callable[[str, str], None], clearly: float = CLEARLY
) -> str:
    """The fastest of some ways, as `fastest_of` finds it, or as it was found before; the first where it cannot be said.

    Args:
        kept: a file for the result, whose name holds what the choice depends on.
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
    fastest, least = fastest_of({name: partial(seconds_of, way) for name, way in ways.items()}, names[0], clearly)
    if fastest is None:
        return names[0]
    _keep(kept, fastest)
    say(fastest, times_text(least))
    return fastest


def _keep(kept: Path, way: str) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(kept, {"way": way})
    except OSError:  # it is tried again then
        pass
