"""Worker processes that make parts. `python -m model.corpus` is one: tasks come by stdin, answers by stdout.

They are started as programs of their own rather than through multiprocessing, so that a user's script needs no
`if __name__ == "__main__"`, nothing is forked while threads run, and a worker whose parent dies reads the end of its
input and ends too.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from model.corpus.part_maker import Damaged, Part, PartMaker, PartOptions
from model.corpus.sources import Block, Source, read_part
from model.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = ("FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """Make one part, or see that it is there already."""

    source: Source
    number: int  # of the source
    index: int  # of the part in it
    part_bytes: int
    path: Path
    block: Block | None = None  # the lines; None: the worker reads them from the plain file
    disk_bytes: int = 0  # of the input that are done with it, for the progress bar


@dataclass(frozen=True)
class Answer:
    """What came of a task."""

    source: int  # its number
    index: int
    location: str
    disk_bytes: int
    record: dict | None  # None: no line begins in this part
    kept: bool = False  # it was there
    changed: bool = False  # it was there, of other lines than the input now has


def carry_out(maker: PartMaker, task: Task) -> Answer:
    """Make the part, unless it is there, whole, and of these very lines."""
    about = (task.number, task.index, task.source.location, task.disk_bytes)
    block = task.block or read_part(task.source, task.index, task.part_bytes)
    if task.path.exists():
        try:
            with Part(task.path) as part:
                part.check()
                changed = block is None or part.record["sha256"] != block.sha256
                return Answer(*about, part.record, kept=True, changed=changed)
        except Damaged:
            pass
    return Answer(*about, maker.make(block, task.path) if block else None)


def make_parts(options: PartOptions, tasks: Iterable[Task], workers: int) -> Iterator[Answer]:
    """Carry out tasks in this process (workers 1) or in several others; answers come as they are ready.

    Raises:
        InputError: a worker died.
    """
    if workers == 1:
        maker = PartMaker(options)
        for task in tasks:
            yield carry_out(maker, task)
        return
    crew = [_Worker(options) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def run(task: Task) -> Answer:
        worker = idle.get()
        try:
            return worker.carry_out(task)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)
    try:
        waiting = set()
        for task in tasks:
            waiting.add(threads.submit(run, task))
            if len(waiting) > 2 * workers:  # so that no more blocks than that are held
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        for worker in crew:
            worker.end()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self, options: PartOptions) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | dict.fromkeys(ONE_THREAD, "1") | {"PYTHONPATH": path}
        command = [sys.executable, "-m", "model.corpus"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._send(options)

    def _send(self, value) -> None:
        pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def carry_out(self, task: Task) -> Answer:
        try:
            self._send(task)
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise InputError(
                f"a worker process ended with exit code {code} (-9: killed, perhaps for want of memory: give fewer "
                "--workers); run it again: it goes on from there"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was still to be sent
                pipe.close()


def main() -> None:
    """Carry out the tasks that come in, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not get among them
    maker = PartMaker(pickle.load(sys.stdin.buffer))
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = carry_out(maker, task)
        except (InputError, OSError, MemoryError) as error:
            answer = error
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

