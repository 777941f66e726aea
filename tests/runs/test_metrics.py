"""What a run writes down, on full disks, in folders that vanish, after crashes, and with a wandb that fails."""

import json
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.runs.metrics import WANDB_RUN, MetricsLog, read_metrics
from tests.conftest import ROOT
from tests.tiny_runs import HUNG, ONE_THREAD, command, run, train, wait_for

FAKE_WANDB = ROOT / "tests" / "fake_wandb"
pytestmark = pytest.mark.curves
needs_file_size_limit = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")


class Said(list):
    """What the user is told, but for a matplotlib that is not installed."""

    def append(self, text):
        if "matplotlib is not installed" not in text:
            super().append(text)


@pytest.fixture
def said():
    return Said()


def line(step, **values):
    return json.dumps({"step": step} | values) + "\n"


def steps(folder):
    """The step of each line of the file, all of which must be whole."""
    return [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_bytes().splitlines()]


def python(code, **options):
    """Run Python text in a process of its own, with the project to import from; returns what it printed, as JSON."""
    options = {"capture_output": True, "text": True, "timeout": HUNG, "env": ONE_THREAD} | options
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# ------------------------------------------------------------------------------------------- what the system refuses

FULL_DISK = """
import json, pathlib, resource, sys
from model.runs.metrics import MetricsLog
folder, results = pathlib.Path(sys.argv[1]), []
for limit in range(100, 140):  # bytes that the disk has room for: every place of a line of 27, and more
    out, said = folder / str(limit), []
    out.mkdir()
    log = MetricsLog(out, 0, said.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for step in range(1, 11):
        log.write({"step": step, "loss": 1.0625})
    full = (out / "metrics.jsonl").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write({"step": 11, "loss": 1.0625})
    log.close()
    results.append([full.decode(), (out / "metrics.jsonl").read_text(), said])
print(json.dumps(results))
"""


@needs_file_size_limit
def test_a_full_disk_costs_no_line_and_leaves_no_half_one(tmp_path):
    results = python(FULL_DISK.replace("sys.argv[1]", repr(str(tmp_path))))
    assert len(results) == 40
    for full, final, said in results:
        said = [text for text in said if "matplotlib" not in text]
        assert full.endswith("}\n") and 3 <= len(full.splitlines()) <= 5
        assert [json.loads(text)["step"] for text in final.splitlines()] == list(range(1, 12))
        refused, again = said
        assert "metrics.jsonl: cannot be written (File too large); training continues" in refused
        assert "can be written again" in again


def test_a_folder_that_vanishes_costs_no_line_that_comes_after(tmp_path, said):
    out = tmp_path / "out"
    out.mkdir()
    log = MetricsLog(out, 0, said.append)
    log.write({"step": 1, "loss": 2.0})
    for round_ in (1, 2):
        shutil.rmtree(out)
        for step in (2, 3, 4):
            log.write({"step": step * round_, "loss": 2.0})
        out.mkdir()
        log.write({"step": 5 * round_, "loss": 2.0})
        assert steps(out) == [2 * round_, 3 * round_, 4 * round_, 5 * round_]
    log.close()
    assert len(said) == 4 and all("No such file" in text for text in said[::2])  # once a streak, each time
    assert all("written again; the 4 lines" in text for text in said[1::2])


def test_lines_that_can_never_be_written_are_counted_at_the_end(tmp_path, said):
    (tmp_path / "metrics.jsonl").mkdir()
    log = MetricsLog(tmp_path, 0, said.append)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan")})
    log.close()
    first, last = said
    assert "metrics.jsonl: cannot be written" in first and "its last 3 lines are lost" in last


def test_a_file_that_cannot_be_put_right_at_the_start_is_put_right_later(tmp_path, said):
    """The old file, with events past the step and half a line, is not readable when the run resumes."""
    path, hidden = tmp_path / "metrics.jsonl", tmp_path / "hidden"
    hidden.write_text(line(1) + line(2) + line(3) + '{"step": 4, "lo')
    path.mkdir()
    log = MetricsLog(tmp_path, 2, said.append)
    log.write({"step": 3, "loss": 0.5})
    path.rmdir()
    hidden.rename(path)
    log.write({"step": 4, "loss": 0.25})
    assert path.read_text() == line(1) + line(2) + line(3, loss=0.5) + line(4, loss=0.25)
    assert len(said) == 2


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 3, "loss": 1.', b"\0" * 4096, b'{"step": 3}', b"\xff\xfe\n", b"\0\0\n\0", b"[" * 99_999 + b"\n"],
)
def test_what_a_crash_left_at_the_end_is_dropped(tmp_path, said, tail):
    path = tmp_path / "metrics.jsonl"
    good = (line(1, loss=2.5) + line(2, loss=None)).encode()
    path.write_bytes(good + tail)
    log = MetricsLog(tmp_path, 5, said.append)
    assert path.read_bytes() == good
    log.write({"step": 6, "loss": 1.0})
    assert [event["step"] for event in read_metrics(path)] == [1, 2, 6] and said == []


