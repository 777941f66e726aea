"""What the system says of itself, with psutil and without it."""

import subprocess
import sys

import pytest

from model.storage import system


@pytest.fixture(params=["psutil", "without psutil"])
def way(request, monkeypatch):
    if request.param == "without psutil":
        monkeypatch.setattr(system, "psutil", None)
    return request.param


def test_a_process_runs_until_it_has_ended(way):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert system.is_running(process.pid)
    process.communicate()
    assert not system.is_running(process.pid) or (way != "psutil" and sys.platform == "win32")


@pytest.mark.skipif(sys.platform == "win32", reason="there, all numbers are taken for running")
def test_somebody_elses_process_runs(way, monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    monkeypatch.setattr(system.os, "kill", refuse)
    assert system.is_running(1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/meminfo")
def test_both_ways_find_about_the_same_memory(monkeypatch):
    found = system.available_memory(), system.free_swap()
    monkeypatch.setattr(system, "psutil", None)
    assert system.available_memory() == pytest.approx(found[0], rel=0.3)
    assert system.free_swap() == pytest.approx(found[1], rel=0.3)


def test_where_nobody_says_memory_is_not_checked(monkeypatch):
    monkeypatch.setattr(system, "psutil", None)
    monkeypatch.setattr(system, "Path", lambda name: system.sys.modules["pathlib"].Path("/no", "such", "file"))
    assert system.available_memory() == system.UNKNOWN and system.free_swap() == 0
