"""The limit that MFU is measured against: the best rate of matrix products here."""

import time

import pytest
import torch

from tests.conftest import MEASURE

CPU = torch.device("cpu")
LAYER = (1376, 512)


@pytest.mark.parametrize(("weights", "expected"), [([], 1.25e12), ([LAYER], 2.4e12), ([(512, 512)], 1.25e12)])
def test_the_limit_is_the_best_rate_of_squares_and_of_the_layers_shapes(monkeypatch, weights, expected):
    """On a machine as Intel's with AMX: a product of 1,024 reaches half of what a layer's does."""
    now = [0.0]

    def linear(x, weight):
        rate = 2.4e12 if weight.shape == LAYER else 1.25e12 if len(weight) == 1024 else 1e12
        now[0] += 2 * len(x) * weight.numel() / rate

    monkeypatch.setattr("torch.nn.functional.linear", linear)
    monkeypatch.setattr("utils.time.perf_counter", lambda: now[0])
    assert MEASURE(CPU, torch.float32, weights) == pytest.approx(expected)


@pytest.mark.long
def test_the_limit_is_what_a_plain_measurement_gives():
    """Within a factor of three: other work on the machine may slow one of them down, and a wrong unit would be more."""
    x, seconds = torch.randn(1024, 1024), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        x @ x
        seconds = min(seconds, time.perf_counter() - start)
    assert 1 / 3 < MEASURE(CPU, torch.float32) / (2 * 1024**3 / seconds) < 3
