"""`max_hours`: a session that has lasted that long stops as after a signal, early enough to save within the limit."""

import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 1.0  # between two looks at the time: meanwhile a save may turn out to take longer


class TimeLimit:
    """Within its `with` block, calls `expire` once, in a thread, when the session has only the time left to save.

    Args:
        hours: from the block's beginning on; None: no limit.
        needed: returns the seconds to leave for saving.
        expire: asks the training to stop.
    """

    def __init__(self, hours: float | None, needed: Callable[[], float], expire: Callable[[], None]) -> None:
        self._hours, self._needed, self._expire = hours, needed, expire
        self._left = threading.Event()

    def __enter__(self) -> None:
        if self._hours is not None:
            end = time.monotonic() + 3600 * self._hours
            threading.Thread(target=self._watch, args=(end,), name="time limit", daemon=True).start()

    def __exit__(self, *error) -> None:
        self._left.set()

    def _watch(self, end: float) -> None:
        while (seconds := end - self._needed() - time.monotonic()) > 0:
            if self._left.wait(min(seconds, LOOK_SECONDS)):
                return
        self._expire()
