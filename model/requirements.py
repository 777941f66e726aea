"""A library that is missing ends in one line with the command that installs it, not in a traceback."""

import os
import shlex
import sys
from pathlib import Path

from model.errors import one_line

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
# What nothing works without, by the name of the import.
LIBRARIES = {"datasets", "filelock", "jinja2", "jsonlines", "numpy", "safetensors", "tokenizers", "torch",
             "tqdm", "transformers", "yaml"}  # fmt: skip


# What requirements.txt calls optional, likewise.
OPTIONAL = {
    "fastokens",
    "gguf",
    "matplotlib",
    "orjson",
    "psutil",
    "rensa",
    "starlette",
    "uvicorn",
    "wandb",
    "zstandard",
}


def missing_library(error: BaseException) -> str | None:
    """What to do about a library that is not installed; None for any other error."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in LIBRARIES | OPTIONAL:
        return None
    package = "pyyaml" if name == "yaml" else name
    if name in OPTIONAL or not REQUIREMENTS.is_file():  # or the package was copied out
        return f"{package} is not installed; install it with: python -m pip install {package}"
    path = os.path.relpath(REQUIREMENTS) if Path.cwd() in REQUIREMENTS.parents else str(REQUIREMENTS)
    return f"{package} is not installed; install all that is needed with: python -m pip install -r " + (
        f'"{path}"' if os.name == "nt" else shlex.quote(path)
    )


def report_missing_libraries() -> None:
    """From now on, a missing library is one line and exit code 2 where nobody handles it: at the scripts' top."""
    otherwise = sys.excepthook

    def report(kind, error, trace) -> None:
        if (message := missing_library(error)) is None:
            return otherwise(kind, error, trace)
        print(f"error: {one_line(message)}", file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = report
