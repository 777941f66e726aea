"""A copy of the project as a new user has it, and an interpreter that runs scripts in it."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import ROOT, corpus_lines
from tests.tiny_runs import HUNG, ONE_THREAD


def copy_project(home: Path, raw_data: str) -> Path:
    """Copy the project to `home`, with 300 texts of the sample corpus as the only file in dataset/."""
    ignored = shutil.ignore_patterns("out", "dataset", ".git", "tests", "__pycache__", ".*")
    shutil.copytree(ROOT, home, ignore=ignored)
    (home / "dataset").mkdir()
    (home / "dataset" / raw_data).write_bytes(b"".join(corpus_lines(300)))
    return home


class Interpreter:
    """Runs scripts in `home`, one after another in one process (see interpreter.py): torch is imported once.

    Args:
        environment: of that process, on top of ours.
    """

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, str(Path(__file__).with_name("interpreter.py")), str(home)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        self.home = home
        self._process = subprocess.Popen(command, env=ONE_THREAD | dict(environment or {}), **pipes)

    def run(self, words: list[str], text: str = "") -> dict:
        """The exit code, stdout and stderr of a script that reads `text` from its standard input."""
        guard = threading.Timer(HUNG, self._process.kill)
        guard.start()
        self._process.stdin.write(json.dumps({"arguments": words, "input": text}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        guard.cancel()
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=HUNG)
