"""Whom slow steps wait for, from what the ranks report. With real processes: test_processes.py."""

import dataclasses

import pytest

from model.runs import slow_steps
from model.runs.slow_steps import SETTLED, RankReport, SlowSteps, StepTimes

NAMES = [f"{rank} on node-{rank}" for rank in range(4)]


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(slow_steps, "time", clock)
    return clock


@pytest.fixture
def times(clock):
    """Of a rank whose usual step takes 0.2 s, half of it work, and whose step in progress has lasted 12 s."""
    times = StepTimes()
    for _ in range(SETTLED):
        times.begin()
        clock.now += 0.1
        times.wait()
        clock.now += 0.1
        times.end()
    times.begin()
    clock.now += 12
    return times


def reports(**of_rank_3):
    """One of each rank, all of which are alike but for the last."""
    alike = RankReport(round=9, count=50, working=0.1, answer=0.001, doing="the gradients of step 21")
    return {rank: alike for rank in range(3)} | {3: dataclasses.replace(alike, **of_rank_3)}


def test_steps_are_timed_with_what_a_rank_works_in_them(times):
    assert (times.usual, times.working) == (pytest.approx(0.2), pytest.approx(0.1))
    assert times.lasting() == pytest.approx(12)


def test_nothing_is_known_of_the_first_steps():
    times = StepTimes()
    for _ in range(SETTLED - 1):
        times.begin()
        times.end()
    assert times.usual is None and SlowSteps(times, NAMES).look(reports(working=9.0, count=1)) is None


@pytest.mark.parametrize(
    ("of_rank_3", "cause"),
    [
        ({"count": 49, "doing": "reading the batch of step 21"},
         "the others wait for rank 3 on node-3 (reading the batch of step 21)"),
        ({"answer": 0.9}, "all ranks have computed their part and wait for the network; the link of rank 3 on node-3 is"
                          " slow (an answer takes 0.9 s)"),
        ({}, "all ranks have computed their part and wait for the network; no link stands out"),
    ],
    ids=["a rank", "a link", "neither"],
)  # fmt: skip
def test_a_slow_step_has_a_cause_and_is_said_once(times, of_rank_3, cause):
    slow = SlowSteps(times, NAMES)
    assert slow.look(reports(**of_rank_3)) == f"a step has taken 12 s so far, 0.2 s is usual: {cause}"
    assert slow.look(reports(**of_rank_3)) is None


def test_the_network_alone_is_blamed_only_once_a_slow_link_would_be_known(times, clock):
    times.end()
    times.begin()
    clock.now += 7
    slow = SlowSteps(times, NAMES)
    assert slow.look(reports()) is None
    assert slow.look(reports(answer=0.9)).endswith("the link of rank 3 on node-3 is slow (an answer takes 0.9 s)")


def rounds(number, **of_rank_3):
    """Reports of a later round of all ranks but the last, which reports no more."""
    found = reports(**of_rank_3)
    return {rank: dataclasses.replace(found[rank], round=number) for rank in range(3)} | {3: found[3]}


def test_a_rank_that_no_longer_reports_is_named_before_all_others(times, clock):
    times.end()  # nothing is slow yet
    slow = SlowSteps(times, NAMES)
    assert [slow.look(rounds(number)) for number in range(slow_steps.SILENT_ROUNDS + 1)] == [None] * 4
    times.begin()
    clock.now += 7
    line = slow.look(rounds(99, count=49))
    assert line.endswith("rank 3 on node-3 does not report (last: the gradients of step 21)")


def test_a_rank_that_lags_in_each_step_is_named_again_only_after_it_has_kept_up(times):
    times.end()
    slow = SlowSteps(times, NAMES)
    line = "rank 3 on node-3 is slow: it works 0.5 s in each step, the others 0.1 s, and wait for it"
    assert slow.look(reports(working=0.5)) == line
    assert slow.look(reports(working=0.6)) is None
    assert slow.look(reports()) is None
    assert slow.look(reports(working=0.5)) == line
    assert slow.look(reports(working=0.12)) is None


def test_a_report_is_read_as_it_was_written():
    for report in (reports(doing="a|b")[3], reports(working=None)[3]):
        assert RankReport.decoded(report.encoded()) == report
