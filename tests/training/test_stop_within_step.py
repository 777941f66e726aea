"""A signal to stop that comes within a long step: the step is dropped, and the resumed run ends with the same bits."""

import signal
import sys

import pytest
import torch

from model.runs.signals import SECONDS_BETWEEN_VOTES, StopVote
from model.storage.archive import load_torch
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from tests.tiny_runs import (
    assert_equal,
    assert_same_end,
    command,
    finish_ranks,
    signal_while_reading,
    start_two_ranks,
    train,
    wait_for,
)
from utils import Processes

LONG = {"max_steps": 6, "eval_interval": 2, "save_interval": 1, "accumulation_steps": 5}
CASES = {
    "AdamW": {"optimizer_type": "adamw", "dropout": 0.1},
    "Muon, averaged": {
        "optimizer_type": "muon",
        "dropout": 0.1,
        "use_ema": "true",
        "lr_scheduler": "wsd",
        "dtype": "float32",
    },
    "float16": {"dtype": "float16", "dropout": 0.1, "use_ema": "true", "batch_size": 1},  # a CPU takes long for it
}
STATE = ("model", "ema", "ema_updates", "optimizer", "scaler", "random_states", "progress", "data", "chosen")


def assert_same_checkpoint(first, second):
    a, b = load_torch(first), load_torch(second)
    for content in (a, b):
        content["progress"].pop("seconds")
    for key in STATE:
        assert_equal(a[key], b[key], key)


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "step"),
    [
        pytest.param("AdamW", 0, marks=pytest.mark.slow),
        ("Muon, averaged", 3),
        pytest.param("float16", 3, marks=pytest.mark.slow),
    ],
)
def test_a_dropped_step_leaves_nothing_behind(flags, tmp_path, monkeypatch, case, step):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    options = LONG | CASES[case]
    train(flags(out_dir=tmp_path / "whole", **options))
    torch.set_num_threads(1)
    trainer = Trainer(build_settings({}, flags(**options)), Processes())
    signal_while_reading(trainer, step, 2)
    assert trainer.train() == "interrupted" and trainer.progress.step == step
    interrupted = tmp_path / "out" / "checkpoint_interrupted.pth"
    if step:
        assert_same_checkpoint(tmp_path / "whole" / f"checkpoint_step_{step}.pth", interrupted)
    assert load_torch(interrupted)["progress"]["step"] == step
    assert train(flags(resume="true", **options)).outcome == "finished"
    assert_same_end(tmp_path / "whole", tmp_path / "out", step=6)


VOTING_OFTEN = """
import model.runs.signals
model.runs.signals.SECONDS_BETWEEN_VOTES = 0.05
import train
train.run_command(train.main)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
def test_a_signal_to_one_rank_within_a_step_stops_both(flags, tmp_path):
    options = LONG | {"max_steps": 3, "accumulation_steps": 100, "dropout": 0.1, "optimizer_type": "muon"}
    program = [sys.executable, "-c", VOTING_OFTEN]
    arguments = command(flags(**options), "--ddp")[2:]
    whole = finish_ranks(
        start_two_ranks([*program, *command(flags(**options, out_dir=tmp_path / "whole"), "--ddp")[2:]])
    )
    assert whole.returncode == 0, whole.stderr
    started = start_two_ranks([*program, *arguments])
    wait_for((tmp_path / "out" / "checkpoint_step_1.pth").exists, started[0])
    started[1].send_signal(signal.SIGTERM)
    stopped = finish_ranks(started)
    assert [process.returncode for process in started] == [130, 130], stopped.stderr
    assert "stopped after step 1" in stopped.stderr, stopped.stderr
    checkpoints = (tmp_path / "whole" / "checkpoint_step_1.pth", tmp_path / "out" / "checkpoint_interrupted.pth")
    assert_same_checkpoint(*checkpoints)
    resumed = finish_ranks(start_two_ranks([*program, "--resume", "--out_dir", tmp_path / "out", "--ddp"]))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(tmp_path / "whole", tmp_path / "out", step=3)


def votes(seconds_per_micro_batch, monkeypatch, micro_batches=1000, slow_elsewhere=0.0):
    """The micro-batches of a step before which this rank votes, in a simulated time."""
    now, cast = [0.0], []
    monkeypatch.setattr("model.runs.signals.time.monotonic", lambda: now[0])

    def all_sum(mine):
        cast.append(now[0])
        return [mine[0], mine[1] + slow_elsewhere]

    vote = StopVote(all_sum, alone=False)
    for micro in range(micro_batches):
        assert not vote.drops_step(micro, stop_asked=False)
        now[0] += seconds_per_micro_batch
    return cast


@pytest.mark.parametrize("seconds, most", [(1e-6, 10), (1e-3, 10), (0.01, 15), (1.0, 800), (30.0, 999)])
def test_ranks_vote_every_few_seconds_and_not_in_a_short_step(seconds, most, monkeypatch):
    cast = votes(seconds, monkeypatch)
    assert 0 < len(cast) <= most
    if 1000 * seconds > 10 * SECONDS_BETWEEN_VOTES:
        gaps = [after - before for before, after in zip(cast, cast[1:], strict=False)]
        assert max(gaps) <= max(2 * SECONDS_BETWEEN_VOTES, seconds) * 1.01


def test_a_rank_that_is_slow_brings_all_votes_nearer(monkeypatch):
    assert len(votes(1e-3, monkeypatch, slow_elsewhere=1.0)) == 999
