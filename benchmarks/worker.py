"""A contender of a benchmark, in a separate process that answers lines with JSON."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

from model.errors import OneLineError


class Worker:
    """Runs `python script --worker order`, which answers when it is ready, and then once per line.

    Attributes:
        ready: its first answer, after `wait`.
    """

    def __init__(self, name: str, script: str, order: dict, threads: int | None = None, python: str = sys.executable):
        self.name = name
        environment = dict(os.environ)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (lives as long)
        self.process = subprocess.Popen(
            [python, script, "--worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
        )

    def wait(self) -> "Worker":
        """Wait until it is ready; returns itself.

        Raises:
            OneLineError: it ended; with the last line it printed.
        """
        self.ready = self._answer()
        return self

    def ask(self, line: str = "go"):
        """Its answer to a line; raises as `wait`."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.said.close()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.said.seek(0)
            lines = [line for line in self.said.read().splitlines() if line.strip()] or ["no word"]
            raise OneLineError(f"{self.name} ended with code {self.process.returncode}: {lines[-1].strip()}")
        return json.loads(line)


def ready_workers(begin: Iterable[Callable[[], Worker]], together: bool) -> list[Worker]:
    """Workers that are ready; prints which could not start.

    Args:
        begin: starts each.
        together: warm up at the same time: sooner, but each then measures a busy machine.
    """
    begun = [start() for start in begin] if together else (start() for start in begin)
    workers = []
    for worker in begun:
        try:
            worker.wait()
            workers.append(worker)
        except OneLineError as error:
            print(f"left out: {error}")
    return workers


def warn_if_busy() -> None:
    """Warn if other load would blur the measurements."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"this machine is busy (load {os.getloadavg()[0]:.1f}): the ratios mean little, the rates nothing")
