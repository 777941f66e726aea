"""Starting again: what a run that dies is worth, with real processes and signals; and the examples for clusters."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from model.runs.status import Status, read_status
from model.storage.archive import load_torch
from model.training.settings import build_settings
from tests import forks
from tests.conftest import ROOT
from tests.tiny_runs import HUNG, ONE_THREAD, assert_equal, command, run, train, wait_for
from train import read_settings

posix_only = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

# Stands in for train.py: each attempt notes its arguments and does what the plan says of it.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from model.runs.status import Status
folder = Path(sys.argv[1])
attempt = len(list(folder.glob("attempt_*")))
(folder / f"attempt_{{attempt}}").write_text(" ".join(sys.argv[2:]))
plan = json.loads((folder / "plan.json").read_text())[attempt]
if "checkpoint" in plan:
    (folder / "out" / plan["checkpoint"]).write_bytes(os.urandom(16))
status = Status(folder / "out", 1, 100)
if "state" in plan:
    status.write(plan["state"], attempt, message=plan.get("message"))
if "until" in plan:  # go on until this signal, as training does
    def stop(number, frame):
        status.write("interrupted", attempt, exit_code=130)
        sys.exit(plan["exit"])
    signal.signal(plan["until"], stop)
    if "deaf" in plan:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "waiting").touch()
    time.sleep(30)
if "kill" in plan:
    os.kill(os.getpid(), plan["kill"])
sys.exit(plan["exit"])
"""
DRIVER = """
import sys
sys.path.insert(0, {root!r})
from model.runs import supervisor
from model.runs.supervisor import Supervisor
supervisor.SECONDS_TO_LEAVE = 1
start = [sys.executable, {fake!r}, {folder!r}]
code = Supervisor(start, [*start, "--resume"], {out!r}, {restarts}, print, first_wait={wait}).run()
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a supervisor over a fake training that follows the plan."""
    (tmp_path / "out").mkdir()
    (tmp_path / "fake.py").write_text(FAKE.format(root=str(ROOT)))

    def begin(*plan, restarts=10, wait=0.01):
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        names = {"root": str(ROOT), "fake": str(tmp_path / "fake.py"), "folder": str(tmp_path)}
        driver = DRIVER.format(**names, out=str(tmp_path / "out"), restarts=restarts, wait=wait)
        return subprocess.Popen([sys.executable, "-u", "-c", driver], stdout=subprocess.PIPE, text=True)

    return begin


@pytest.fixture
def supervise(start):
    """Runs one to its end: (exit code, lines that it said)."""

    def finish(*plan, **options):
        process = start(*plan, **options)
        lines = process.communicate(timeout=HUNG)[0].splitlines()
        return process.returncode, lines

    return finish


def attempts(folder):
    """The arguments of each attempt."""
    return [(folder / f"attempt_{number}").read_text() for number in range(len(list(folder.glob("attempt_*"))))]


DONE = {"checkpoint": "checkpoint_step_99.pth", "state": "finished", "exit": 0}


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({"exit": 3, "state": "failed", "message": "rank 1 ended"}, "exit code 3 (rank 1 ended)"),
        ({"exit": 1, "state": "running"}, "exit code 1 after step 0 or later"),  # a Python crash
        ({"exit": 77}, "exit code 77"),
        pytest.param({"kill": 9, "state": "running"}, "killed by SIGKILL after step 0 or later", marks=posix_only),
        pytest.param({"kill": 11}, "killed by SIGSEGV", marks=posix_only),
        ({"exit": 137}, "killed by SIGKILL"),  # as a shell or the launcher of several processes reports it
    ],
)
def test_what_a_restart_can_help_is_started_again_from_its_checkpoint(supervise, tmp_path, end, said):
    code, lines = supervise({"checkpoint": "checkpoint_step_4.pth"} | end, DONE)
    assert code == 0 and attempts(tmp_path) == ["", "--resume"]
    assert lines == [f"restart 1 of 10: {said}; resuming from checkpoint_step_4.pth"]


