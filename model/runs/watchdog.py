"""Ends a job in which processes wait for one that died or hangs, and names it.

Every process counts its progress (`beat`), and a thread writes the count into the store that all processes share
(torch.distributed's TCPStore). A collective that waits does not say for whom; the counts do: a dead rank no longer
reports, a rank that hangs has the lowest count. The first rank to find out reports it to the others, before its end
makes it look like the culprit.

Rank 0 also says whom slow steps wait for (`slow_steps.py`).
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence

from model.runs.slow_steps import RankReport, SlowSteps, StepTimes

FAREWELL_SECONDS = 5.0  # that a process has to end by itself after another one failed or has finished
START_PATIENCE = 3.0  # timeouts that may pass before the first beat, while imports, data and a checkpoint are read
REQUEST_SECONDS = 10.0  # that the store may take to answer


class Watchdog:
    """Watches the processes of one job.

    Args:
        store: shared by all processes; this thread needs a separate connection (`Store.clone()`).
        rank: of this process.
        hosts: the name of each rank's machine.
        timeout: seconds without progress of any process, after which this one gives up.
        give_up: called in the watchdog's thread with a sentence on the fault; it must end the process.
        kept_by: the rank that hosts the store; None: the launcher does.
        say: called in the watchdog's thread with a line on what is slow; None: nobody looks for that.

    Attributes:
        times: of this rank's steps.
    """

    def __init__(
        self,
        store,
        rank: int,
        hosts: list[str],
        timeout: float,
        give_up: Callable[[str], None],
        kept_by: int | None = 0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._store, self._rank, self._others = store, rank, [r for r in range(len(hosts)) if r != rank]
        several = len(set(hosts)) > 1
        launcher = f"the launcher on {os.environ.get('MASTER_ADDR')}" if several else "the launcher"
        self._names = [f"{number} on {host}" if several else str(number) for number, host in enumerate(hosts)]
        self._keeper = launcher if kept_by is None else f"rank {self._names[kept_by]}"
        self._timeout, self._give_up, self._say = timeout, give_up, say
        self._interval = min(1.0, timeout / 10)  # seconds between two looks
        self._line = _Line(min(REQUEST_SECONDS, timeout / 2))
        self._count, self._doing, self._patience, self._moved = 0, "starting", START_PATIENCE, time.monotonic()
        self._heard: str | None = None  # what went wrong, according to another process
        self._known: float | None = None  # when this process reported what went wrong, or heard of it
        self._has_announced = False  # why this process ends: its main thread says so itself
        self._alive = 0  # rounds of this thread
        self._last_reports: dict[int, tuple] = {}  # of `who_is_silent`: each rank's, and since when it is the same
        self._answer = 0.0  # that the store's last answer took
        self.times = StepTimes()
        self._slow_steps = SlowSteps(self.times, self._names)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Report progress.

        Args:
            doing: what this process does next, for the message.
            patience: how many timeouts that may take.
        """
        self._count += 1
        self._doing, self._patience, self._moved = doing, patience, time.monotonic()
        self.times.work()

    def arrive(self) -> None:
        """Report progress to a point where this process waits for the others."""
        self._count += 1
        self._moved = time.monotonic()
        self.times.wait()

    @property
    def heard(self) -> str | None:
        """What went wrong, as another process has said; None: nothing that this process knows of."""
        return self._heard

    @property
    def failed(self) -> bool:
        """Whether this process has told the others, or heard from them, that something went wrong."""
        return self._known is not None

    def stop(self) -> None:
        """The job is over."""
        self._over.set()
        self._thread.join(timeout=5)
        self._linger()

    def announce(self, message: str) -> None:
        """Tell the other processes why this one ends. From here on the watchdog says nothing of that itself."""
        self._has_announced = True
        self._tell_others(f"rank {self._names[self._rank]} failed: {message}")

    def _tell_others(self, message: str, silent: Sequence[int] = ()) -> None:
        """Report what went wrong, unless another process was first; `silent` ranks are not expected to read it."""
        if not self._listen():
            self._ask(lambda: self._store.set("wrong", message))
            self._known = time.monotonic()
            for rank in (self._rank, *silent):
                self._ask(lambda rank=rank: self._store.set(f"heard/{rank}", ""))

    def _linger(self) -> None:
        """Wait until the others know what went wrong: torchrun stops them once this process has ended, and the store
        may end with it."""
        if self._known is None:
            return
        heard = [f"heard/{rank}" for rank in self._others]
        while time.monotonic() < self._known + FAREWELL_SECONDS and not self._ask(lambda: self._store.check(heard)):
            if not self._line.answers:
                return
            time.sleep(self._interval / 4)

    def _listen(self) -> str | None:
        """What went wrong, if a process has reported it."""
        if self._heard is None and (heard := self._ask(self._read_report)) is not None:
            self._heard, self._known = heard, time.monotonic()
        return self._heard

    def _read_report(self) -> str | None:
        if not self._store.check(["wrong"]):
            return None
        message = self._store.get("wrong").decode()
        self._store.set(f"heard/{self._rank}", "")
        return message

    def whom_to_blame(self) -> str:
        """One sentence about the process that the others wait for; takes some seconds, to see who still reports."""
        gone = self.who_is_gone()
        if gone is None:
            gone = self._who_lags()
            self._tell_others(gone)
        return gone

    def who_is_gone(self) -> str | None:
        """One sentence about a process that failed or no longer reports; None: all are alive. Takes some seconds."""
        before = {rank: self._report(rank) for rank in self._others}
        for _ in range(3):
            self._tell()  # this may be the watchdog's thread itself
            if (heard := self._listen()) is not None:
                return heard
            time.sleep(self._interval)
        now = {rank: self._report(rank) for rank in self._others}
        if (heard := self._listen()) is not None:
            return heard
        if not self._line.answers:
            return f"{self._keeper} no longer answers"
        silent = [rank for rank in self._others if now[rank] is None or now[rank] == before[rank]]
        if not silent:
            return None
        last = now[silent[0]]
        message = f"rank {self._listed(silent)} no longer answers" + (f" (last: {last.doing})" if last else "")
        self._tell_others(message, silent)
        return message

    def who_is_silent(self, seconds: float) -> str | None:
        """As `who_is_gone`, of a process that has not reported for so long while this was called again and again. For
        threads that wait for the others where nothing breaks when one of them ends."""
        now = time.monotonic()
        for rank in self._others:
            report = self._report(rank)
            if rank not in self._last_reports or self._last_reports[rank][0] != report:
                self._last_reports[rank] = report, now
        is_silent = any(now - since > seconds for _, since in self._last_reports.values())
        return self.who_is_gone() if is_silent else None

    def _who_lags(self) -> str:
        unknown = RankReport(0, self._count, None, 0, "unknown")
        now = {rank: self._report(rank) or unknown for rank in self._others} | {self._rank: self._own_report()}
        counts = {rank: report.count for rank, report in now.items()}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        doing = now[behind[0]].doing
        if len(behind) == len(counts):
            return f"all processes hang in the same place ({doing})"
        return f"rank {self._listed(behind)} hangs in: {doing}"

    def _listed(self, ranks: list[int]) -> str:
        names = [self._names[rank] for rank in ranks]
        return " and ".join(names) if len(names) < 3 else ", ".join(names)

    def _watch(self) -> None:
        reports, moved = {}, 0.0  # of the others, and when they last changed
        failed_since = None
        while not self._over.wait(self._interval):
            self._tell()
            asked = time.monotonic()
            failed = self._listen() is not None or self._line.broken
            self._answer = time.monotonic() - asked
            if self._say is not None and not failed:
                self._look_for_slowness(self._say)
            standing = time.monotonic() - self._moved
            if standing < self._interval:
                failed_since = None
                continue
            # This process works or waits. Has another one failed? Do the others make progress?
            if failed and not self._has_announced:
                failed_since = failed_since or time.monotonic()
                if time.monotonic() - failed_since > FAREWELL_SECONDS:
                    self._end(self.whom_to_blame())
            if standing > self._timeout / 2:
                seen = {rank: report and report.count for rank in self._others for report in [self._report(rank)]}
                if seen != reports:
                    reports, moved = seen, time.monotonic()
                still = time.monotonic() - moved >= self._timeout / 2
                if still and standing > self._timeout * self._patience:
                    self._end(f"no progress for {standing:.0f} s (ddp_timeout): {self.whom_to_blame()}")

    def _end(self, message: str) -> None:
        self._linger()
        if not self._over.is_set():  # else the main thread has come to an end by itself meanwhile
            self._give_up(message)

    def _look_for_slowness(self, say: Callable[[str], None]) -> None:
        if self.times.usual is None or (found := self._ask(self._read_reports)) is None:
            return
        reports = dict(zip(self._others, found, strict=True)) | {self._rank: self._own_report()}
        if (line := self._slow_steps.look(reports)) is not None:
            say(line)

    def _read_reports(self) -> list[RankReport] | None:
        """Those of all others, with two requests however many they are; None: one has not reported yet."""
        keys = [f"report/{rank}" for rank in self._others]
        return (
            [RankReport.decoded(text.decode()) for text in self._store.multi_get(keys)]
            if self._store.check(keys)
            else None
        )

    def _own_report(self) -> RankReport:
        return RankReport(self._alive, self._count, self.times.working, self._answer, self._doing)

    def _tell(self) -> None:
        self._alive += 1
        report = self._own_report().encoded()
        self._ask(lambda: self._store.set(f"report/{self._rank}", report))

    def _report(self, rank: int) -> RankReport | None:
        """A rank's last report; None: none yet."""
        key = f"report/{rank}"
        found = self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)
        return RankReport.decoded(found) if found else None

    def _ask(self, request):
        """The store's answer; None: there is none."""
        return self._line.ask(request)


class _Line:
    """Asks the store in a separate thread: a host that has lost its power does not even refuse the connection.

    Args:
        seconds: that an answer may take.
    """

    def __init__(self, seconds: float) -> None:
        self.answers, self.broken = True, False  # broken: the store's host has closed the connection
        self._seconds, self._requests = seconds, queue.SimpleQueue()
        threading.Thread(target=self._work, name="watchdog's line", daemon=True).start()

    def ask(self, request: Callable):
        """What the request returns; None if the store does not answer in time, or is gone."""
        reply = queue.SimpleQueue()
        self._requests.put((request, reply))
        try:
            self.broken, value = reply.get(timeout=self._seconds if self.answers else 0.05)
            self.answers = not self.broken
        except queue.Empty:
            self.answers, value = False, None
        return value

    def _work(self) -> None:
        while True:
            request, reply = self._requests.get()
            try:
                reply.put((False, request()))
            except RuntimeError:  # torch's errors of the network and the store
                reply.put((True, None))
