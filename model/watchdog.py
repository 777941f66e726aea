"""Who is missing when several processes wait for each other: the watch that ends a job that stands still.

Every process counts how far it has come (`beat`), and a thread of its own writes the count into the store that all
processes share (torch.distributed's TCPStore). A collective that waits says nothing about whom it waits for; the counts
do: who died no longer writes, who hangs has the lowest count.
"""

import threading
import time
from collections.abc import Callable

FAREWELL_SECONDS = 5.0  # for a process that learns that another one has failed, to end by itself


class Watchdog:
    """Watches the processes of one job.

    Args:
        store: shared by all processes, with a connection of its own for this thread (`Store.clone()`).
        rank, world_size: of this process, and how many there are.
        timeout: seconds in which no process came any further, after which this process gives up.
        give_up: called from the watching thread with what is wrong; it must end the process.
    """

    def __init__(self, store, rank: int, world_size: int, timeout: float, give_up: Callable[[str], None]) -> None:
        self._store, self._rank, self._others = store, rank, [r for r in range(world_size) if r != rank]
        self._timeout, self._give_up = timeout, give_up
        self._interval = min(1.0, timeout / 10)  # seconds between two looks
        self._lock = threading.Lock()  # one request at a time: the main thread asks too when something broke
        self._count, self._doing, self._patience, self._moved = 0, "starting", 1.0, time.monotonic()
        self._alive = 0  # how often this thread has looked
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """This process came further.

        Args:
            doing: what it does now, for the message.
            patience: how many timeouts that may take.
        """
        self._count += 1
        self._doing, self._patience, self._moved = doing, patience, time.monotonic()

    def stop(self) -> None:
        """The job is over."""
        self._over.set()
        self._thread.join(timeout=5)

    def announce(self, message: str) -> None:
        """Tell the other processes why this one ends."""
        self._ask(lambda: self._store.set(f"failed/{self._rank}", message))
        self._ask(lambda: self._store.set("failed", "1"))

    def whom_to_blame(self) -> str:
        """One sentence on the process that the others wait for; takes some seconds, to see who still writes."""
        before = {rank: self._report(rank) for rank in self._others}
        for _ in range(3):
            for rank in self._others:
                if (message := self._failure(rank)) is not None:
                    return f"rank {rank} failed: {message}"
            time.sleep(self._interval)
        now = {rank: self._report(rank) for rank in self._others}
        silent = [rank for rank in self._others if now[rank] is None or now[rank] == before[rank]]
        if silent:
            last = now[silent[0]]
            return f"rank {_listed(silent)} no longer answers" + (f" (last: {last[2]})" if last else "")
        counts = {rank: int(report[1]) for rank, report in now.items()} | {self._rank: self._count}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        doing = self._doing if behind[0] == self._rank else now[behind[0]][2]
        if len(behind) == len(counts):
            return f"all processes hang in the same place ({doing})"
        return f"rank {_listed(behind)} hangs in: {doing}"

    def _watch(self) -> None:
        reports, moved = {}, 0.0  # of the others, and when they last changed
        failed_since = None
        while not self._over.wait(self._interval):
            self._alive += 1
            self._tell()
            standing = time.monotonic() - self._moved
            if standing < self._interval:
                failed_since = None
                continue
            # This process works or waits. Has another one failed? Do the others come further?
            if self._somebody_failed():
                failed_since = failed_since or time.monotonic()
                if time.monotonic() - failed_since > FAREWELL_SECONDS:
                    self._give_up(self.whom_to_blame())
            if standing > self._timeout / 2:
                seen = {rank: (self._report(rank) or ("", "", ""))[1] for rank in self._others}
                if seen != reports:
                    reports, moved = seen, time.monotonic()
                still = time.monotonic() - moved >= self._timeout / 2
                if still and standing > self._timeout * self._patience:
                    self._give_up(f"no progress for {standing:.0f} s (ddp_timeout): {self.whom_to_blame()}")

    def _tell(self) -> None:
        report = f"{self._alive}|{self._count}|{self._doing}"
        self._ask(lambda: self._store.set(f"report/{self._rank}", report))

    def _somebody_failed(self) -> bool:
        """Whether a process said so, or the one that keeps the store is gone."""
        return self._ask(lambda: self._store.check(["failed"])) in (True, None)

    def _failure(self, rank: int) -> str | None:
        key = f"failed/{rank}"
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def _report(self, rank: int) -> tuple[str, str, str] | None:
        """How often that rank has looked, how far it has come, what it does; None where it has not said."""
        key = f"report/{rank}"
        found = self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)
        return tuple(found.split("|", 2)) if found else None

    def _ask(self, request):
        """What the store answers; None where it no longer does: the process that keeps it is gone."""
        with self._lock:
            try:
                return request()
            except RuntimeError:  # torch's errors of the network and the store
                return None


def _listed(ranks: list[int]) -> str:
    return " and ".join(map(str, ranks)) if len(ranks) < 3 else ", ".join(map(str, ranks))
