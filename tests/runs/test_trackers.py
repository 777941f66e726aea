"""Trackers, and fakes of them that fail: each gets every step once, and none of its faults reaches a run."""

import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.runs.metrics import MetricsLog
from model.runs.trackers import TRACKERS, kept_run_id
from model.training.settings import FIELDS, build_settings
from tests.conftest import ROOT
from tests.tiny_runs import ONE_THREAD, command, events, mostly, python, run, train, wait_for

FAKES = ROOT / "tests" / "fake_trackers"
RUN_FILE = "wandb_run.json"


@pytest.fixture
def fake_trackers(tmp_path, monkeypatch):
    """Puts the fakes before the real libraries, with a fault if named; returns a function for what they were sent."""
    record = tmp_path / "record.jsonl"

    def use(fault="", key="a key"):
        monkeypatch.syspath_prepend(FAKES)
        for name in TRACKERS:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setenv("FAKE_TRACKER_LOG", str(record))
        monkeypatch.setenv("FAKE_TRACKER_FAULT", fault)
        monkeypatch.delenv("TRACKIO_DIR", raising=False)
        monkeypatch.setenv("SWANLAB_API_KEY", key) if key else monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
        return lambda: [json.loads(text) for text in record.read_text().splitlines()] if record.exists() else []

    return use


def sent(received):
    """Step of each row that a tracker was sent, and whether it has an evaluation."""
    return [(event["step"], "val_loss" in event["row"]) for event in received if "row" in event]


def complaints(text, name="wandb"):
    return [line for line in text.splitlines() if line.startswith(f"{name}: ") and "https" not in line]


# ------------------------------------------------------------------------------------------------------ the settings


@pytest.mark.parametrize(
    ("given", "trackers"),
    [
        ({}, []),
        ({"tracker": "swanlab"}, ["swanlab"]),
        ({"tracker": ["wandb", "swanlab", "trackio"]}, ["wandb", "swanlab", "trackio"]),
        ({"tracker": ["trackio", "wandb"], "use_wandb": "true"}, ["trackio", "wandb"]),
        ({"tracker": "trackio", "use_wandb": "true"}, ["trackio", "wandb"]),
        ({"tracker": ["null"], "use_wandb": "true"}, ["wandb"]),
    ],
)
def test_which_trackers_are_set(given, trackers):
    settings = build_settings({}, given)
    assert settings.logging.trackers == trackers
    assert build_settings(settings.as_dict(), {}).logging == settings.logging  # as a checkpoint keeps it


def test_several_names_on_the_command_line():
    import train as script

    settings = script.read_settings(["--tracker", "swanlab", "trackio", "--max_steps", "3"])
    assert settings.logging.trackers == ["swanlab", "trackio"] and settings.training.max_steps == 3
    assert script.read_settings(["--tracker", "null"]).logging.trackers == []


@pytest.mark.parametrize("wrong", ["mlflow", ["wandb", "mlflow"], "", [], ["wandb", 3], ["wandb", "null"], 3, True])
def test_an_unknown_tracker_is_one_line(wrong):
    from model.errors import InputError

    with pytest.raises(InputError, match="one of wandb, swanlab, trackio, or a list of them or null expected"):
        build_settings({}, {"tracker": wrong})


def test_the_setting_names_every_tracker():
    assert FIELDS["tracker"].metadata["choices"] == tuple(TRACKERS)


# ------------------------------------------------------------------------------------------------------ what is sent


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_one_row_a_step_with_all_that_belongs_to_it(tmp_path, said, fake_trackers, name):
    received = fake_trackers()
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker(name, "project", "name", {"training": {"seed": 1}}, tmp_path)
    for step in (1, 2):
        log.write({"step": step, "loss": 2.0, "mfu": float("nan")})
        log.write({"step": step, "val_loss": 3.0})
    log.close()
    begun, first, second, finished = received()
    assert begun["init"]["project"] == "project" and begun["init"]["config"] == {"training": {"seed": 1}}
    kept = json.loads((tmp_path / f"{name}_run.json").read_text())
    assert begun["init"]["resume"] == "allow" and begun["id"] in (kept["id"], f"name-{kept['id']}")
    rows = [{key: value for key, value in event["row"].items() if key != "step"} for event in (first, second)]
    assert rows == [{"loss": 2.0, "val_loss": 3.0}] * 2 and [first["step"], second["step"], kept["sent"]] == [1, 2, 2]
    assert finished["finish"] in (0, "success")
    assert len(said) == 1 and said[0].startswith(f"{name}: ")