@pytest.mark.parametrize(
    "end",
    [
        {"exit": 0, "state": "finished"},
        {"exit": 0, "state": "early_stopping"},
        {"exit": 1, "state": "diverged"},
        {"exit": 2},
        {"exit": 130, "state": "interrupted"},
    ],
)
def test_what_a_restart_cannot_help_ends_at_once(supervise, tmp_path, end):
    code, lines = supervise({"checkpoint": "checkpoint_step_4.pth"} | end)
    assert code == end["exit"] and lines == [] and len(attempts(tmp_path)) == 1


def test_a_status_of_an_earlier_start_does_not_count(supervise, tmp_path):
    Status(tmp_path / "out", 1, 100).write("diverged", 5, exit_code=1)
    code, _ = supervise({"exit": 1}, DONE)
    assert code == 0 and len(attempts(tmp_path)) == 2


def test_a_fault_that_repeats_ends_after_three_attempts(supervise, tmp_path):
    code, lines = supervise(*[{"exit": 3}] * 9)
    assert code == 3 and attempts(tmp_path) == [""] * 3  # nothing saved: the command as it was given
    assert lines[-1].startswith("giving up after 3 attempts in a row without a newer checkpoint")
    assert "the last one" not in lines[-1] and lines[-1].endswith("the last attempt: exit code 3")


def test_waiting_for_other_nodes_is_no_fault_that_repeats(supervise, tmp_path):
    code, lines = supervise({"exit": 3}, *[{"exit": 4}] * 5, DONE)
    assert code == 0 and len(attempts(tmp_path)) == 7 and len(lines) == 6


@pytest.mark.long
def test_a_newer_checkpoint_counts_as_progress(supervise, tmp_path):
    fails = {"exit": 3}
    saves = [{"checkpoint": f"checkpoint_step_{step}.pth", "exit": 3} for step in (4, 8)]
    code, _ = supervise(fails, fails, saves[0], fails, fails, saves[1], fails, DONE)
    assert code == 0 and attempts(tmp_path) == ["", "", ""] + ["--resume"] * 5


@pytest.mark.long
def test_no_more_restarts_than_asked_for(supervise, tmp_path):
    saves = [{"checkpoint": f"checkpoint_step_{step}.pth", "exit": 3} for step in range(9)]
    code, lines = supervise(*saves, restarts=4)
    assert code == 3 and len(attempts(tmp_path)) == 5 and lines[-1].startswith("giving up after 4 restarts")


def test_a_new_run_never_resumes_from_an_earlier_runs_checkpoint(supervise, tmp_path):
    (tmp_path / "out" / "checkpoint_step_99.pth").write_bytes(b"of another run")
    code, lines = supervise({"exit": 3}, DONE)
    assert code == 0 and attempts(tmp_path) == ["", ""] and "starting the same command again" in lines[0]


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_ends_it(start, tmp_path, number):
    process = start({"until": number, "exit": 130})
    wait_for((tmp_path / "waiting").exists, process)
    process.send_signal(number)
    assert process.communicate(timeout=HUNG)[0] == "" and process.returncode == 130
    assert read_status(tmp_path / "out")["state"] == "interrupted" and len(attempts(tmp_path)) == 1


