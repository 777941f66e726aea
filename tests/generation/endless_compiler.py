"""A C++ compiler that never ends, and shows that it runs."""

import os
import sys
import time
from pathlib import Path

COMPILER = """#!{python} -S
import time
while True:
    with open({beats!r}, "a") as file:
        file.write(".")
    time.sleep(0.05)
"""


def endless_compiler(folder: Path) -> tuple[Path, dict[str, str]]:
    """The file that grows while the compiler runs, and the environment in which it is the compiler."""
    compiler, beats = folder / "g++", folder / "beats"
    compiler.write_text(COMPILER.format(python=sys.executable, beats=str(beats)))
    compiler.chmod(0o755)
    places = {"MATECONV_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "CXX": compiler}
    return beats, os.environ | {name: str(path) for name, path in places.items()}


def is_over(beats: Path) -> bool:
    """Whether the compiler no longer runs."""
    before = beats.read_text()
    time.sleep(0.5)
    return beats.read_text() == before
