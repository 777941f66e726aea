"""Which rank do the others wait for, when a step is slow or one rank always is?

Every rank times its steps, and how much of each it works: from when it begins until it waits for the others, and again
from when it goes on. What it found travels to rank 0 with the watchdog's reports.
"""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SETTLED = 20  # steps, after which it is known what is usual
SLOW_TIMES, LEAST_SECONDS = 5.0, 5.0  # a step is slow that lasts so many times the usual, and so long
LAGS_TIMES, LEAST_SHARE = 2.0, 0.25  # a rank is slow that works so many times as long, for such a share of a step more
SLOW_LINK_TIMES, LEAST_ANSWER = 10.0, 0.05  # a link is slow whose answers take so many times as long, and so long
DOUBT_SECONDS = 5.0  # for a slow answer to be reported, before the network is blamed without a name
SILENT_ROUNDS = 3  # without a report, after which a rank counts as silent
QUIET_SECONDS = 60.0  # from one line on a slow step to the next


class StepTimes:
    """What steps of this rank take; its numbers are those of the last SETTLED steps.

    Attributes:
        usual: median seconds of a step; None: too few were taken.
        working: median seconds of a step in which this rank works; None: as above.
    """

    def __init__(self) -> None:
        self.usual: float | None = None
        self.working: float | None = None
        self._began: float | None = None  # the step in progress
        self._work_began: float | None = None  # None: this rank waits
        self._worked = 0.0  # seconds, in the step in progress
        self._steps, self._work = deque(maxlen=SETTLED), deque(maxlen=SETTLED)

    def begin(self) -> None:
        """A step begins."""
        self._began = self._work_began = time.monotonic()
        self._worked = 0.0

    def work(self) -> None:
        """This rank works from here on."""
        if self._work_began is None:
            self._work_began = time.monotonic()

    def wait(self) -> None:
        """This rank waits for the others from here on."""
        if self._work_began is not None:
            self._worked += time.monotonic() - self._work_began
            self._work_began = None

    def end(self) -> None:
        """The step is over."""
        self.wait()
        self._steps.append(time.monotonic() - self._began)
        self._work.append(self._worked)
        self._began = None
        if len(self._steps) == SETTLED:
            self.usual, self.working = statistics.median(self._steps), statistics.median(self._work)

    def lasting(self) -> float:
        """Seconds since the step in progress began; 0 between two."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began


@dataclass(frozen=True)
class RankReport:
    """What a rank reports each round.

    Attributes:
        round: of its watchdog.
        count: of its progress.
        working: seconds of a step in which it works, see `StepTimes`; None: not known yet.
        answer: seconds that the store's last answer took.
        doing: what it does.
    """

    round: int
    count: int
    working: float | None
    answer: float
    doing: str

    def encoded(self) -> str:
        working = "" if self.working is None else f"{self.working:.6f}"
        return f"{self.round}|{self.count}|{working}|{self.answer:.6f}|{self.doing}"

    @classmethod
    def decoded(cls, text: str) -> "RankReport":
        round, count, working, answer, doing = text.split("|", 4)
        return cls(int(round), int(count), float(working) if working else None, float(answer), doing)


class SlowSteps:
    """Finds out, from all ranks' reports, whom the others wait for.

    Args:
        times: of this rank's steps.
        names: of the ranks, as messages have them.
    """

    def __init__(self, times: StepTimes, names: Sequence[str]) -> None:
        self._times, self._names = times, names
        self._rounds: dict[int, tuple[int, int]] = {}  # of each rank: its last round, and for how many looks
        self._quiet_until = 0.0
        self._slow_rank: int | None = None  # that was named

    def look(self, reports: Mapping[int, RankReport]) -> str | None:
        """One line on what has become slow since the last look; None: nothing.

        Args:
            reports: of all ranks, this one included; called once a round.
        """
        for rank, report in reports.items():
            before, looks = self._rounds.get(rank, (None, 0))
            self._rounds[rank] = report.round, looks + 1 if report.round == before else 0
        return self._slow_step(reports) or self._slow_rank_line(reports)

    def _slow_step(self, reports: Mapping[int, RankReport]) -> str | None:
        usual, lasting, now = self._times.usual, self._times.lasting(), time.monotonic()
        if usual is None or now < self._quiet_until:
            return None
        over = lasting - max(SLOW_TIMES * usual, LEAST_SECONDS)
        if over < 0 or (cause := self._cause(reports, over > DOUBT_SECONDS)) is None:
            return None
        self._quiet_until = now + QUIET_SECONDS
        return f"a step has taken {lasting:.0f} s so far, {usual:.2g} s is usual: {cause}"

    def _cause(self, reports: Mapping[int, RankReport], without_doubt: bool) -> str | None:
        """Whom or what a step in progress waits for; None: that is not known yet.

        Args:
            without_doubt: all slow answers have been reported.
        """
        if silent := [rank for rank, (_, looks) in self._rounds.items() if looks >= SILENT_ROUNDS]:
            rank = silent[0]
            return f"rank {self._names[rank]} does not report (last: {reports[rank].doing})"
        first = min(reports, key=lambda rank: reports[rank].count)
        if reports[first].count < max(report.count for report in reports.values()):
            return f"the others wait for rank {self._names[first]} ({reports[first].doing})"
        answers = {rank: report.answer for rank, report in reports.items()}
        slowest, others = _stands_out(answers)
        if answers[slowest] > max(SLOW_LINK_TIMES * others, LEAST_ANSWER):
            link = f"the link of rank {self._names[slowest]} is slow (an answer takes {answers[slowest]:.2g} s)"
        elif without_doubt:
            link = "no link stands out"
        else:
            return None
        return f"all ranks have computed their part and wait for the network; {link}"

    def _slow_rank_line(self, reports: Mapping[int, RankReport]) -> str | None:
        """A line when one rank becomes slower than the others, step after step."""
        seconds = {rank: report.working for rank, report in reports.items()}
        if self._times.usual is None or None in seconds.values():
            return None
        slowest, others = _stands_out(seconds)
        more = seconds[slowest] - others
        if seconds[slowest] < LAGS_TIMES * others or more < LEAST_SHARE * self._times.usual:
            self._slow_rank = None
            return None
        if self._slow_rank == slowest:
            return None
        self._slow_rank = slowest
        return (
            f"rank {self._names[slowest]} is slow: it works {seconds[slowest]:.2g} s in each step, the others"
            f" {others:.2g} s, and wait for it"
        )


def _stands_out(values: Mapping[int, float]) -> tuple[int, float]:
    """The rank of the highest value, and the median of the others."""
    highest = max(values, key=values.get)
    return highest, statistics.median(value for rank, value in values.items() if rank != highest)
