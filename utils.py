"""What the scripts share and the model does not need: the console, devices, seeds, the process group."""

import sys
from collections.abc import Callable

from model.errors import InputError


def run_command(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 or what it returns, 2 with one line for bad input, 130 for Ctrl-C."""
    # Consoles on Windows may not be UTF-8: Chinese and the chat's emoji must not raise.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
