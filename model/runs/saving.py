"""Saving while training continues: the state is copied at once, and a thread writes the copy."""

import queue
import threading
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.errors import InputError, TrainingDiverged
from model.runs.launch import advice_on_slow_saves
from model.storage.archive import is_finite

MAX_FAILURES = 3  # failed saves in a row that end the run
END = "end"  # in the place of a kind: nothing comes after it
MAX_WAITING = 2  # copies that wait to be written: the weights and the checkpoint of one step


class BackgroundSaver:
    """Writes one file after another in a thread.

    A save that fails because the disk is full or the folder is gone is reported; the run continues, and the next save
    of that kind tries again. MAX_FAILURES in a row end the run.

    Args:
        say: prints one line for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failures: dict[str, int] = {}  # in a row, by kind
        self._error: BaseException | None = None
        self._jobs = queue.Queue()
        self._free = threading.Semaphore(MAX_WAITING)
        self._advised = False  # about slow saves, once
        self.longest = 0.0  # seconds that a save took
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
        self._thread.start()

    def submit(
        self,
        kind: str,
        content: Mapping,
        write: Callable[[Mapping], None],
        every_second: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy `content`, for the thread to call `write(copy)`; waits only while MAX_WAITING copies wait already.

        Args:
            kind: names the file in messages; a save that succeeds clears the earlier failures of its kind.
            every_second: called while waiting.

        Raises:
            InputError, TrainingDiverged: of an earlier save, see `check`.
        """
        self.check()
        while not self._free.acquire(timeout=1):
            every_second()
        try:
            self._jobs.put((kind, copy_to_cpu(content), write))
        except BaseException:
            self._free.release()
            raise

    def check(self) -> None:
        """Raise what must end the run: too many failed saves in a row, or a fault that no later save can repair.

        Raises:
            InputError: the last MAX_FAILURES files could not be written.
            TrainingDiverged: weights, optimizer state or moving average were not finite, and so were not written.
        """
        if self._error is not None:
            raise self._error

    def is_idle(self) -> bool:
        """Whether everything is written."""
        return self._jobs.unfinished_tasks == 0

    def wait(self, every_second: Callable[[], None] = lambda: None) -> None:
        """Wait until everything is written.

        Args:
            every_second: called while waiting.

        Raises:
            InputError: the last save of some kind failed.
            TrainingDiverged: see `check`.
        """
        done = threading.Event()
        self._jobs.put(("", None, lambda _: done.set()))
        while not done.wait(timeout=1):
            every_second()
        self.check()
        if self._failures:
            names = ", ".join(self._failures)
            raise InputError(f"the last {names} could not be saved (see above); earlier files are intact")

    def close(self) -> None:
        """End the thread, once it has written everything."""
        self._jobs.put((END, None, None))
        self._thread.join()

    def _work(self) -> None:
        # With a second team of OpenMP threads there are more threads than cores, and GNU's library lets all of them
        # sleep between operations: training on a CPU ran at two thirds of its speed. This setting is the thread's own.
        torch.set_num_threads(1)
        while True:
            kind, content, write = self._jobs.get()
            if kind == END:
                return
            if content is None:
                write(None)
                self._jobs.task_done()
                continue
            try:
                begin = time.monotonic()
                write(content)
                self._failures.pop(kind, None)
                self.longest = max(self.longest, time.monotonic() - begin)
                self._advise(time.monotonic() - begin)
            except InputError as error:
                self._failures[kind] = self._failures.get(kind, 0) + 1
                self._say(f"not saved: {error}")
                if self._failures[kind] >= MAX_FAILURES:
                    self._error = InputError(f"{MAX_FAILURES} saves in a row failed; the last: {error}")
            except BaseException as error:  # whatever it is, the main thread raises it
                self._error = error
            finally:
                del content  # the copy is large
                self._free.release()
                self._jobs.task_done()

    def _advise(self, seconds: float) -> None:
        """Say once if a save takes so long that torchrun may kill it after Ctrl-C."""
        if not self._advised and (advice := advice_on_slow_saves(seconds)) is not None:
            self._advised = True
            self._say(advice)


def check_finite(content: Mapping) -> None:
    """Check what is to be saved.

    Raises:
        TrainingDiverged: it holds NaN or infinity.
    """
    if not is_finite(content):
        raise TrainingDiverged(
            "weights, optimizer state or moving average are not finite and were not saved; lower learning_rate, then"
            " --resume from the last checkpoint"
        )


def copy_to_cpu(content):
    """A copy of nested dicts, lists and tuples with all tensors on the CPU; shared storages stay shared."""
    return _copy(content, {})


def _copy(content, copies: dict[tuple, Tensor]):
    if isinstance(content, Tensor):
        key = (content.device, content.data_ptr(), content.shape, content.stride(), content.dtype)
        if not content.data_ptr() or key not in copies:  # empty, or on a device that tells no addresses
            copies[key] = torch.empty_like(content, device="cpu").copy_(content.detach())
        return copies[key]
    if isinstance(content, Mapping):
        return {key: _copy(value, copies) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_copy(value, copies) for value in content)
    return content
