"""A copy of the project as a new user has it."""

import shutil
from pathlib import Path

from tests.conftest import ROOT, corpus_lines


def copy_project(home: Path, raw_data: str) -> Path:
    """Copy the project to `home`, with 300 texts of the sample corpus as the only file in dataset/."""
    ignored = shutil.ignore_patterns("out", "dataset", ".git", "tests", "__pycache__", ".*")
    shutil.copytree(ROOT, home, ignore=ignored)
    (home / "dataset").mkdir()
    (home / "dataset" / raw_data).write_bytes(b"".join(corpus_lines(300)))
    return home
