"""The optimizer's groups, the learning rate and the average, against what torch has of the same."""

import copy

import pytest
import torch

from model.LMConfig import LMConfig
from model.model import Transformer
from model.optim import Schedule, build_ema, build_optimizer

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


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    ema, expected = build_ema(model, decay=0.9), None
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
