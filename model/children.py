"""What processes that we start inherit: how long OpenMP threads spin, whether the user's signals reach them, and
whether they outlive us."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping

# Extra arguments of subprocess.Popen for a child in a separate group: Ctrl-C in the terminal reaches only us.
OWN_GROUP: dict = (
    {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
)
# How long an OpenMP thread that has nothing to do keeps its core before it sleeps. GNU's default, 300,000 rounds, is
# the best on an idle machine and six times slower beside two busy processes; 10,000 rounds (a fraction of a
# millisecond) cost nothing measurable on the idle one. Intel's and LLVM's libraries (Windows, conda, macOS) count
# milliseconds; their default is 200. See benchmarks/busy.py.
SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
CHOSEN_BY_USER = ("OMP_WAIT_POLICY", *SPIN)


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound how long OpenMP threads spin, here and in all children. It takes effect only before torch is imported.

    Changes nothing where the user has chosen: any of CHOSEN_BY_USER is set.
    """
    if not any(name in environment for name in CHOSEN_BY_USER):
        environment.update(SPIN)


@contextlib.contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """What is started within it never gets Ctrl-C, from its first instant on; nothing on Windows."""
    if os.name == "nt":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def when_parent_ends(parent: int, act: Callable[[], None], seconds: float = 0.5) -> None:
    """Call `act` in a thread soon after the process that started this one has ended, however it ended.

    Args:
        parent: the id of that process.
        seconds: between two looks.
    """
    threading.Thread(target=_watch, args=(parent, act, seconds), name="end_with_parent", daemon=True).start()


def _watch(parent: int, act: Callable[[], None], seconds: float) -> None:
    if os.name == "nt":  # a parent's id stays when it ends
        import _winapi

        try:
            handle = _winapi.OpenProcess(_winapi.SYNCHRONIZE, False, parent)
            _winapi.WaitForSingleObject(handle, _winapi.INFINITE)
        except OSError:  # it is gone already
            pass
    else:
        while os.getppid() == parent:
            time.sleep(seconds)
    act()
