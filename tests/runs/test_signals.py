"""Ctrl-C as a terminal sends it, to every process of the group; what a notebook gets back afterwards."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from model.runs.signals import StopSignal
from model.runs.status import MOST_OF_REASON, Status, read_status
from tests import forks
from tests.conftest import ROOT
from tests.tiny_runs import HUNG, ONE_THREAD, command, wait_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

# Stands in for a C++ compiler: says that it compiles a kernel, takes its time, and then compiles, unoptimised.
SLOW_COMPILER = """#!{python} -S
import os, sys, time
if any("main.cpp" in word for word in sys.argv) and not os.path.exists({marker!r}):
    open({marker!r}, "w").close()
    time.sleep(2)
os.execvp("g++", ["g++", *sys.argv[1:], "-O0"])
"""


def start(arguments, **environment):
    """A process that leads a group, as a terminal's foreground job does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return forks.Popen(arguments, start_new_session=True, env=ONE_THREAD | environment, **pipes)


@pytest.mark.slow
def test_ctrl_c_while_a_compiler_runs_saves_a_checkpoint(flags, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(SLOW_COMPILER.format(python=sys.executable, marker=str(tmp_path / "compiling")))
    compiler.chmod(0o755)
    # No compiled file of an earlier run is found, and none stays.
    places = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "CXX": str(compiler)}
    process = start(command(flags(compile="true", n_layers=1, dtype="float32")), **places)
    wait_for((tmp_path / "compiling").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert any("stopping and saving" in line for line in process.stderr)
    errors = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 130, errors
    assert (tmp_path / "out" / "checkpoint_interrupted.pth").exists()
    status = read_status(tmp_path / "out")
    assert status["state"] == "interrupted" and status["step"] == 1
    assert "Traceback" not in errors and len(errors.splitlines()) < 20


@pytest.mark.long
def test_the_third_ctrl_c_leaves_a_status_that_says_interrupted(flags, tmp_path):
    large = flags(batch_size=512, dim=256, hidden_dim=2048)  # a micro-batch takes seconds
    process = start(command(large))
    wait_for((tmp_path / "out" / "status.json").exists, process)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in errors, errors
    status = read_status(tmp_path / "out")
    assert (status["state"], status["exit_code"]) == ("interrupted", 130)
    assert "without saving" in status["message"]
    assert not (tmp_path / "out" / "checkpoint_interrupted.pth").exists()


PARTS = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from model.runs.signals import StopSignal
stop = StopSignal()
stop.install()
{body}
"""


def run_with_signals(body, *signals):
    """What a process with an installed StopSignal prints when its group gets these signals once it says `ready`."""
    process = start([sys.executable, "-c", PARTS.format(root=str(ROOT), body=body)])
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        os.killpg(process.pid, number)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=HUNG)
    return process.returncode, output, errors


@pytest.mark.long
def test_what_training_starts_survives_ctrl_c_and_the_message_comes_at_once():
    child = "[sys.executable, '-c', 'import time; print(\"ready\", flush=True); time.sleep(1); print(\"whole\")']"
    body = f"import subprocess; print(subprocess.run({child}).returncode, stop.count)"
    code, output, errors = run_with_signals(body, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    assert (code, output) == (0, "whole\n0 3\n"), errors
    assert errors.count("stopping and saving") == 1


@pytest.mark.long
def test_the_third_ctrl_c_ends_even_a_call_that_never_returns():
    lock = "import threading; print('ready', flush=True); lock = threading.Lock(); lock.acquire(); lock.acquire()"
    code, _, errors = run_with_signals(lock, *[signal.SIGINT] * 3)
    assert code == 130 and "Traceback" not in errors


@pytest.mark.long
def test_the_third_ctrl_c_ends_a_process_whose_log_nobody_reads():
    full = "os.set_blocking(2, False)\ntry:\n    while os.write(2, b'x' * 4096): pass\nexcept BlockingIOError: pass\n"
    body = f"{full}os.set_blocking(2, True)\nprint('ready', flush=True)\nos.write(2, b'x' * (1 << 20))"
    process = start([sys.executable, "-c", PARTS.format(root=str(ROOT), body=body)])
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    assert process.wait(HUNG) == 130
    process.stdout.close(), process.stderr.close()


def test_a_notebook_gets_its_handlers_and_its_mask_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    mask, files = signal.pthread_sigmask(signal.SIG_BLOCK, []), len(os.listdir("/dev/fd"))
    stop = StopSignal()
    for _ in range(2):
        stop.install()
        stop.install()  # by a script, around the training's own
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        stop.restore()
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
        stop.restore()
        assert stop.count == 1  # of this session only
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert len(os.listdir("/dev/fd")) == files
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_message_of_any_length_leaves_a_small_status(tmp_path):
    Status(tmp_path, 1, 10).write("failed", 3, message="line\n" * 20_000)
    written = json.loads((tmp_path / "status.json").read_text())
    assert len(written["message"]) == MOST_OF_REASON and "\n" not in written["message"]