def test_swanlab_is_sent_nothing_about_the_machine(tmp_path, said, fake_trackers):
    received = fake_trackers()
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker("swanlab", "project", None, {}, tmp_path)
    log.close()
    settings = received()[0]["settings"]
    assert settings["interactive"] is False and settings["terminal"] == {"proxy_type": "none"}
    assert settings["probe"] and not any(settings["probe"].values())


def test_without_a_key_swanlab_is_kept_offline_and_a_line_says_how_to_send_it(tmp_path, said, fake_trackers):
    received = fake_trackers(key="")
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker("swanlab", "project", None, {}, tmp_path)
    log.write({"step": 1, "loss": 2.0})
    log.close()
    assert received()[0]["mode"] == "offline" and len(sent(received())) == 1
    (folder,) = (tmp_path / "swanlab").glob("run-*")
    assert said == [
        "swanlab: no API key was provided; the run is kept offline; send it later with:"
        f" swanlab sync {folder} --id {received()[0]['id']}"
    ]


@pytest.mark.long
def test_what_is_kept_offline_after_the_end_is_sent_by_the_next_session(tmp_path, said, fake_trackers, monkeypatch):
    """Nobody would be told where it is kept."""
    received = fake_trackers("init is slow", key="")
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker("swanlab", "project", None, {}, tmp_path)
    log.write({"step": 1, "loss": 2.0})
    process = log._trackers[0]._process
    monkeypatch.setattr("model.runs.tracker_process.CLOSE_SECONDS", 0.1)
    log.close()
    assert len(said) == 1 and said[0].endswith(f"send the rest with: python train.py --resume --out_dir {tmp_path}")
    process.wait()
    assert sent(received()) == []
    monkeypatch.setattr("model.runs.tracker_process.CLOSE_SECONDS", 60)
    received = fake_trackers()
    again = MetricsLog(tmp_path, 1, said.append)
    again.start_tracker("swanlab", "project", None, {}, tmp_path)
    again.close()
    assert sent(received()) == [(1, False)] and received()[-2]["id"] == received()[0]["id"]


@pytest.mark.parametrize("user", [None, "mine"])
def test_trackio_is_kept_in_the_runs_folder_unless_the_user_says_where(
    tmp_path, said, fake_trackers, monkeypatch, user
):
    received = fake_trackers()
    if user is not None:
        monkeypatch.setenv("TRACKIO_DIR", user)
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker("trackio", "project", None, {}, tmp_path)
    log.close()
    assert received()[0]["folder"] == (user or str(tmp_path / "trackio"))
    assert received()[0]["init"]["private"] is True and "trackio show" in said[0]


# ------------------------------------------------------------------------------------------------------------- faults

FAULTS = {  # and what the user is told
    "import raises": "import fails; the run continues without ",
    "init raises": "init fails; the run continues without ",
    "init exits": "1; the run continues without ",
    "log raises": "log fails; the run continues without ",
    "log dies": "its process ended with code -6",
    "finish raises": "finish fails; the run continues without ",
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [*(("wandb", fault) for fault in FAULTS), ("swanlab", "init raises"), ("trackio", "log dies")],
)
def test_a_tracker_that_fails_is_one_line_that_says_how_to_send_the_rest(tmp_path, said, fake_trackers, name, fault):
    fake_trackers(fault)
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker(name, "project", None, {}, tmp_path)
    for step in range(1, 30):
        log.write({"step": step, "loss": 2.0})
    log.close()
    log.close()  # again, as from another `finally`
    (told,) = [text for text in said if "https" not in text and "trackio show" not in text]
    expected = FAULTS[fault] if sys.platform != "win32" else FAULTS[fault].removesuffix("-6")
    assert told.startswith(f"{name}: ") and expected in told and "\n" not in told
    assert f"python train.py --resume --out_dir {tmp_path}" in told
    assert [event["step"] for event in events(tmp_path)] == list(range(1, 30))


