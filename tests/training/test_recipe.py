"""The rules behind `auto`: what they say for models and runs whose right settings are known."""

import contextlib
import dataclasses
import types

import pytest
import torch

from model.training.choices import Ranks
from model.training.memory import free_memory, rows_that_fit, saved_bytes
from model.training.optimizer import OPTIMIZERS
from model.training.plan import plan_run
from model.training.recipe import (
    ADAPTERS_TIMES,
    TUNING_SHARE,
    automatic_batch_size,
    automatic_epochs,
    automatic_learning_rate,
    automatic_tokens_per_step,
    automatic_warmup,
    batch_text,
    compile_pays,
    count_text,
    duration_text,
)
from model.training.settings import build_settings
from optimized_pretrain import Trainer
from tests.conftest import random_model
from utils import Processes


@pytest.mark.parametrize("optimizer_type", OPTIMIZERS)
def test_the_rate_grows_with_the_batch_and_falls_with_the_model(optimizer_type):
    def rate(parameters, tokens):
        return automatic_learning_rate(optimizer_type, parameters, tokens)

    assert rate(3_000_000, 2048) == OPTIMIZERS[optimizer_type].base_rate
    assert rate(3_000_000, 8192) == pytest.approx(2 * rate(3_000_000, 2048), rel=0.05)
    assert rate(48_000_000, 2048) == pytest.approx(rate(3_000_000, 2048) / 4, rel=0.05)
    assert rate(3_000_000, 2**30) == pytest.approx(4 * rate(3_000_000, 2048), rel=0.05)
    assert rate(3_000_000, 1) == pytest.approx(rate(3_000_000, 2048) / 4, rel=0.05)
    shares = (TUNING_SHARE, TUNING_SHARE * ADAPTERS_TIMES)
    tuning, adapting = (automatic_learning_rate(optimizer_type, 3_000_000, 2048, share) for share in shares)
    assert (0.3 * rate(3_000_000, 2048), 10 * tuning) == pytest.approx((tuning, adapting), rel=0.05)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (12, 3), (100, 10), (1600, 80), (10**6, 1000)])
def test_warm_up_is_a_twentieth_within_limits(total, warmup):
    assert automatic_warmup(total) == warmup < total


@pytest.mark.parametrize(
    ("kind", "epoch_tokens", "parameters", "epochs"),
    [
        ("chats", 600, 10**7, 60), ("chats", 50_000, 10**7, 9), ("chats", 10**6, 10**7, 3), ("pairs", 600, 10**7, 1),
        ("texts", 10**9, 10**7, 1), ("texts", 500_000, 10**6, 3), ("texts", 100_000, 500_000, 4),
        ("texts", 100_000, 500_001, 2), ("texts", 500_000, 27 * 10**6, 2), ("texts", 10**9, 10**11, 1),
    ],
)  # fmt: skip
def test_fewer_chats_are_read_more_often(kind, epoch_tokens, parameters, epochs):
    assert automatic_epochs(kind, epoch_tokens, parameters)[0] == epochs


@pytest.mark.parametrize(
    ("epoch_tokens", "epochs", "max_steps", "expected"),
    [
        (2_000_000, 1, None, 4096), (1_000_000, 2, None, 4096), (50_000_000, 1, None, 65536),
        (10_000, 1, None, 1024), (200_000, 2, None, 1024), (205_000, 2, None, 2048), (200_000, 1, 100, 2048),
        (10**12, 1, None, 524_288), (3_200_000, 15, 1600, 2048),
        (50_000_000, 1, 10, 65536),  # a run cut short takes the whole run's batch
    ],
)  # fmt: skip
def test_a_run_has_about_600_steps(epoch_tokens, epochs, max_steps, expected):
    assert automatic_tokens_per_step(epoch_tokens, epochs, max_steps)[0] == expected


def test_a_batch_is_what_the_step_wants_as_far_as_samples_and_memory_go():
    assert automatic_batch_size(4096, 256, 10_000, None) == 16
    assert automatic_batch_size(4096, 256 * 4, 10_000, 512) == 4  # two processes, two accumulated
    assert automatic_batch_size(4096, 256, 10_000, 3) == 3
    assert automatic_batch_size(4096, 256, 5, 100) == 5
    assert automatic_batch_size(2048, 4096, 100, 100) == 1


