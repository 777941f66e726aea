"""Saving while training goes on: a copy of the state is taken at once, and written by a thread."""

import queue
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.errors import InputError, TrainingDiverged
from model.storage.archive import is_finite

MAX_FAILURES = 3  # saves that failed in a row before the run ends
MAX_WAITING = 2  # copies that wait to be written: weights and a checkpoint of one step


class BackgroundSaver:
    """Writes one file after another in a thread.

    A save that fails for want of space, or of the folder, is told and left: the run goes on, and the next one of its
    kind tries again, until MAX_FAILURES have failed in a row.

    Args:
        say: prints one line for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failures: dict[str, int] = {}  # in a row, of each kind
        self._error: BaseException | None = None
        self._jobs = queue.Queue()
        self._free = threading.Semaphore(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
        self._thread.start()

    def submit(
        self,
        kind: str,
        content: Mapping,
        write: Callable[[Mapping], None],
        every_second: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy `content` and have `write(copy)` called in the thread; waits only where too many are waiting already.

        Args:
            kind: what is saved; the next of the same kind makes a failed one good.
            every_second: called while waiting.

        Raises:
            InputError, TrainingDiverged: of an earlier save, as `check`.
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
        """Raise what should end the run: too many saves failed in a row, or there was something that no save can mend.

        Raises:
            InputError: the last MAX_FAILURES files could not be written.
            TrainingDiverged: weights, optimizer or average held numbers that are not finite; they were not written.
        """
        if self._error is not None:
            raise self._error

    def is_idle(self) -> bool:
        """Whether all is written."""
        return self._jobs.unfinished_tasks == 0

    def wait(self, every_second: Callable[[], None] = lambda: None) -> None:
        """Wait until all is written.

        Args:
            every_second: called while waiting.

        Raises:
            InputError: the last save of some kind failed.
            TrainingDiverged: as `check`.
        """
        done = threading.Event()
        self._jobs.put(("", None, lambda _: done.set()))
        while not done.wait(timeout=1):
            every_second()
        self.check()
        if self._failures:
            names = ", ".join(self._failures)
            raise InputError(f"the last {names} could not be saved (see above); what was saved before is whole")

    def _work(self) -> None:
        # A second team of OpenMP threads makes more threads than cores, and GNU's library then lets all of them sleep
        # between operations: training on a CPU went on at two thirds of its speed. This counts for this thread alone.
        torch.set_num_threads(1)
        while True:
            kind, content, write = self._jobs.get()
            if content is None:
                write(None)
                self._jobs.task_done()
                continue
            try:
                if not is_finite(content):
                    raise TrainingDiverged(
                        "the weights, the optimizer's state or the average hold numbers that are not finite, and were"
                        " not saved; lower learning_rate, then --resume from the last checkpoint"
                    )
                write(content)
                self._failures.pop(kind, None)
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


def copy_to_cpu(content):
    """A copy of nested dicts, lists and tuples with all tensors on the CPU; those that share a storage still do."""
    return _copy(content, {})


def _copy(content, copies: dict[tuple, Tensor]):
    if isinstance(content, Tensor):
        key = (content.device, content.data_ptr(), content.shape, content.stride(), content.dtype)
        if content.numel() == 0 or key not in copies:
            copies[key] = torch.empty_like(content, device="cpu").copy_(content.detach())
        return copies[key]
    if isinstance(content, Mapping):
        return {key: _copy(value, copies) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_copy(value, copies) for value in content)
    return content