@pytest.mark.parametrize("name", TRACKERS)
def test_without_its_library_a_line_says_so(tmp_path, said, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker(name, "project", None, {}, tmp_path)
    log.close()
    assert len(said) == 1 and said[0].startswith(f"{name}: not installed (pip install ")


def test_a_folder_of_that_name_is_not_wandb(tmp_path, said, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    MetricsLog(tmp_path, 0, said.append).start_tracker("wandb", "project", None, {}, tmp_path)
    assert "pip install wandb" in said[0]


@pytest.mark.parametrize("content", [None, "", "\0\0", "[1]", '{"id": 5}', '{"id": "../x"}', '{"number": 1}'])
def test_a_run_keeps_its_id_and_a_bad_file_gives_a_new_one(tmp_path, said, content):
    ids = []
    for _ in range(2):
        random.seed(42)  # as a run does: ids must not come from there
        (tmp_path / RUN_FILE).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / RUN_FILE).write_text(content)
        ids.append(kept_run_id(tmp_path, "wandb", said.append))
        assert kept_run_id(tmp_path, "wandb", said.append) == ids[-1]
    assert ids[0] != ids[1] and len(ids[0]) == 8 and said == []


def test_an_id_that_cannot_be_kept_is_reported(tmp_path, said, fake_trackers):
    (tmp_path / RUN_FILE).mkdir()
    received = fake_trackers()
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker("wandb", "project", None, {}, tmp_path)
    log.close()
    assert RUN_FILE in said[0] and "when resumed" in said[0] and received()[-1]["finish"] == 0


@pytest.mark.long
def test_a_killed_run_ends_there_and_a_step_that_may_be_half_is_not_sent(tmp_path, fake_trackers):
    received = fake_trackers()
    code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(FAKES)!r})
from model.runs.metrics import MetricsLog
log = MetricsLog(pathlib.Path({str(tmp_path)!r}), 0, print)
log.start_tracker("wandb", "project", None, {{}}, pathlib.Path({str(tmp_path)!r}))
for step in range(1, 6):
    log.write({{"step": step, "loss": 2.0}})
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: sum("row" in event for event in received()) == 4)
        process.send_signal(signal.SIGINT if sys.platform == "win32" else signal.SIGKILL)
    wait_for(lambda: "finish" in received()[-1])
    assert received()[-1]["finish"] == 1 and [e["step"] for e in received() if "row" in e] == [1, 2, 3, 4]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL as POSIX has it")
@pytest.mark.parametrize("name", mostly(TRACKERS, ("swanlab", "trackio")))
def test_the_next_session_sends_what_a_killed_tracker_lacks(tmp_path, said, fake_trackers, monkeypatch, name):
    monkeypatch.setattr("model.runs.tracker_process.CLOSE_SECONDS", 60)
    received = fake_trackers()
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker(name, "project", None, {}, tmp_path)
    for step in range(1, 10):
        log.write({"step": step, "loss": 2.0})
    run_file = tmp_path / f"{name}_run.json"
    wait_for(lambda: json.loads(run_file.read_text()).get("sent") == 8)  # the last one may get more
    os.kill(log._trackers[0]._process.pid, signal.SIGKILL)
    log.write({"step": 10, "loss": 2.0})
    log.close()
    assert "ended with code -9" in said[-1] and "--resume" in said[-1]
    again = MetricsLog(tmp_path, 10, said.append)
    again.start_tracker(name, "project", None, {}, tmp_path)
    again.write({"step": 11, "loss": 2.0})
    again.close()
    assert [step for step, _ in sent(received())] == list(range(1, 12))
    assert len({event["id"] for event in received()}) == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_an_evaluation_that_a_stop_cut_short_comes_with_its_step_later(tmp_path, said, fake_trackers, name):
    received = fake_trackers()
    for session, events_of_session in enumerate(([{"loss": 2.0}], [{"val_loss": 3.0}]), 1):
        log = MetricsLog(tmp_path, 4, said.append)
        log.start_tracker(name, "project", None, {}, tmp_path)
        for event in events_of_session:
            log.write({"step": 4} | event)
        log.close(is_whole=session == 2)
        assert sent(received()) == ([] if session == 1 else [(4, True)])


