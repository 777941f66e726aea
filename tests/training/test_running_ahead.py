"""A device that gets each step before the last one was read: the same bits, whatever happens in a step."""

import pytest
import torch

from model.storage.archive import load_torch
from model.training.divergence import WINDOW, losses_to_compare, remember
from model.training.optimizer import build_optimizer
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from tests.conftest import random_model
from tests.tiny_runs import (
    assert_equal,
    assert_same_end,
    calls_of,
    losses,
    mostly,
    signal_while_reading,
    torchrun,
    train,
    two_ranks,
)
from utils import Processes

CASES = {
    "adamw, average, dropout, accumulation": {"use_ema": "true", "dropout": 0.1, "accumulation_steps": 2},
    "muon": {"optimizer_type": "muon", "use_ema": "true", "lr_scheduler": "wsd"},
    "experts, bias": {"n_experts": 4, "expert_bias": "true", "use_ema": "true", "balance_loss": 0.01},
    "float16": {"dtype": "float16", "dropout": 0.1},
    "epochs": {
        "max_steps": None,
        "epochs": 8,
        "batch_size": 150,
        "log_interval": 3,
        "dropout": 0.1,
        "dtype": "float32",
    },
    "an optimizer that can't": {"optimizer_type": "sgd", "learning_rate": 0.1},
}
BAD = {1: "loss", 5: "gradient", 6: "gradient", 12: "loss", 38: "spike", 43: "loss"}  # by the place among all steps


@pytest.fixture
def ahead(monkeypatch):
    """Turns running ahead on, and has this process compute with one thread."""
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda on: monkeypatch.setenv("MATECONV_RUN_AHEAD", str(int(on)))
    torch.set_num_threads(threads)


def spoil(trainer: Trainer, bad: dict[int, str]) -> None:
    """Make steps unusable, which are known by the samples that they read: those launched again are spoiled again."""
    order, objective, position = trainer.plan.order, trainer.objective, [0]
    next_step, loss = order.next_step, objective.loss

    def noted(read: int):
        position[0] = read // order.rows_per_step
        return next_step(read)

    def spoiled(model, batch):
        found, problem = loss(model, batch), bad.get(position[0])
        if problem == "gradient":
            zero = trainer.model.norm.weight.sum() * 0
            return found + zero.sqrt()  # 0, and its derivative is not a number
        return found * {"loss": torch.nan, "spike": 50.0, None: 1.0}[problem]

    order.next_step = noted
    objective.loss = spoiled


def test_a_step_is_compared_with_the_same_losses_however_it_is_launched():
    recent: list[float] = []
    for step in range(3 * WINDOW):
        ahead = losses_to_compare(recent, is_ahead=True)  # launched before the last step is counted
        remember(recent, float(step))
        assert ahead == losses_to_compare(recent, is_ahead=False)
        assert ahead == [float(before) for before in range(max(0, step - WINDOW + 1), step)]


SLOW = ("float16", "epochs", "experts, bias", "muon")  # a CPU takes long for them


@pytest.mark.long
@pytest.mark.parametrize("case", mostly(CASES, SLOW))
def test_the_bits_are_those_of_reading_each_step_at_once(flags, tmp_path, case, ahead, new_entries, monkeypatch):
    ends = []
    for on in (False, True):
        ahead(on)
        options = {"max_steps": 44, "eval_interval": 11, "save_interval": 20, "log_interval": 1, "max_skipped_steps": 9}
        options["cuda_graph"] = "false"  # a replay would not run what spoils steps, see test_step_graph.py
        out_dir = tmp_path / str(on)
        trainer = Trainer(build_settings({}, flags(**(options | CASES[case]), out_dir=out_dir)), Processes())
        assert (trainer.stepper.verdict is not None) == (on and "sgd" not in str(CASES[case]))
        spoil(trainer, BAD)
        launched = calls_of(monkeypatch, trainer.stepper, "_launch")
        assert trainer.train() == "finished" and trainer.progress.skipped_steps >= 5
        assert any(len(call) > 1 for call in launched) == (trainer.stepper.verdict is not None)
        ends.append((out_dir, trainer.progress))
    (at_once, progress), (before, other) = ends
    progress.seconds = other.seconds
    assert progress == other
    assert losses(at_once) == losses(before)
    for path in at_once.glob("checkpoint_step_*.pth"):
        assert_same_end(at_once, before, step=int(path.stem.removeprefix("checkpoint_step_")))


@pytest.mark.long
@pytest.mark.parametrize("micro", [0, 2])
def test_a_signal_while_a_step_is_in_flight_saves_that_step(flags, tmp_path, micro, ahead):
    ahead(True)
    options = {"accumulation_steps": 3, "dropout": 0.1, "use_ema": "true", "eval_interval": 12, "save_interval": 12}
    train(flags(out_dir=tmp_path / "whole", **options))
    trainer = Trainer(build_settings({}, flags(**options)), Processes())

    def the_fifth_is_in_flight() -> None:
        assert trainer.progress.step == 4

    signal_while_reading(trainer, 5, micro, the_fifth_is_in_flight)
    assert trainer.train() == "interrupted" and trainer.stepper.in_flight is None
    saved = load_torch(tmp_path / "out" / "checkpoint_interrupted.pth")["progress"]["step"]
    assert saved == len(losses(tmp_path / "out")) == (5 if micro < 2 else 6)  # else no other micro-batch comes after it
    train(flags(resume="true", **options))
    assert_same_end(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, two_ranks])
def test_two_ranks_decide_alike(flags, tmp_path, launch, ahead):
    for on in (False, True):
        ahead(on)
        result = launch(flags(optimizer_type="muon", use_ema="true", out_dir=tmp_path / str(on)))
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "False") == losses(tmp_path / "True")
    assert_same_end(tmp_path / "False", tmp_path / "True")


@pytest.mark.parametrize("optimizer_type", ["adamw", "adam", "muon"])
def test_found_inf_keeps_weights_and_state_and_its_absence_changes_no_bit(tiny_config, optimizer_type):
    def stepped(found_inf):
        model = random_model(tiny_config)
        optimizer = build_optimizer(model, optimizer_type, 1e-2, 0.1)
        for step, veto in enumerate(found_inf):
            torch.manual_seed(step)
            for parameter in model.parameters():
                bad = torch.nan if veto == 1.0 else 1.0
                parameter.grad = torch.randn_like(parameter) * bad
            optimizer.found_inf = None if veto is None else torch.tensor(veto)
            optimizer.step()
        return dict(model.state_dict()), optimizer.state_dict()["state"]

    plain, judged = stepped([None] * 3), stepped([0.0] * 3)
    assert_equal(plain[0], judged[0])
    assert_equal(plain[1], judged[1])
    vetoed = stepped([0.0] * 3 + [1.0] * 2)
    assert_equal(plain[0], vetoed[0])
    assert_equal(plain[1], vetoed[1])
