"""The optimizer's groups, the learning rate and the average, against what torch has of the same."""

import copy
import dataclasses

import pytest
import torch

from model.LMConfig import LMConfig
from model.model import Transformer
from model.training.moving_average import MovingAverage, average_in
from model.training.muon import orthogonalized
from model.training.optimizer import (
    build_optimizer,
    load_optimizer_state,
    momentum_at,
    rates_of,
    rates_on_device,
    set_rates,
)
from model.training.schedule import Schedule
from tests.tiny_runs import assert_equal, mostly

CONFIG = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=16)
SCHEDULE = {"total_steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "min_lr": 0.1}


def test_matrices_decay_and_norms_do_not():
    model = Transformer(CONFIG)
    decayed, rest = build_optimizer(model, "adamw", 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and {p.dim() for p in decayed["params"]} == {2}
    assert rest["weight_decay"] == 0.0 and {p.dim() for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("optimizer_type", "oracle"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_a_step_is_torchs_own(optimizer_type, oracle):
    torch.manual_seed(0)
    ours = Transformer(CONFIG)
    theirs = copy.deepcopy(ours)
    groups = [{"params": [p for p in theirs.parameters() if (p.dim() == 2) is matrix]} for matrix in (True, False)]
    groups[1]["weight_decay"] = 0.0
    steps = [
        (ours, build_optimizer(ours, optimizer_type, 1e-2, 0.1)),
        (theirs, oracle(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)),
    ]
    tokens = torch.randint(64, (4, 9))
    for model, optimizer in steps:
        for _ in range(3):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_turns_matrices_into_nearly_orthogonal_ones(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    singular_values = torch.logspace(0, -2.5, min(shape))
    turned = u.mT @ orthogonalized(u @ (singular_values[:, None] * vh), torch.float32) @ vh.mT
    diagonal = turned.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(turned, torch.diag_embed(diagonal), rtol=0, atol=1e-3)  # U and V stay
    assert 0.85 < diagonal.min() and diagonal.max() < 1.15


@pytest.mark.parametrize("tail", mostly((0.3, 0.1, 0.03), (0.3, 0.1)))
@pytest.mark.parametrize("shape", [(192, 192), (512, 192), (96, 192)])
def test_rounding_to_bfloat16_takes_no_singular_value_far_past_1(shape, tail):
    """One direction is far ahead of the others, as in real gradients: the polynomials meet a value at 1."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(12, *shape), full_matrices=False)
    singular_values = tail * torch.rand(min(shape))
    singular_values[0] = 1.0
    turned = orthogonalized(u @ (singular_values[:, None] * vh), torch.bfloat16)
    assert torch.linalg.svdvals(turned).max() < 1.15


def test_a_step_of_muon_is_the_papers():
    """W - lr (0.2 sqrt(max(m, n)) U V^T + decay W) for each matrix of the layers; for the rest AdamW with 6 lr and its
    own betas."""
    torch.manual_seed(0)
    ours = Transformer(CONFIG)
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer(ours, "muon", 1e-2, 0.1)
    hidden = {n: p for n, p in theirs.named_parameters() if n.startswith("layers.") and p.dim() == 2}
    assert len(hidden) == 2 * 7
    rest = [p for n, p in theirs.named_parameters() if n not in hidden]
    groups = [{"params": [p for p in rest if p.dim() == 2]}, {"params": [p for p in rest if p.dim() == 1]}]
    groups[1]["weight_decay"] = 0.0
    adamw = torch.optim.AdamW(groups, lr=6e-2, betas=(0.6, 0.98), weight_decay=0.1)
    buffers = {name: torch.zeros_like(p) for name, p in hidden.items()}
    tokens = torch.randint(64, (4, 9))
    for _ in range(3):
        for model in (ours, theirs):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        with torch.no_grad():
            for name, p in hidden.items():
                buffers[name] = 0.95 * buffers[name] + 0.05 * p.grad
                update = orthogonalized((0.05 * p.grad + 0.95 * buffers[name])[None], torch.float32)[0]
                p -= 1e-2 * (0.2 * max(p.shape) ** 0.5 * update + 0.1 * p)
        optimizer.step()
        adamw.step()
        for model in (ours, theirs):
            model.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in ours.parameters()
    )


@pytest.mark.parametrize("optimizer_type", ["muon", "adamw", "adam"])
def test_a_state_that_is_loaded_lies_where_the_parameters_are(optimizer_type):
    model = Transformer(CONFIG)
    optimizer = build_optimizer(model, optimizer_type, 1e-2, 0.1)
    model(*torch.randint(64, (2, 1, 9))).backward()
    optimizer.step()
    with torch.device("meta"):  # in the place of a GPU
        elsewhere = build_optimizer(Transformer(CONFIG), optimizer_type, 1e-3, 0.1)

    load_optimizer_state(elsewhere, optimizer.state_dict())

    assert {t.device.type for state in elsewhere.state.values() for t in state.values()} == {"meta"}
    assert {group["lr"] for group in elsewhere.param_groups} == {1e-3}


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("optimizer_type", ["muon", "adamw", "adam"])
def test_rates_on_the_device_give_the_bits_of_floats_and_leave_the_state_as_it_is(optimizer_type, experts):
    def stepped(on_device: bool):
        torch.manual_seed(0)
        model = Transformer(dataclasses.replace(CONFIG, n_experts=experts))
        optimizer = build_optimizer(model, optimizer_type, 1e-2, 0.1, router_rate=0.3)
        for step in range(6):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.found_inf = torch.tensor(float(step == 3))
            set_rates(optimizer, optimizer_type, 1e-2 / (step + 3), step)
            if on_device:
                rates = rates_of(optimizer, optimizer_type, 1e-2 / (step + 3), step)
                rates = [{name: torch.tensor(value) for name, value in group.items()} for group in rates]
                with rates_on_device(optimizer, rates):
                    optimizer.step()
            else:
                optimizer.step()
        return dict(model.named_parameters()), optimizer.state_dict()

    for one, other in zip(stepped(False), stepped(True), strict=True):
        assert_equal(one, other)


def test_muons_momentum_rises_and_stays():
    assert [momentum_at(step) for step in (0, 150, 300, 10_000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])


def test_wsd_stays_and_then_falls_to_the_end():
    rates = [Schedule(lr_scheduler="wsd", **SCHEDULE).at(step) for step in range(100)]
    assert rates[10:55] == [1.0] * 45
    assert rates[99] == pytest.approx(0.1) and all(a > b for a, b in zip(rates[55:], rates[56:], strict=False))


@pytest.mark.parametrize("lr_scheduler", ["cosine", "linear", "polynomial"])
def test_the_rate_rises_then_falls_and_ends_with_training(lr_scheduler):
    rates = [Schedule(lr_scheduler=lr_scheduler, **SCHEDULE).at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_cosine_is_torchs_own():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=89, eta_min=0.1)
    for step in range(10, 100):
        mine = Schedule(lr_scheduler="cosine", **SCHEDULE).at(step)
        assert mine == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("veto", [None, 0.0, 1.0])
@pytest.mark.parametrize("weight", [1.0, 1 - 2 / 11, 1 - 9 / 18, 0.001])
def test_a_weight_on_the_device_averages_to_the_same_bits(veto, weight):
    own, weights = ([torch.randn(7, 9), torch.randn(33)] for _ in range(2))
    others = [tensor.clone() for tensor in own]
    veto = None if veto is None else torch.tensor(veto)
    average_in(own, weights, weight, veto)
    average_in(others, weights, torch.tensor(weight), veto)
    assert_equal(own, others)


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    ema, expected = MovingAverage(model, decay=0.9), None
    for update in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update_parameters(model)
        weight = model.layers[0].attention.wq.weight.detach().clone()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = weight if expected is None else expected * decay + weight * (1 - decay)
    torch.testing.assert_close(ema.module.layers[0].attention.wq.weight, expected, rtol=1e-4, atol=1e-4)
    assert ema.module.output.weight is ema.module.tok_embeddings.weight