@pytest.mark.long
def test_what_another_run_was_sent_does_not_count(tmp_path, said, fake_trackers, monkeypatch):
    received = fake_trackers()
    (tmp_path / "swanlab_run.json").write_text('{"id": "../another", "sent": 99}')
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_tracker("swanlab", "project", None, {}, tmp_path)
    log.write({"step": 1, "loss": 2.0})
    log.close()
    assert sent(received()) == [(1, False)]


# ------------------------------------------------------------------------------------------- trackers and the training


@pytest.mark.slow
@pytest.mark.long
def test_trackers_that_stall_hold_no_run_and_no_exit(flags, tmp_path):
    """Two real runs at the same time, one of them with trackers that stall."""

    def trained(fault):
        out = tmp_path / (fault or "without")
        trackers = ["--tracker", *TRACKERS] if fault else []
        environment = ONE_THREAD | {"PYTHONPATH": str(FAKES), "FAKE_TRACKER_FAULT": fault}
        environment["FAKE_TRACKER_LOG"] = str(tmp_path / f"{fault}.jsonl")
        result = run(command(flags(max_steps=6, eval_interval=6, out_dir=out), *trackers), env=environment)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        return (out / "pretrain_32.pth").read_bytes(), result.stderr

    with ThreadPoolExecutor(2) as pool:
        (weights, _), (its_weights, told) = pool.map(trained, ["", "log stalls"])
    assert its_weights == weights
    for name in TRACKERS:
        assert sum("not finished after 3 s" in line for line in complaints(told, name)) == 1
    assert "stalled" not in (tmp_path / "log stalls.jsonl").read_text()  # the run was over before


@pytest.mark.long
def test_no_fault_of_a_tracker_changes_the_weights(flags, tmp_path, fake_trackers, capfd, monkeypatch):
    monkeypatch.setattr("model.runs.tracker_process.CLOSE_SECONDS", 0.5)
    options = {"max_steps": 6, "eval_interval": 99, "dropout": 0.1}
    train(flags(out_dir=tmp_path / "without", **options))
    weights = (tmp_path / "without" / "pretrain_32.pth").read_bytes()
    for fault in ("init raises", "init stalls", "log raises", "finish stalls", "finish dies"):
        received = fake_trackers(fault)
        capfd.readouterr()
        trainer = train(flags(out_dir=tmp_path / fault, use_wandb="true", **options))
        assert trainer.outcome == "finished" and not any("stalled" in event for event in received()), fault
        assert (tmp_path / fault / "pretrain_32.pth").read_bytes() == weights, fault
        assert len(complaints(capfd.readouterr().err)) == 1, fault


@pytest.mark.long
def test_a_resumed_run_continues_its_runs_there(flags, tmp_path, fake_trackers, monkeypatch):
    monkeypatch.setattr("model.runs.tracker_process.CLOSE_SECONDS", 60)
    received, out = fake_trackers(), tmp_path / "out"
    everywhere = {"tracker": list(TRACKERS)}
    train(flags(max_steps=8) | everywhere)
    (out / "checkpoint_step_8.pth").unlink()  # as if it had been killed before
    train(flags(resume="true", max_steps=12) | everywhere)
    runs = {event["id"] for event in received()}
    assert len(runs) == len(TRACKERS)
    for run_id in runs:
        rows = sent(event for event in received() if event["id"] == run_id)
        assert rows == [(step, step % 4 == 0) for step in range(1, 13)]  # each step once
    train(flags(max_steps=4) | everywhere)  # another run
    assert len({event["id"] for event in received()}) == 2 * len(TRACKERS)
    (moved,) = (out / "previous").iterdir()
    assert (moved / RUN_FILE).exists() and (moved / "trackio_run.json").exists()


