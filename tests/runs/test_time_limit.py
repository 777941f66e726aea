"""`max_hours`: a session that lasts too long saves, exits with 0, and is resumed with the same bits."""

import sys
import threading
import time

import pytest

from model.runs.status import read_status
from model.runs.time_limit import TimeLimit
from tests.tiny_runs import (
    assert_same_end,
    command,
    events,
    finish_ranks,
    losses,
    run,
    start_two_ranks,
    train,
    two_ranks,
)

SOON = 2 / 3600  # hours
# Steps of a tenth of a second, so that the limit comes between two of them.
SLOW_STEPS = """
import time
import optimized_pretrain
step = optimized_pretrain.Trainer._take_step
optimized_pretrain.Trainer._take_step = lambda trainer, last: (time.sleep(0.3), step(trainer, last))[1]
import train
train.run_command(train.main)
"""


@pytest.mark.parametrize(("hours", "needed", "expected"), [(100 / 3600, 0, 100), (100 / 3600, 30, 70), (1, 4000, 0)])
def test_the_time_to_save_is_left(monkeypatch, hours, needed, expected):
    now, expired = [5.0], threading.Event()
    monkeypatch.setattr("model.runs.time_limit.time.monotonic", lambda: now[0])
    monkeypatch.setattr("model.runs.time_limit.LOOK_SECONDS", 0.01)
    with TimeLimit(hours, lambda: needed, expired.set):
        if expected:
            now[0] = 5 + expected - 0.001
            assert not expired.wait(0.1)
        now[0] = 5 + expected
        assert expired.wait(60)


def test_no_limit_and_a_limit_that_is_left_ask_for_nothing(monkeypatch):
    expired = threading.Event()
    with TimeLimit(None, lambda: 0, expired.set):
        pass
    with TimeLimit(0.2 / 3600, lambda: 0, expired.set):
        pass
    time.sleep(0.4)
    assert not expired.is_set()


def limited(flags, out, **options):
    """The exit code, stderr and step of a run that its limit has stopped."""
    words = command(flags(out_dir=out, max_hours=SOON, **options))[2:]
    result = run([sys.executable, "-c", SLOW_STEPS, *words])
    return result, stopped_at(out, result, world_size=1)


def stopped_at(out, result, world_size) -> int:
    """The step that a run was stopped at, after a look at all that it left and said."""
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    status = read_status(out)
    assert (status["state"], status["exit_code"], status["world_size"]) == ("time_limit", 0, world_size)
    assert status["checkpoint"] == "checkpoint_interrupted.pth" and (out / status["checkpoint"]).exists()
    assert 0 < status["step"] < 12
    launcher = "python" if world_size == 1 else f"torchrun --nproc_per_node={world_size}"
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        f"stopped after step {status['step']}, since max_hours {SOON:g} are over; resume with: {launcher} train.py"
        f" --resume --out_dir {out}"
    )
    return status["step"]


@pytest.mark.long
def test_a_limited_run_saves_and_resumes_with_the_same_bits(flags, tmp_path, capfd):
    options = {"dropout": 0.1, "use_ema": "true"}
    train(flags(out_dir=tmp_path / "whole", **options))
    result, step = limited(flags, tmp_path / "out", **options)
    assert [event["step"] for event in events(tmp_path / "out") if "loss" in event] == list(range(1, step + 1))
    capfd.readouterr()
    assert train(flags(resume="true", **options)).outcome == "finished"
    assert "with other settings" not in capfd.readouterr().err  # max_hours is the session's
    assert_same_end(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_and_resume_with_the_same_bits(flags, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert two_ranks(flags(out_dir=whole)).returncode == 0
    words = command(flags(out_dir=out, max_hours=SOON), "--ddp")[2:]
    started = start_two_ranks([sys.executable, "-c", SLOW_STEPS, *words])
    result = finish_ranks(started)
    assert [process.returncode for process in started] == [0, 0]
    stopped_at(out, result, world_size=2)
    resumed = two_ranks(flags(out_dir=out, resume="true"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(whole, out)


@pytest.mark.long
def test_an_evaluation_counts_and_ends_with_the_time(flags, tmp_path):
    """An evaluation that would take a minute: the limit ends it, and the resumed run makes it again."""
    code = """
import time
from model.training.evaluation import Evaluator
import train
measure = Evaluator.measure
def slowly(self, model):
    for _ in range(600):
        if self._asked_to_stop():
            return None
        time.sleep(0.1)
    return measure(self, model)
Evaluator.measure = slowly
train.run_command(train.main)
"""
    result = run([sys.executable, "-c", code, *command(flags(max_hours=SOON, eval_interval=2))[2:]])
    assert stopped_at(tmp_path / "out", result, world_size=1) == 2
    train(flags(out_dir=tmp_path / "whole", eval_interval=2))
    train(flags(resume="true", eval_interval=2))
    assert_same_end(tmp_path / "whole", tmp_path / "out")


@pytest.mark.long
def test_trainings_in_turn_end_with_the_first_that_is_stopped(flags, tmp_path):
    for name in ("first", "second"):
        values = {"max_hours": 0.3 / 3600, "max_steps": 100_000, "eval_interval": 100_000, "save_interval": 100_000}
        section = "".join(f"  {key}: {value}\n" for key, value in (values | {"out_dir": tmp_path / name}).items())
        (tmp_path / f"{name}.yaml").write_text(f"training:\n{section}", encoding="utf-8")
    given = flags(**dict.fromkeys(("max_steps", "eval_interval", "save_interval", "out_dir")))
    result = run(command(given, "--config", tmp_path / "first.yaml", "--config", tmp_path / "second.yaml"))
    assert result.returncode == 0 and read_status(tmp_path / "first")["state"] == "time_limit", result.stderr
    assert not (tmp_path / "second").exists()
    assert f"--config {tmp_path / 'second.yaml'}: not trained yet" in result.stderr


@pytest.mark.parametrize("wrong", ["0", "-1", "soon", "nan"])
def test_a_limit_that_is_none_is_one_line(flags, wrong):
    from model.errors import InputError
    from model.training.settings import build_settings

    with pytest.raises(InputError, match="max_hours: .* found, a number above 0 or null expected"):
        build_settings({}, flags(max_hours=wrong))
