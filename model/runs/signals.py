"""Ctrl-C, SIGTERM and a lost terminal: training stops between two micro-batches and saves its last finished step."""

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
SECONDS_TO_LEAVE = 5.0  # after the third Ctrl-C; compiled code that runs longer is cut off
SECONDS_BETWEEN_VOTES = 2.0  # roughly, of several ranks within a long step


class StopSignal:
    """Counts the signals that ask to stop, and the end of its time, so that training stops where it loses nothing.

    A second signal changes nothing: torchrun sends each worker two of them. The third Ctrl-C ends a single process
    without a checkpoint of its last steps: KeyboardInterrupt in the main thread.

    While installed, the signals are blocked in the main thread, and so in every program that it starts: Ctrl-C in a
    terminal goes to all of them, and would kill a compiler of torch.compile and fail the step that waits for it. They
    arrive in another thread, which also answers while the main one waits for such a program. (Windows has no such
    mask: there Ctrl-C still kills a compiler.)
    """

    def __init__(self) -> None:
        self.signals = 0  # that came
        self.is_time_over = False  # see `expire`
        self._installed = 0  # how often
        self._leaves_at_once, self._raised = False, threading.Event()  # KeyboardInterrupt: asked for, raised
        self._before: dict[int, object] = {}  # handlers to restore, by signal
        self._pipe: tuple[int, int] | None = None  # the system writes the number of each signal into it
        self._wakeup_before = -1
        self._receiver: threading.Thread | None = None

    @property
    def count(self) -> int:
        """How often it was asked to stop."""
        return self.signals + self.is_time_over

    def expire(self) -> None:
        """Ask to stop because the time is over; from any thread."""
        self.is_time_over = True

    def install(self) -> None:
        """Take over SIGINT, SIGTERM and SIGHUP (Ctrl-Break on Windows); nohup's ignored SIGHUP stays ignored.

        Each call needs a `restore`; only the last of them gives the signals back.
        """
        self._installed += 1
        if self._installed > 1:
            return
        self.signals, self.is_time_over = 0, False  # a notebook may train again after a stop
        self._leaves_at_once = False
        self._raised.clear()
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        for number in numbers:
            if not (number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._in_main_thread)
        if MASKS:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._receiver = threading.Thread(target=self._receive, name="signals", daemon=True)
            self._receiver.start()  # before the mask, which threads inherit too
            signal.pthread_sigmask(signal.SIG_BLOCK, self._before)

    def restore(self) -> None:
        """Give the signals back to whoever had them before `install`, as a notebook."""
        self._installed -= 1
        if self._installed > 0:
            return
        if self._receiver is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
            signal.set_wakeup_fd(self._wakeup_before)
            reading, writing = self._pipe
            os.close(writing)
            self._receiver.join()
            os.close(reading)
            self._receiver = self._pipe = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self) -> None:
        while received := os.read(self._pipe[0], 1):
            if received[0] in self._before:  # the pipe gets all signals that Python handles
                self._remember(received[0])

    def _in_main_thread(self, number: int, frame) -> None:
        if not MASKS:
            self._remember(number)
        if self._leaves_at_once and not self._raised.is_set():  # once: cleaning up goes undisturbed
            self._raised.set()
            raise KeyboardInterrupt

    def _remember(self, number: int) -> None:
        self.signals += 1
        if self.signals == 1 and os.environ.get("RANK", "0") == "0":
            # Apart, since a pipe that nobody empties would keep the next signals from being counted.
            threading.Thread(target=_say_that_it_stops, daemon=True).start()
        if number == signal.SIGINT and self.signals >= 3 and "WORLD_SIZE" not in os.environ:
            self._leaves_at_once = True
            if MASKS:
                _thread.interrupt_main()
                if not self._raised.wait(SECONDS_TO_LEAVE):
                    os._exit(130)


def _say_that_it_stops() -> None:
    with contextlib.suppress(OSError):  # `tee` gets the same Ctrl-C, and then nobody reads this
        os.write(2, b"\nstopping and saving (Ctrl-C two more times: stop without saving)\n")


class StopVote:
    """Decides between two micro-batches whether all ranks drop the step, since no rank may drop one that others finish.

    Several ranks vote every few micro-batches, about SECONDS_BETWEEN_VOTES apart: the number between two votes doubles
    while that takes less time on every rank, and halves otherwise. The ranks know the sums of the votes only, so all
    of them vote at the same micro-batches. Steps that take less time soon have no vote at all.

    Args:
        all_sum: adds numbers up over all ranks, see `Processes`.
        alone: there is a single rank, which decides by itself at every micro-batch.
    """

    def __init__(self, all_sum: Callable[[list[float]], list[float]], alone: bool) -> None:
        self._all_sum, self._alone = all_sum, alone
        self._distance, self._last_micro, self._last_time = 1, 0, 0.0  # micro-batches between two votes; the last vote

    def drops_step(self, micro: int, stop_asked: bool) -> bool:
        """Whether to drop the step before micro-batch `micro`, the same on all ranks.

        Args:
            micro: its number in the step; every rank calls this for 0, 1, 2 and so on.
            stop_asked: whether this rank got a signal.
        """
        if micro == 0:
            self._last_micro, self._last_time = 0, time.monotonic()
            return False
        if self._alone:
            return stop_asked
        if micro - self._last_micro < self._distance:
            return False
        slow = time.monotonic() - self._last_time > SECONDS_BETWEEN_VOTES
        stop_votes, slow_votes = self._all_sum([float(stop_asked), float(slow)])
        self._distance = max(1, self._distance // 2) if slow_votes else 2 * self._distance
        self._last_micro, self._last_time = micro, time.monotonic()
        return stop_votes > 0
