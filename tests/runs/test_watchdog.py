"""The watchdog's last word: said for a main thread that waits, never beside one that says its own."""

import time

import pytest
import torch.distributed as dist

from model.runs import watchdog
from model.runs.watchdog import Watchdog


@pytest.fixture
def watched(monkeypatch):
    """Rank 0 of two, and what its watchdog would have said before ending the process."""
    monkeypatch.setattr(watchdog, "FAREWELL_SECONDS", 0.3)
    store, said = dist.HashStore(), []
    one = Watchdog(store, 0, ["a", "a"], 1.0, said.append)
    yield one, store, said
    one.stop()


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def test_what_another_rank_reported_is_said_where_the_main_thread_waits(watched):
    _, store, said = watched
    store.set("wrong", "rank 1 failed: no such file")
    wait_for(lambda: said, 30)
    assert said[0] == "rank 1 failed: no such file"


def test_a_process_that_has_announced_why_it_ends_says_so_once(watched):
    one, store, said = watched
    one.announce("no such file")
    assert store.get("wrong").decode() == "rank 0 failed: no such file"
    wait_for(lambda: said, 2)
    assert not said


def test_a_process_that_ends_by_itself_is_not_ended_again(watched):
    one, _, said = watched
    one._over.set()
    one._end("rank 1 failed")
    assert not said
