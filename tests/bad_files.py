"""Loading weights that are damaged or made to do harm: what may come of it, within little memory."""

import contextlib
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from model.errors import InputError
from model.weights import Weights, load_weights

ROOM = 400 << 20  # bytes of address space, of which threads and mapped files take some
LONGEST = 800  # characters of a message
OTHER_KINDS = [None, True, 0, -1, 2, 1.5, 2**31, 2**64, 10**400, "", "64", "\ud800\n", [], [1], [[]], {}, {"a": []}]


def many(examples: int):
    """So many examples of a property, however long each takes."""
    unreset = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=unreset)


@contextlib.contextmanager
def little_memory():
    """Make what takes more than ROOM raise MemoryError, where the system can."""
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def load_or_refusal(path: Path) -> Weights | str:
    """The weights, or the one line that says why not and names the file or the folder."""
    with little_memory():
        try:
            return load_weights(path)
        except InputError as error:
            line = str(error)
    assert "\n" not in line and len(line) < LONGEST and str(path) in line, line
    return line


def assert_refused(path: Path, message: str) -> None:
    """Args: message: a regular expression."""
    found = load_or_refusal(path)
    if not isinstance(found, str):
        pytest.fail(f"it was loaded: {found.config}")
    assert re.search(message, found), found
