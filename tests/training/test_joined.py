"""Products of the same input, computed as one."""

import dataclasses
import functools

import pytest
import torch

from model import accelerator, trial
from model.LMConfig import LMConfig
from model.storage.archive import load_torch, save_torch
from model.training import joined_trial
from model.training.joined_trial import joined_is_faster
from tests.conftest import random_model
from tests.tiny_runs import assert_same_end, calls_of, train

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100, "max_seq_len": 40}
SHARED = {"n_experts": 4, "n_shared_experts": 1, "expert_hidden_dim": 32}


def loss_and_gradients(model, called=None):
    tokens, targets = torch.randint(100, (2, 2, 40), generator=torch.Generator().manual_seed(1))
    loss = (model if called is None else called)(tokens, targets)
    return loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])


@pytest.mark.parametrize("shape", [{}, {"qkv_bias": True, "qk_norm": True}, SHARED])
def test_loss_and_gradients_are_those_of_products_apart(shape, monkeypatch):
    model = random_model(LMConfig(**SHAPE | shape)).train()
    apart = loss_and_gradients(model)
    model.join_products(True)
    calls = calls_of(monkeypatch, torch.nn.functional, "linear")
    joined = loss_and_gradients(model)
    shapes = [weight.shape for _, weight, *_ in calls]
    assert shapes.count((64 + 32 + 32, 64)) == 2 and (32, 64) not in shapes
    for own, other in zip(joined, apart, strict=True):
        assert (own - other).norm() <= 1e-5 * other.norm()


@pytest.mark.slow
def test_a_step_is_one_graph():
    model = random_model(LMConfig(**SHAPE)).train()
    model.join_products(True)
    expected = loss_and_gradients(model)
    found = loss_and_gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


def faster(name: str):
    """What the trial of a machine measures on which that way takes half of the time."""
    return lambda x, groups, way: 1.0 if way == name else 2.0


@pytest.mark.parametrize("way", joined_trial.WAYS)
def test_the_faster_way_is_taken_and_no_random_number(monkeypatch, way):
    monkeypatch.setattr(trial, "BUSY", 0)
    monkeypatch.setattr("model.training.trial.SECONDS", 0)
    before = torch.get_rng_state()
    choose = functools.partial(joined_is_faster, LMConfig(**SHAPE), 2, torch.float32, torch.device("cpu"))
    is_joined, why = choose()
    assert isinstance(is_joined, bool) and "tried with 80 tokens: apart" in why
    monkeypatch.setattr(joined_trial, "_seconds", faster(way))
    assert choose()[0] == (way == "joined")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.long
def test_a_gpu_takes_it_and_keeps_it_and_a_cpu_does_not_unless_asked(flags, tmp_path, monkeypatch, capfd):
    assert not train(flags(max_steps=4, out_dir=tmp_path / "cpu")).model.layers[0].attention.joined
    assert "joined" not in capfd.readouterr().err
    kinds = accelerator.KINDS
    monkeypatch.setitem(kinds, "cpu", dataclasses.replace(kinds["cpu"], has_flash_kernels=True))  # as a GPU has
    monkeypatch.setattr("model.training.choices.joined_is_faster", lambda *_: (True, "it was tried"))
    first = train(flags(max_steps=4, save_interval=2))
    assert first.model.layers[1].attention.joined and first.model.layers[1].feed_forward.joined
    assert "joined_products true (auto): it was tried" in capfd.readouterr().err
    (tmp_path / "out" / "checkpoint_step_4.pth").unlink()
    monkeypatch.setattr("model.training.choices.joined_is_faster", lambda *_: (False, "it changed its mind"))
    resumed = train(flags(max_steps=4, save_interval=2, resume="true"))
    assert resumed.training.joined_products is True and "(auto): as before" in capfd.readouterr().err
    asked = train(flags(max_steps=4, joined_products="true", out_dir=tmp_path / "asked"))
    assert asked.model.layers[0].attention.joined
    assert_same_end(tmp_path / "asked", tmp_path / "out", step=4)


@pytest.mark.long
def test_a_run_begun_before_there_was_a_choice_goes_on_apart(flags, tmp_path, monkeypatch):
    train(flags(max_steps=2))
    path = tmp_path / "out" / "checkpoint_step_2.pth"
    content = load_torch(path)
    del content["chosen"]["joined_products"]
    save_torch(path, content)
    kinds = accelerator.KINDS
    monkeypatch.setitem(kinds, "cpu", dataclasses.replace(kinds["cpu"], has_flash_kernels=True))  # as a GPU has
    monkeypatch.setattr("model.training.choices.joined_is_faster", lambda *_: (True, "it was tried"))
    assert train(flags(max_steps=4, resume="true")).training.joined_products is False


@pytest.mark.long
def test_layers_with_adapters_stay_apart(flags, tmp_path):
    train(flags(max_steps=1, out_dir=tmp_path / "base"))
    options = {"init_from": tmp_path / "base", "lora_rank": 4, "max_steps": 2}
    train(flags(**options))
    train(flags(**options, joined_products="true", out_dir=tmp_path / "joined"))
    assert_same_end(tmp_path / "joined", tmp_path / "out", step=2)
