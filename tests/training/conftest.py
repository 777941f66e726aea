"""What several tests of training begin with."""

import pytest
import torch

from model.training.optimizer import OPTIMIZERS, OptimizerKind, decay_groups
from model.training.schedule import SHAPES


def sgd(parameters, learning_rate, weight_decay, dtype):
    return torch.optim.SGD(decay_groups(parameters, weight_decay), lr=learning_rate, momentum=0.9)


@pytest.fixture
def new_entries(monkeypatch):
    """An optimizer and a schedule that the program lacks: each is a function and an entry."""
    kind = OptimizerKind(
        sgd,
        state=lambda name, parameter: ("momentum_buffer",),
        numbers=("lr", "momentum"),
        per_step=lambda step: {"momentum": 0.8 + step / 100},
    )
    monkeypatch.setitem(OPTIMIZERS, "sgd", kind)
    monkeypatch.setitem(SHAPES, "constant", lambda progress: 1.0)
