"""Processes started by `launch` have time to save after Ctrl-C; only the third one cuts them off."""

import os
import signal
import subprocess
import sys
import time

import pytest

from model.runs import launch
from tests import forks
from tests.conftest import ROOT
from tests.tiny_runs import HUNG, ONE_THREAD, wait_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

# A worker that needs some seconds to save, as a large model would.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from model.runs.launch import end_with_parent
end_with_parent()  # as train.py does
folder, saving = Path(__file__).parent, []
for name in ("SIGINT", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda *_: saving.append(1))
(folder / f"ready{os.environ['RANK']}").touch()
while not saving:
    time.sleep(0.05)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    time.sleep(0.05)
if os.environ["RANK"] == "0":
    from model.runs.status import Status
    Status(folder, 2, 9).write("interrupted", 5)
(folder / f"saved{os.environ['RANK']}").touch()
"""
DRIVER = """
import sys
from pathlib import Path
from model.runs import launch
launch.SECONDS_TO_SAVE = float(sys.argv[3])
sys.exit(launch.launch(2, sys.argv[1:3], Path(sys.argv[1]).parent))
"""


def interrupt(folder, times, seconds_needed, seconds_allowed):
    """Start two workers and send Ctrl-C to all; the exit code, and the ranks that saved."""
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    process = forks.Popen(
        [sys.executable, "-c", DRIVER, str(worker), str(seconds_needed), str(seconds_allowed)],
        env=ONE_THREAD | {"PYTHONPATH": str(ROOT)}, start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: all((folder / f"ready{rank}").exists() for rank in (0, 1)), process)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.4)
    errors = process.communicate(timeout=HUNG)[1]
    assert "SignalException: " not in errors, errors
    return process.returncode, [rank for rank in (0, 1) if (folder / f"saved{rank}").exists()]


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2])
def test_workers_may_save_after_ctrl_c(tmp_path, times):
    assert interrupt(tmp_path, times, seconds_needed=2, seconds_allowed=HUNG) == (130, [0, 1])


@pytest.mark.long
def test_the_third_ctrl_c_waits_for_nobody(tmp_path):
    assert interrupt(tmp_path, 3, seconds_needed=9 * HUNG, seconds_allowed=9 * HUNG) == (130, [])


@pytest.mark.long
def test_the_time_to_save_is_limited(tmp_path):
    assert interrupt(tmp_path, 1, seconds_needed=9 * HUNG, seconds_allowed=1) == (130, [])


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("is_host=1,join_timeout=2", "not all of 2 nodes came to 127.0.0.1:{port} in time (torchrun's join_timeout)"),
        ("is_host=0,read_timeout=2", "127.0.0.1:{port}, where the nodes meet, does not answer; its node may have"),
    ],
    ids=["a node is missing", "the first node is missing"],
)  # fmt: skip
def test_nodes_that_do_not_meet_are_one_line(tmp_path, how, line):
    port = forks.free_port()
    (tmp_path / "config.yaml").write_text("training:\n  max_steps: 1\n")
    meeting = {"NNODES": "2", "RDZV_ID": "run1", "RDZV_BACKEND": "c10d", "RDZV_CONF": how}
    meeting |= {"RDZV_ENDPOINT": f"127.0.0.1:{port}"}
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "config.yaml"), "--nproc_per_node=1"]
    result = forks.run(
        command, env=ONE_THREAD | {f"PET_{name}": value for name, value in meeting.items()},
        capture_output=True, text=True, timeout=HUNG, cwd=tmp_path,
    )  # fmt: skip
    errors = [found for found in result.stderr.splitlines() if "error: " in found]
    assert result.returncode == 4, result.stderr
    assert len(errors) == 1 and line.format(port=port) in errors[0], result.stderr
    assert errors[0].endswith("start the same command again on each node")
    assert "Traceback" not in result.stderr


def test_advice_on_slow_saves_comes_under_plain_torchrun_only(monkeypatch):
    for name in ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", launch.OURS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launch.advice_on_slow_saves(10) is None
    assert "saving took 20 s, and torchrun kills its workers 30 s after Ctrl-C" in launch.advice_on_slow_saves(20)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    assert launch.advice_on_slow_saves(20) is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launch.advice_on_slow_saves(1000) is None
