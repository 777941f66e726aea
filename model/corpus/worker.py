"""Worker processes that make parts. Each runs `main` here: tasks come by stdin, answers by stdout.

They are separate programs rather than multiprocessing's children: a user's script needs no `if __name__ ==
"__main__"`, nothing forks while threads run, and a worker whose parent dies reads the end of its input and ends too.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from model.children import ctrl_c_blocked
from model.corpus.opening import Source
from model.corpus.part_file import Damaged, Part
from model.corpus.part_maker import PartMaker, PartOptions
from model.corpus.parts import Block, read_part
from model.errors import InputError, fault_text

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = ("FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Not `python -m`, which looks for modules where the user works before it looks here.
PROGRAM = f"""
import sys
sys.path[:] = [{str(ROOT)!r}, *filter(None, sys.path)]
from model.corpus.worker import main
main()
"""

# glibc: keep freed memory rather than return it and ask for it again: a part's arrays come and go all the time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@dataclass(frozen=True)
class Task:
    """Make one part, unless it exists."""

    source: Source
    number: int  # of the source
    index: int  # of the part in it
    part_bytes: int
    path: Path
    block: Block | None = None  # the lines; None: the worker reads them from the plain file
    disk_bytes: int = 0  # of the input that it covers, for the progress bar


@dataclass(frozen=True)
class Answer:
    """The result of a task."""

    source: int  # its number
    index: int
    location: str
    disk_bytes: int
    record: dict | None  # None: no line begins in this part
    kept: bool = False  # it existed
    changed: bool = False  # it existed, made of other lines than the input has now


def carry_out(maker: PartMaker, task: Task) -> Answer:
    """Make the part, unless it exists, whole and made of the same lines."""
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


class Crew:
    """Worker processes; where `count` is 0, this process does the work.

    They start with the crew, so that they load their libraries while their options are still being worked out.
    """

    def __init__(self, count: int) -> None:
        self._workers = [_Worker() for _ in range(count)]

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error) -> None:
        for worker in self._workers:
            worker.end()

    def make_parts(self, options: PartOptions, tasks: Iterable[Task]) -> Iterator[Answer]:
        """Carry out tasks; yields answers as they become ready.

        Raises:
            InputError: a worker died.
        """
        if not self._workers:
            maker = PartMaker(options)
            yield from (carry_out(maker, task) for task in tasks)
            return
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            worker.send(options)
            idle.put(worker)

        def run(task: Task) -> Answer:
            worker = idle.get()
            try:
                return worker.carry_out(task)
            finally:
                idle.put(worker)

        threads, waiting = ThreadPoolExecutor(len(self._workers)), set()
        try:
            for task in tasks:
                waiting.add(threads.submit(run, task))
                if len(waiting) > 2 * len(self._workers):  # so that no more blocks than that are held
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            threads.shutdown(wait=not waiting, cancel_futures=True)


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self) -> None:
        environment = KEEP_MEMORY | os.environ | dict.fromkeys(ONE_THREAD, "1")
        command, pipes = [sys.executable, "-c", PROGRAM], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with ctrl_c_blocked():
            self._process = subprocess.Popen(command, env=environment, **pipes)

    def send(self, value) -> None:
        """Send options or a task.

        Raises:
            InputError: the worker is gone.
        """
        try:
            pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError as error:
            raise self._gone() from error

    def carry_out(self, task: Task) -> Answer:
        """Have a task done; raises what the worker raised.

        Raises:
            InputError: the worker is gone.
        """
        self.send(task)
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._gone() from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _gone(self) -> InputError:
        """What to say of a worker that died."""
        code = self._process.wait()
        why = ", killed, perhaps because memory ran out: give fewer --workers" if code == -9 else ""
        return InputError(f"a worker process ended with exit code {code}{why}; run it again: it resumes")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # unsent data
                pipe.close()


def main() -> None:
    """Carry out tasks from stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; for Windows
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not end up among them
    with contextlib.suppress(ImportError):  # slow to import; the options arrive later
        import fastokens  # noqa: F401
    try:
        maker = PartMaker(pickle.load(sys.stdin.buffer))
        while True:
            task = pickle.load(sys.stdin.buffer)
            try:
                answer = carry_out(maker, task)
            except Exception as error:  # the parent raises it
                answer = _told(error)
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # the parent is gone, perhaps within a message
        os._exit(0)  # nobody reads what is left in `answers`


def _told(error: Exception) -> Exception:
    """An exception as the parent can have it: what nobody foresaw with its traceback, which does not travel."""
    if isinstance(error, InputError | OSError | MemoryError | EOFError):
        return error
    return RuntimeError("\n".join([fault_text(error, "a worker's "), *traceback.format_exception(error)]))
