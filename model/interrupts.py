"""Ctrl-C while a program of ours imports its libraries, which takes seconds: the program ends at once, in one line."""

import contextlib
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # which holds the scripts
IMPORTING = "<frozen importlib._bootstrap>"  # the file name of Python's import system


def interrupt(number: int, frame) -> None:
    """A signal's handler that raises KeyboardInterrupt; within an import it ends the process, exit code 130.

    An import that is interrupted ends in a traceback, or torch and numpy catch the exception and the program runs on.
    Nothing is lost: what we write while libraries are imported survives a kill.
    """
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            with contextlib.suppress(OSError):
                os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def answer_interrupts() -> None:
    """Handle Ctrl-C with `interrupt` if this process is one of our programs; a notebook keeps its handler."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    is_ours = sys.argv[:1] == ["-m"] or (script is not None and Path(script).resolve().parent == ROOT)
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
