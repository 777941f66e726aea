"""Which way of computing attention a run takes on a CPU."""

import dataclasses
import time

import pytest
import torch

from model import accelerator, trial
from model.attention import SHORTEST, VARLEN, WAYS, causal_attention
from model.document_attention import document_starts
from model.LMConfig import LMConfig
from model.training import attention_trial
from model.training.attention_trial import fastest_attention
from model.training.settings import AUTO, TrainingSettings
from tests.conftest import random_model
from tests.tiny_runs import calls_of, exit_code_here, train


def test_the_setting_offers_every_way():
    (attention,) = (f for f in dataclasses.fields(TrainingSettings) if f.name == "attention")
    assert set(attention.metadata["choices"]) == {AUTO, *WAYS, VARLEN}


@pytest.mark.parametrize("documents", [False, True])
def test_every_way_gives_the_same_loss_and_gradients(documents):
    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=SHORTEST + 30)
    model = random_model(config).train()
    tokens, targets = torch.randint(100, (2, 2, config.max_seq_len), generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(config.max_seq_len).repeat(2, 1) // 40 if documents else None
    found = {}
    for way in WAYS:
        model.training_attention = way
        loss = model(tokens, targets, documents=numbers)
        found[way] = (loss.detach(), *torch.autograd.grad(loss, [*model.parameters()]))
    if documents:
        loss = model(tokens, targets, documents=numbers, starts=document_starts(numbers))
        found[VARLEN] = (loss.detach(), *torch.autograd.grad(loss, [*model.parameters()]))
    for way in found.keys() - {"pytorch"}:
        for one, other in zip(found[way], found["pytorch"], strict=True):
            assert (one - other).norm() < 1e-5 * other.norm()
    assert not torch.equal(found["chunks"][1], found["pytorch"][1])  # they are computed differently


def test_in_16_bits_documents_of_any_length_make_products_of_few_shapes(monkeypatch):
    """A CPU's library compiles a kernel for every new shape."""
    generator, lengths = torch.Generator().manual_seed(1), set()
    for _ in range(10):
        inputs = [
            torch.randn(1, heads, 512, 32, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2)
        ]
        documents = (torch.rand(1, 512, generator=generator) < 0.01).cumsum(1)
        with monkeypatch.context() as patched:
            calls = calls_of(patched, torch, "bmm")
            found = causal_attention(*inputs, documents=documents, way="chunks")
            found = found.detach(), *torch.autograd.grad(found, inputs, found.detach())
        lengths |= {b.shape[-1] for _, b in calls}
        expected = causal_attention(*inputs, documents=documents)
        expected = expected.detach(), *torch.autograd.grad(expected, inputs, expected.detach())
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() < 0.02 * other.norm()
    assert lengths <= {32, *range(64, 513, 64)} and len(lengths) > 4  # a head's width, and keys


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [((1, 0.95, 0.95), "chunks"), ((1, 0.8, 0.9), "mixed"), ((1, 0.9, 0.8), "pytorch"), ((1, 2, 3), "chunks")],
)
def test_another_way_than_in_chunks_must_be_clearly_faster(monkeypatch, seconds, fastest):
    monkeypatch.setattr(trial, "BUSY", 0)
    monkeypatch.setattr("model.training.trial.SECONDS", 0)
    monkeypatch.setattr(attention_trial, "_seconds", lambda way, _: dict(zip(WAYS, seconds, strict=True))[way])
    config = LMConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, max_seq_len=100)
    assert fastest_attention(config, 2, torch.float32)[0] == fastest


def test_times_taken_beside_other_work_decide_nothing(monkeypatch):
    monkeypatch.setattr(attention_trial, "_seconds", lambda way, _: time.sleep(0.05) or {"chunks": 2}.get(way, 1))
    config = LMConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, max_seq_len=100)
    assert fastest_attention(config, 2, torch.float32) == ("chunks", "the machine is too busy to try others")


def test_the_trial_leaves_the_random_numbers_alone(monkeypatch):
    config = LMConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, max_seq_len=100)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    monkeypatch.setattr(trial, "BUSY", 0)
    way, why = fastest_attention(config, 2, torch.float32)
    assert way in WAYS and all(name in why for name in WAYS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.long
def test_a_resumed_run_keeps_its_way(flags, tmp_path, monkeypatch, capfd):
    chooser = "model.training.choices.fastest_attention"
    monkeypatch.setattr(chooser, lambda *_: ("mixed", "it was tried"))
    assert train(flags(max_seq_len=64, max_steps=4)).model.training_attention == "mixed"
    monkeypatch.setattr(chooser, lambda *_: ("pytorch", "the machine has changed its mind"))
    resumed = train(flags(max_seq_len=64, max_steps=8, resume="true"))
    assert resumed.training.attention == resumed.model.training_attention == "mixed"
    told = capfd.readouterr().err
    assert "attention mixed (auto): it was tried" in told and "attention mixed (auto): as before" in told
    given = train(flags(max_seq_len=64, max_steps=4, attention="pytorch", out_dir=tmp_path / "given"))
    assert given.model.training_attention == "pytorch" and "attention" not in capfd.readouterr().err


@pytest.mark.long
def test_a_device_that_skips_documents_does_so_and_learns_the_same(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MATECONV_EMULATE_DTYPE", "1")
    kinds = accelerator.KINDS
    monkeypatch.setitem(kinds, "cpu", dataclasses.replace(kinds["cpu"], has_flash_kernels=True))  # as a GPU has
    options = {"document_mask": "true", "dtype": "bfloat16", "max_steps": 12, "eval_interval": 6}
    by_starts = train(flags(**options))
    assert by_starts.model.training_attention == VARLEN
    assert "attention varlen (auto): other documents are skipped" in capfd.readouterr().err
    by_mask = train(flags(**options, attention="pytorch", out_dir=tmp_path / "mask"))
    assert by_mask.model.training_attention == "pytorch"
    assert by_starts.progress.best_val_loss == pytest.approx(by_mask.progress.best_val_loss, rel=1e-3)
    for own, other in zip(by_starts.model.parameters(), by_mask.model.parameters(), strict=True):
        assert (own - other).norm() < 0.02 * other.norm()
    resumed = train(
        flags(**options | {"dtype": "float32", "max_steps": 13}, resume="true")
    )  # which has no such kernels
    assert resumed.outcome == "finished" and resumed.model.training_attention == "pytorch"
    assert "attention pytorch (auto): with a mask, since its kernels need dtype bfloat16" in capfd.readouterr().err


def test_documents_are_not_skipped_where_that_is_impossible(flags, capfd):
    assert exit_code_here(flags(attention="varlen", document_mask="true")) == 2
    assert "error: attention: varlen found, but cpu has no such kernels; use auto" in capfd.readouterr().err


def test_an_unknown_way_is_one_line(flags, capfd):
    assert exit_code_here(flags(attention="flash")) == 2
    assert "attention: 'flash' found, one of auto, chunks, mixed, pytorch, varlen expected" in capfd.readouterr().err