@posix_only
def test_ctrl_c_is_passed_on_where_a_shell_had_it_ignored(start, tmp_path):
    """As a script's `&` does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start({"until": signal.SIGINT, "exit": 130})
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for((tmp_path / "waiting").exists, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HUNG)[0] == "" and process.returncode == 130


@pytest.mark.long
@posix_only
def test_a_child_that_hears_no_signal_is_killed_after_the_third(start, tmp_path):
    process = start({"until": signal.SIGHUP, "deaf": True, "exit": 130, "state": "running"})
    wait_for((tmp_path / "waiting").exists, process)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    process.communicate(timeout=HUNG)
    assert process.returncode == 137 and len(attempts(tmp_path)) == 1


@posix_only
def test_a_child_that_fails_while_it_stops_is_not_started_again(start, tmp_path):
    process = start({"until": signal.SIGTERM, "exit": 3}, DONE)
    wait_for((tmp_path / "waiting").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HUNG)
    assert process.returncode == 130 and len(attempts(tmp_path)) == 1  # as status.json says


@posix_only
def test_a_signal_ends_the_wait_between_two_attempts(start, tmp_path):
    process = start({"exit": 3}, DONE, wait=30)
    assert process.stdout.readline().startswith("restart 1 of 10")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HUNG)
    assert process.returncode == 130 and len(attempts(tmp_path)) == 1


@posix_only
def test_the_child_of_a_killed_supervisor_ends_cleanly_by_itself(start, tmp_path):
    process = start({"until": signal.SIGTERM, "exit": 130, "state": "running"})
    wait_for((tmp_path / "waiting").exists, process)
    process.kill()
    process.wait()
    os.kill(read_status(tmp_path / "out")["pid"], signal.SIGTERM)  # it is still there, and still listens
    wait_for(lambda: read_status(tmp_path / "out")["state"] == "interrupted")


# -------------------------------------------------------------------------------------------------- the real train.py


@pytest.mark.slow
@pytest.mark.long
@posix_only
def test_a_training_killed_twice_ends_with_the_same_weights(flags, tmp_path):
    options = flags(max_steps=120, eval_interval=60, save_interval=20, log_interval=30)
    whole = train(options | {"out_dir": str(tmp_path / "whole")})
    assert whole.outcome == "finished"
    arguments = command(options, "--restarts=5")
    with forks.Popen(arguments, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ONE_THREAD) as process:
        for kill in (1, 2):
            saved = {path.name for path in (tmp_path / "out").glob("checkpoint_*")}
            wait_for(lambda saved=saved: newer(tmp_path / "out", saved), process)
            os.kill(read_status(tmp_path / "out")["pid"], signal.SIGKILL)
            wait_for(lambda kill=kill: f"restart {kill} of 5: killed by SIGKILL" in process.stderr.readline(), process)
        messages = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 0 and "finished after step 120" in messages
    assert_equal(*(load_torch(tmp_path / name / "pretrain_32.pth") for name in ("whole", "out")))


def newer(out_dir, saved):
    """Whether the run has written a checkpoint beside these, and says so."""
    status = read_status(out_dir)
    return status is not None and status["checkpoint"] not in saved | {None}


@pytest.mark.long
@posix_only
def test_a_run_from_a_named_checkpoint_restarts_from_its_newest_one(flags, tmp_path):
    options = flags(max_steps=120, eval_interval=120, save_interval=20)
    first, second = tmp_path / "out", tmp_path / "second"
    train(options | {"max_steps": "20"})
    options |= {"resume_from": str(first / "checkpoint_step_20.pth"), "out_dir": str(second)}
    arguments = command(options, "--restarts=5")
    with forks.Popen(arguments, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ONE_THREAD) as process:
        wait_for(lambda: newer(second, {"checkpoint_step_20.pth"}), process)
        os.kill(read_status(second)["pid"], signal.SIGKILL)
        messages = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 0, messages
    assert f"resuming from {first}" in messages and f"resuming from {second}" in messages
    assert not (second / "previous").exists()


@pytest.mark.long
@posix_only
def test_several_processes_that_are_stopped_exit_with_130(flags, tmp_path):
    options = flags(batch_size=2, max_steps=3000, eval_interval=3000, save_interval=20)
    arguments = command(options, "--restarts=5", "--nproc_per_node=2")
    with forks.Popen(arguments, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ONE_THREAD) as process:
        wait_for(lambda: newer(tmp_path / "out", set()), process)
        process.send_signal(signal.SIGTERM)
        messages = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 130 and "restart 1" not in messages, messages
    folder = tmp_path / "out"
    assert f"resume with: python train.py --resume --out_dir {folder} --nproc_per_node=2\n" in messages, messages
    status = read_status(folder)
    assert status["state"] == "interrupted" and status["world_size"] == 2
    assert load_torch(tmp_path / "out" / "checkpoint_interrupted.pth")["progress"]["step"] == status["step"]


@pytest.mark.long
@pytest.mark.parametrize("more", [["--restarts=2"], ["--restarts=2", "--nproc_per_node=2"], ["--nproc_per_node=2"]])
def test_bad_input_is_one_line_and_no_restart(flags, more):
    for change in {"dim": 33}, {"train_data_path": "none.bin"}:
        result = run(command(flags(**change), *more))
        assert result.returncode == 2 and "restart 1" not in result.stderr, result.stderr
        assert sum(line.startswith("error:") for line in result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("text", ["-1", "two", ""])
def test_a_bad_number_of_restarts_is_one_line(flags, text):
    result = run(command(flags(), f"--restarts={text}"))
    assert result.returncode == 2 and "a whole number expected" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_under_torchrun_the_flags_are_refused(flags):
    result = run(command(flags(), "--restarts=2"), env=ONE_THREAD | {"WORLD_SIZE": "2", "RANK": "0"})
    assert result.returncode == 2 and "omit torchrun" in result.stderr


# ------------------------------------------------------------------------------------------- several config files


@pytest.mark.long
def test_several_config_files_are_trained_in_turn_and_the_first_that_fails_ends_it(flags, tmp_path):
    out = [tmp_path / "first", tmp_path / "second"]
    changes = [
        {"out_dir": out[0]},
        {"out_dir": out[1], "init_from": out[0] / "best_model.pth"},
        {"init_from": tmp_path / "none.pth"},
        {"out_dir": tmp_path / "never"},
    ]
    configs = []
    for number, change in enumerate(changes):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(build_settings({}, flags(max_steps=4, **change)).as_dict()), encoding="utf-8")
        configs += ["--config", str(path)]
    result = run([*command({}), *configs])
    assert result.returncode == 2 and "none.pth" in result.stderr.splitlines()[-1], result.stderr
    assert [read_status(folder)["state"] for folder in out] == ["finished", "finished"]
    assert not (tmp_path / "never").exists()
    result = run([*command({}), *configs[:4]], env=ONE_THREAD | {"WORLD_SIZE": "2", "RANK": "0"})
    assert result.returncode == 2 and "one expected under torchrun" in result.stderr


# ------------------------------------------------------------------------------------------------------- the examples


def trained_with(words):
    """What stands behind train.py in a command line, as settings."""
    return read_settings(words[words.index("train.py") + 1 :])


def test_the_kubernetes_example_is_a_job_that_only_resumes():
    documents = list(yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text(encoding="utf-8")))
    claim, job = documents
    assert (claim["kind"], job["kind"], job["apiVersion"]) == ("PersistentVolumeClaim", "Job", "batch/v1")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] >= 120
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["run"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    first, second = job["spec"]["podFailurePolicy"]["rules"]
    assert first["onPodConditions"][0]["type"] == "DisruptionTarget" and first["action"] == "Ignore"
    assert second["onExitCodes"]["values"] == [1, 2] and second["action"] == "FailJob"
    assert trained_with(container["command"]).training.resume


def test_the_slurm_example_is_a_script_that_only_resumes(tmp_path):
    path = ROOT / "examples" / "slurm.sbatch"
    text = path.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    names = {"$CONFIG": "config.yaml", "$OUT_DIR": str(tmp_path / "out"), "$PROCESSES": "8"}
    words = [names.get(word, word) for word in shlex.split(line.removesuffix("&"))]
    training = trained_with(words).training
    assert training.resume and training.out_dir == str(tmp_path / "out")
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert "requeue" in directives and directives["open-mode"] == "append" and directives["signal"] == "TERM@120"
    if os.name == "posix":
        assert run(["bash", "-n", str(path)]).returncode == 0