def test_events_past_the_step_resumed_at_are_dropped(tmp_path, said):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) for step in (1, 2, 2, 3, 4)))
    MetricsLog(tmp_path, 2, said.append)
    assert steps(tmp_path) == [1, 2, 2] and said == []


@pytest.mark.long
def test_curves_that_cannot_be_written_are_reported_once(tmp_path, said):
    pytest.importorskip("matplotlib")
    (tmp_path / "curves.png" / "in the way").mkdir(parents=True)
    log = MetricsLog(tmp_path, 0, said.append)
    log.write({"step": 1, "loss": 2.0})
    log.draw_curves()
    log.draw_curves()
    assert len(said) == 1 and said[0].startswith("curves.png is not drawn: ") and "training continues" in said[0]
    shutil.rmtree(tmp_path / "curves.png")
    log.draw_curves()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and len(said) == 1
    (tmp_path / "metrics.jsonl").unlink()
    log.draw_curves()
    assert len(said) == 2


@pytest.mark.long
def test_curves_take_little_of_the_time_and_end_up_to_date(tmp_path, said, monkeypatch):
    pytest.importorskip("matplotlib")
    clock, drawn = [100.0], []
    monkeypatch.setattr("model.runs.metrics.time.monotonic", lambda: clock[0])

    def draw(events, path):
        drawn.append(len(events))
        clock[0] += 0.5

    monkeypatch.setattr("model.runs.metrics.draw_curves", draw)
    log = MetricsLog(tmp_path, 0, said.append)
    for step in range(100):  # an evaluation a second
        clock[0] += 1
        log.write({"step": step, "val_loss": 2.0})
        log.update_curves()
    assert drawn[0] == 10 and 0.5 * len(drawn) <= 0.05 * 100 + 0.5 and len(drawn) >= 8
    log.close()
    assert drawn[-1] == 100
    log.close()
    assert drawn.count(100) == 1 and said == []


@pytest.mark.long
@needs_file_size_limit
def test_curves_on_a_full_disk_are_reported_once_and_the_old_ones_stay(tmp_path):
    pytest.importorskip("matplotlib")
    said, before, after = python(f"""
import json, pathlib, resource
from model.runs.metrics import MetricsLog
folder, said = pathlib.Path({str(tmp_path)!r}), []
log = MetricsLog(folder, 0, said.append)
log.write({{"step": 1, "loss": 2.0}})
log.draw_curves()
before = (folder / "curves.png").read_bytes().hex()
resource.setrlimit(resource.RLIMIT_FSIZE, (9999, resource.RLIM_INFINITY))
log.draw_curves()
log.draw_curves()
print(json.dumps([said, before, (folder / "curves.png").read_bytes().hex()]))
""")
    assert len(said) == 1 and "File too large" in said[0] and before == after
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------- wandb


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """Puts the fake wandb before the real one, with a fault if named; returns a function for what it was sent."""
    record = tmp_path / "wandb_record.jsonl"

    def use(fault=""):
        monkeypatch.syspath_prepend(FAKE_WANDB)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        monkeypatch.setenv("FAKE_WANDB_LOG", str(record))
        monkeypatch.setenv("FAKE_WANDB_FAULT", fault)
        return lambda: [json.loads(text) for text in record.read_text().splitlines()] if record.exists() else []

    return use


