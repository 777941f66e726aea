"""Activations that the backward pass computes again: fewer bytes, the same bits."""

import contextlib

import pytest
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.training.memory import saved_bytes
from model.training.settings import build_settings
from tests.conftest import random_model
from tests.tiny_runs import assert_same_end, losses, train

CONFIG = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=96)
TOKENS = torch.randint(3, 300, (2, 97), generator=torch.Generator().manual_seed(1))


def gradients(checkpointing: str, autocast=contextlib.nullcontext, compiled: bool = False, documents=None, **shape):
    model = random_model(LMConfig(**vars(CONFIG) | shape)).train()
    model.checkpointing = checkpointing
    torch.manual_seed(0)  # dropout's
    called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with autocast():
        loss = called(TOKENS[:, :-1], TOKENS[:, 1:], documents=documents)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"dropout": 0.3},
        {"autocast": bfloat16, "qk_norm": True},
        {"documents": torch.arange(96).expand(2, -1) // 40},
        {"flash_attn": False, "dropout": 0.1},
        pytest.param({"compiled": True}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_gradients_keep_their_bits(checkpointing, how):
    for kept, again in zip(gradients("none", **how), gradients(checkpointing, **how), strict=True):
        assert torch.equal(kept, again)


def test_what_is_kept(tiny_config):
    def kept(checkpointing: str, layers: int) -> int:
        model = random_model(LMConfig(**vars(CONFIG) | {"n_layers": layers})).train()
        model.checkpointing = checkpointing
        return saved_bytes(model, 2, contextlib.nullcontext(), False)

    numbers = 2 * 96  # tokens
    none, selective, full = (kept(how, 3) - kept(how, 2) for how in ("none", "selective", "full"))
    assert full == 4 * numbers * CONFIG.dim  # a layer's input
    hidden = 4 * numbers * CONFIG.hidden_dim
    assert none - selective >= 4 * hidden  # w1 x, w3 x, silu, their product; and the norm's
    assert selective < none - 4 * hidden + full


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_a_run_ends_with_the_same_bits(flags, tmp_path, checkpointing):
    options = {"dropout": 0.1, "accumulation_steps": 2, "use_ema": "true"}
    train(flags(out_dir=tmp_path / "kept", **options))
    train(flags(out_dir=tmp_path / "again", activation_checkpointing=checkpointing, **options))
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")
    assert_same_end(tmp_path / "kept", tmp_path / "again")


def test_an_unknown_way_is_refused():
    with pytest.raises(InputError, match="activation_checkpointing: 'some' found, one of none, selective, full"):
        build_settings({}, {"activation_checkpointing": "some"})