def test_compiling_pays_on_a_gpu_for_a_long_run():
    assert compile_pays("cuda", 3600, "g++", "win32")[0]
    assert compile_pays("cpu", 3600, "g++", "linux")[0]
    for device, seconds, compiler, platform in (
        ("cuda", 60, "g++", "linux"),
        ("cuda", 3600, None, "linux"),
        ("cpu", 300, "g++", "linux"),
        ("cpu", 1e6, None, "linux"),
        ("cpu", 1e6, "g++", "darwin"),
        ("mps", 1e6, "c", "darwin"),
    ):
        pays, why = compile_pays(device, seconds, compiler, platform)
        assert not pays and why
    assert "takes under 15 min, too short" in compile_pays("cpu", 899, "g++", "linux")[1]
    assert "takes over 3 min, and" in compile_pays("cuda", 181, "g++", "linux")[1]


def test_numbers_are_printed_as_people_say_them():
    assert (count_text(2_012_345), count_text(950)) == ("2.0M", "950")
    assert [duration_text(s) for s in (5.25, 61, 4320, 200_000)] == ["5.25 s", "1 min", "1 h 12 min", "2 days 7 h"]
    assert (batch_text(16, 1, 1), batch_text(8, 2, 4)) == ("16", "8 x 2 accumulated x 4 processes")


# ------------------------------------------------------------------------------------------------------------ memory


def test_what_a_forward_pass_keeps_grows_evenly_with_the_batch(tiny_config):
    model = random_model(tiny_config).train()
    one, two, four = (saved_bytes(model, rows, contextlib.nullcontext(), False) for rows in (1, 2, 4))
    assert four - two == 2 * (two - one) > 0
    # every layer keeps at least its feed-forward's three products and its attention's weights, in float32
    c = tiny_config
    assert two - one > 4 * c.n_layers * c.max_seq_len * (3 * c.hidden_dim + c.n_heads * c.max_seq_len // 2)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.long
def test_twice_the_memory_takes_about_twice_the_samples(tiny_config):
    model, free = random_model(tiny_config).train(), 400_000_000
    fits = [rows_that_fit(model, contextlib.nullcontext(), 1, 0, size, False) for size in (free, 2 * free)]
    assert fits[1] == pytest.approx(2 * fits[0], rel=0.1) and fits[0] > 1
    assert rows_that_fit(model, contextlib.nullcontext(), 1, beside=free, free=free, with_documents=False) == 0


@pytest.mark.parametrize("with_documents", [False, True])
def test_the_samples_that_fit_are_those_that_a_step_with_such_masks_holds(tiny_config, with_documents):
    config = dataclasses.replace(tiny_config, n_layers=1, dim=8, n_heads=1, n_kv_heads=1, vocab_size=8, hidden_dim=8)
    model, free = random_model(config).train(), 20_000_000
    fits = rows_that_fit(model, contextlib.nullcontext(), 1, 0, free, with_documents)
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    steps = [saved_bytes(model, rows, contextlib.nullcontext(), with_documents) for rows in (fits, fits + 1)]
    assert gradients + steps[0] <= 0.6 * free < gradients + steps[1]


def test_choosing_needs_no_more_of_the_processes_than_it_declares(flags):
    trainer = Trainer(build_settings({}, flags(batch_size="auto", compile="auto")), Processes())
    declared = {*Ranks.__annotations__, *(name for name in vars(Ranks) if not name.startswith("_"))}
    ranks = types.SimpleNamespace(**{name: getattr(trainer.processes, name) for name in declared})
    plan = plan_run(trainer.settings, trainer.data, trainer.model, trainer.hardware, None, ranks, print)
    assert plan.chosen["batch_size"] == trainer.training.batch_size


def test_the_memory_that_is_free_is_shared_by_the_machines_processes():
    free = free_memory(torch.device("cpu"))
    assert free > 10_000_000
    assert free_memory(torch.device("cpu"), processes=4) == pytest.approx(free / 4, rel=0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_the_largest_batch_whose_step_fits_is_found(tiny_config):
    model = random_model(tiny_config).to("cuda").train()
    free = 400_000_000
    fits = rows_that_fit(model, contextlib.nullcontext(), wanted=2**20, beside=0, free=free, with_documents=False)
    assert 1 < fits < 2**20 and fits & (fits - 1) == 0
    assert rows_that_fit(model, contextlib.nullcontext(), wanted=3, beside=0, free=free, with_documents=False) == 3