def test_wandb_gets_one_row_a_step_with_all_that_belongs_to_it(tmp_path, said, fake_wandb):
    received = fake_wandb()
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_wandb("project", "name", {"training": {"seed": 1}}, tmp_path)
    for step in (1, 2):
        log.write({"step": step, "loss": 2.0, "mfu": float("nan")})
        log.write({"step": step, "val_loss": 3.0})
    log.close()
    begun, first, second, finished = received()
    assert begun["init"]["project"] == "project" and begun["init"]["config"] == {"training": {"seed": 1}}
    assert begun["init"]["resume"] == "allow" and begun["id"] == json.loads((tmp_path / WANDB_RUN).read_text())["id"]
    assert [first["row"], second["row"]] == [{"step": step, "loss": 2.0, "val_loss": 3.0} for step in (1, 2)]
    assert finished["finish"] == 0
    assert said == [f"use_wandb: https://example.org/runs/{begun['id']}"]


FAULTS = {  # and what the user is told
    "import raises": "import fails; the run continues without wandb",
    "init raises": "init fails; the run continues without wandb",
    "init exits": "1; the run continues without wandb",
    "log raises": "log fails; the run continues without wandb",
    "log dies": "its process ended with code -6",
    "finish raises": "finish fails; the run continues without wandb",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wandb_that_fails_is_one_line(tmp_path, said, fake_wandb, fault):
    fake_wandb(fault)
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_wandb("project", None, {}, tmp_path)
    for step in range(1, 30):
        log.write({"step": step, "loss": 2.0})
    log.close()
    log.close()  # again, as from another `finally`
    (told,) = [text for text in said if "https" not in text]
    expected = FAULTS[fault] if sys.platform != "win32" else FAULTS[fault].removesuffix("-6")
    assert told.startswith("use_wandb: ") and expected in told and "\n" not in told
    assert steps(tmp_path) == list(range(1, 30))


def test_without_wandb_a_line_says_so(tmp_path, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_wandb("project", None, {}, tmp_path)
    log.close()
    assert len(said) == 1 and "pip install wandb" in said[0]


def test_a_folder_of_that_name_is_not_wandb(tmp_path, said, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    MetricsLog(tmp_path, 0, said.append).start_wandb("project", None, {}, tmp_path)
    assert "pip install wandb" in said[0]


@pytest.mark.parametrize("content", [None, "", "\0\0", "[1]", '{"id": 5}', '{"id": "../x"}', '{"number": 1}'])
def test_a_run_keeps_its_id_in_wandb_and_a_bad_file_gives_a_new_one(tmp_path, said, content):
    from model.runs.trackers import wandb_run_id

    ids = []
    for _ in range(2):
        random.seed(42)  # as a run does: ids must not come from there
        (tmp_path / WANDB_RUN).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / WANDB_RUN).write_text(content)
        ids.append(wandb_run_id(tmp_path / WANDB_RUN, said.append))
        assert wandb_run_id(tmp_path / WANDB_RUN, said.append) == ids[-1]
    assert ids[0] != ids[1] and len(ids[0]) == 8 and said == []


def test_an_id_that_cannot_be_kept_is_reported(tmp_path, said, fake_wandb):
    (tmp_path / WANDB_RUN).mkdir()
    received = fake_wandb()
    log = MetricsLog(tmp_path, 0, said.append)
    log.start_wandb("project", None, {}, tmp_path)
    log.close()
    assert WANDB_RUN in said[0] and "when resumed" in said[0] and received()[-1]["finish"] == 0


@pytest.mark.long
def test_a_killed_run_ends_in_wandb_and_a_step_that_may_be_half_is_not_sent(tmp_path, fake_wandb):
    received = fake_wandb()
    code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(FAKE_WANDB)!r})
from model.runs.metrics import MetricsLog
log = MetricsLog(pathlib.Path({str(tmp_path)!r}), 0, print)
log.start_wandb("project", None, {{}}, pathlib.Path({str(tmp_path)!r}))
for step in range(1, 6):
    log.write({{"step": step, "loss": 2.0}})
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: sum("row" in event for event in received()) == 4)
        process.send_signal(signal.SIGINT if sys.platform == "win32" else signal.SIGKILL)
    wait_for(lambda: "finish" in received()[-1])
    assert received()[-1]["finish"] == 1 and [e["step"] for e in received() if "row" in e] == [1, 2, 3, 4]


# -------------------------------------------------------------------------------------------- wandb and the training


def sent(received):
    return [(event["step"], "val_loss" in event["row"]) for event in received if "row" in event]


def complaints(text):
    return [line for line in text.splitlines() if line.startswith("use_wandb") and "https" not in line]