@pytest.mark.long
def test_a_finished_run_that_is_resumed_sends_what_its_trackers_lack(flags, tmp_path, fake_trackers, monkeypatch):
    """As the line says that comes when a tracker has failed."""
    monkeypatch.setattr("model.runs.tracker_process.CLOSE_SECONDS", 60)
    fake_trackers("init raises")
    train(flags(tracker="swanlab"))
    received = fake_trackers()
    assert train(flags(tracker="swanlab", resume="true")).outcome == "finished"
    assert [step for step, _ in sent(received())] == list(range(1, 13))


@pytest.mark.long
def test_another_line_of_a_run_is_another_run_there_from_its_first_step(flags, tmp_path, fake_trackers):
    received, out = fake_trackers(), tmp_path / "out"
    train(flags(use_wandb="true"))
    train(flags(use_wandb="true", resume_from=out / "checkpoint_step_4.pth", learning_rate=1e-5))
    first, second = dict.fromkeys(event["id"] for event in received())
    of_second = [event for event in received() if event["id"] == second]
    assert [event["step"] for event in of_second if "row" in event] == list(range(1, 13))
    assert [event["row"]["lr"] for event in of_second if "row" in event][4] < 1e-5 + 1e-9


# ------------------------------------------------------------------------------------------------ the real libraries


def told_by(tmp_path: Path, name: str, **environment) -> list[str]:
    """What the user is told where the real library is sent 29 steps."""
    kept = {key: value for key, value in ONE_THREAD.items() if not key.startswith(("WANDB", "SWANLAB", "TRACKIO"))}
    return python(
        f"""
import json, pathlib, time
from model.runs.metrics import MetricsLog
folder, said = pathlib.Path({str(tmp_path)!r}), []
log = MetricsLog(folder, 0, said.append)
log.start_tracker({name!r}, "project", "name", {{"training": {{"seed": 1}}}}, folder)
for step in range(1, 30):
    log.write({{"step": step, "loss": 2.0}})
while not any("{name}: " in text for text in said):
    time.sleep(0.05)
log.close()
print(json.dumps([text for text in said if "{name}: " in text]))
""",
        env=kept | {"HOME": str(tmp_path)} | environment,
    )


@pytest.mark.long
def test_the_real_wandb_kept_offline_holds_no_exit(tmp_path):
    pytest.importorskip("wandb")
    (told,) = told_by(tmp_path, "wandb", WANDB_MODE="offline")
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert f"wandb sync {record.parent}" in told and record.stat().st_size > 1000


@pytest.mark.long
def test_the_real_swanlab_without_a_key_is_kept_offline(tmp_path):
    pytest.importorskip("swanlab")
    (told,) = told_by(tmp_path, "swanlab")
    (folder,) = (tmp_path / "swanlab").glob("run-*")
    run_id = json.loads((tmp_path / "swanlab_run.json").read_text())["id"]
    assert f"swanlab sync {folder} --id {run_id}" in told and any(folder.iterdir())


@pytest.mark.long
def test_the_real_trackio_keeps_every_step_in_the_runs_folder(tmp_path):
    pytest.importorskip("trackio")
    import sqlite3

    (told,) = told_by(tmp_path, "trackio")
    (database,) = (tmp_path / "trackio").glob("project*.db")
    with sqlite3.connect(database) as connection:
        steps = [step for (step,) in connection.execute("SELECT step FROM metrics ORDER BY step")]
    assert steps == list(range(1, 30)) and str(tmp_path / "trackio") in told
