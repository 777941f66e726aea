"""What the operating system says of its memory and its processes: by psutil, or without it as far as Python goes.

psutil is in requirements.txt. A run does not need it: without it, memory is known on Linux only, and elsewhere not
checked.
"""

import os
import sys
from pathlib import Path

try:
    import psutil
except ImportError:
    psutil = None

UNKNOWN = sys.maxsize  # bytes of free memory where nobody says


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number; on Windows without psutil always."""
    if psutil is not None:
        return psutil.pid_exists(pid)
    if os.name == "nt":  # there, os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def available_memory() -> int:
    """Bytes that processes can take before the machine swaps; UNKNOWN where nobody says."""
    return psutil.virtual_memory().available if psutil is not None else _of_linux("MemAvailable", UNKNOWN)


def free_swap() -> int:
    """Bytes of swap that are free."""
    return psutil.swap_memory().free if psutil is not None else _of_linux("SwapFree", 0)


def _of_linux(name: str, otherwise: int) -> int:
    """A line of /proc/meminfo, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return otherwise