@pytest.mark.slow
@pytest.mark.long
def test_wandb_that_stalls_holds_no_run_and_no_exit(flags, tmp_path):
    """Two real runs at the same time, one of them with a wandb that stalls."""

    def trained(fault):
        out = tmp_path / (fault or "without")
        options = {"max_steps": 6, "eval_interval": 6, "out_dir": out, "use_wandb": "true" if fault else "false"}
        environment = ONE_THREAD | {"PYTHONPATH": str(FAKE_WANDB), "FAKE_WANDB_FAULT": fault}
        environment["FAKE_WANDB_LOG"] = str(tmp_path / f"{fault}.jsonl")
        result = run(command(flags(**options)), env=environment)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        return (out / "pretrain_32.pth").read_bytes(), complaints(result.stderr)

    with ThreadPoolExecutor(2) as pool:
        (weights, nothing), (its_weights, told) = pool.map(trained, ["", "log stalls"])
    assert its_weights == weights and nothing == []
    assert len(told) == 1 and "not finished after 3 s" in told[0]
    assert "stalled" not in (tmp_path / "log stalls.jsonl").read_text()  # the run was over before


@pytest.mark.long
def test_no_fault_of_wandb_changes_the_weights(flags, tmp_path, fake_wandb, capfd, monkeypatch):
    monkeypatch.setattr("model.runs.tracker_process.CLOSE_SECONDS", 0.5)
    options = {"max_steps": 6, "eval_interval": 99, "dropout": 0.1}
    train(flags(out_dir=tmp_path / "without", **options))
    weights = (tmp_path / "without" / "pretrain_32.pth").read_bytes()
    for fault in ("init raises", "init stalls", "log raises", "finish stalls", "finish dies"):
        received = fake_wandb(fault)
        capfd.readouterr()
        trainer = train(flags(out_dir=tmp_path / fault, use_wandb="true", **options))
        assert trainer.outcome == "finished" and not any("stalled" in event for event in received()), fault
        assert (tmp_path / fault / "pretrain_32.pth").read_bytes() == weights, fault
        assert len(complaints(capfd.readouterr().err)) == 1, fault


@pytest.mark.long
def test_a_resumed_run_continues_its_run_in_wandb(flags, tmp_path, fake_wandb, capfd):
    received, out = fake_wandb(), tmp_path / "out"
    train(flags(use_wandb="true", max_steps=8))
    (out / "checkpoint_step_8.pth").unlink()  # as if it had been killed before
    train(flags(use_wandb="true", resume="true", max_steps=12))
    assert len({event["id"] for event in received()}) == 1
    assert sent(received()) == [(step, step % 4 == 0) for step in range(1, 13)]  # each step once
    train(flags(use_wandb="true", max_steps=4))  # another run
    assert len({event["id"] for event in received()}) == 2
    (moved,) = (out / "previous").iterdir()
    assert (moved / WANDB_RUN).exists()


@pytest.mark.long
def test_another_line_of_a_run_is_another_run_in_wandb_from_its_first_step(flags, tmp_path, fake_wandb):
    received, out = fake_wandb(), tmp_path / "out"
    train(flags(use_wandb="true"))
    train(flags(use_wandb="true", resume_from=out / "checkpoint_step_4.pth", learning_rate=1e-5))
    first, second = dict.fromkeys(event["id"] for event in received())
    of_second = [event for event in received() if event["id"] == second]
    assert [event["step"] for event in of_second if "row" in event] == list(range(1, 13))
    assert [event["row"]["lr"] for event in of_second if "row" in event][4] < 1e-5 + 1e-9


@pytest.mark.long
def test_the_real_wandb_kept_offline_holds_no_exit(tmp_path):
    pytest.importorskip("wandb")
    environment = {name: value for name, value in ONE_THREAD.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    (told,) = python(
        f"""
import json, pathlib, time
from model.runs.metrics import MetricsLog
folder, said = pathlib.Path({str(tmp_path)!r}), []
log = MetricsLog(folder, 0, said.append)
log.start_wandb("project", "name", {{"training": {{"seed": 1}}}}, folder)
for step in range(1, 30):
    log.write({{"step": step, "loss": 2.0}})
while not any("use_wandb" in text for text in said):
    time.sleep(0.05)
log.close()
print(json.dumps([text for text in said if "use_wandb" in text]))
""",
        env=environment,
    )
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert f"wandb sync {record.parent}" in told and record.stat().st_size > 1000
