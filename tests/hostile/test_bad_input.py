"""Bad and malicious input: a part of the cases of python -m tests.reliability, and the checks that they rest on."""

import dataclasses
import os

import numpy as np
import pytest
import torch

from model.dataset import PretrainDataset, verify_tokens
from model.errors import InputError, shown
from model.token_file.manifest import Manifest, file_sha256, write_manifest
from model.weights.shapes import check_shapes, read_shape, weight_shapes
from tests.conftest import random_model
from tests.reliability import bad_input, malicious

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the cases are forked")


@pytest.mark.long
@needs_fork
@pytest.mark.parametrize("group", [bad_input, malicious], ids=["bad", "malicious"])
def test_each_ends_in_one_clear_line_and_nothing_runs(group, tmp_path):
    counts = group.run("fast", tmp_path)
    assert counts.passed == counts.cases >= 20, "\n".join(counts.failures)


def token_file(path, ids, dtype="uint16", manifest=True):
    np.asarray(ids, dtype=dtype).tofile(path)
    if manifest:
        write_manifest(path, Manifest(dtype, 100, 1, 2, len(ids), 1, "t", "test", file_sha256(path)))
    return path


@pytest.mark.parametrize("manifest", [True, False])
def test_a_token_file_is_read_through_and_its_first_foreign_id_named(tmp_path, monkeypatch, manifest):
    monkeypatch.setattr("model.dataset.BLOCK_BYTES", 64)  # several blocks, the last of them not full
    path = token_file(tmp_path / "a.bin", [*range(90), 300, 5, 400], manifest=manifest)
    assert verify_tokens(PretrainDataset(path, 8, vocab_size=500)) == file_sha256(path)
    with pytest.raises(InputError, match="id 300 at token 90, but the model has 300"):
        verify_tokens(PretrainDataset(path, 8, vocab_size=300))
    with pytest.raises(InputError, match="id 400 at token 92"):
        verify_tokens(PretrainDataset(path, 8, vocab_size=301))


def test_a_token_file_that_changed_since_its_manifest_is_noticed(tmp_path):
    path = token_file(tmp_path / "a.bin", range(41))
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="changed since"):
        verify_tokens(PretrainDataset(path, 8, vocab_size=100))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"n_layers": 3, "hidden_dim": 70}, {"n_kv_heads": 4}])
def test_the_shapes_that_are_expected_are_the_models(tiny_config, changes):
    config = dataclasses.replace(tiny_config, **changes)
    state = random_model(config).state_dict()
    assert weight_shapes(config) == {key: tuple(value.shape) for key, value in state.items()}
    check_shapes(state, config, "w.pth")


def test_weights_of_another_shape_are_refused_before_a_model_is_made(tiny_config, tiny_model):
    state = tiny_model.state_dict()
    for changes, expected in (
        ({"n_layers": 10_000}, "holds 2 layers"),
        ({"dim": 2**20}, "is \\(300, 64\\)|is \\(64, 64\\)|is \\("),
        ({"qk_norm": True}, "no 'layers.0.attention.k_norm"),
    ):
        with pytest.raises(InputError, match=f"w.pth: .*{expected}"):
            check_shapes(state, dataclasses.replace(tiny_config, **changes), "w.pth")
    with pytest.raises(InputError, match="unknown 'extra' inside"):
        check_shapes(state | {"extra": torch.zeros(1)}, tiny_config, "w.pth")
    with pytest.raises(InputError, match="norm.weight holds torch.int64"):
        check_shapes(state | {"norm.weight": torch.zeros(64, dtype=torch.int64)}, tiny_config, "w.pth")


def test_a_shape_from_a_file_is_checked_like_a_setting(tiny_config):
    values = dataclasses.asdict(tiny_config)
    assert read_shape(values, "w.json") == tiny_config
    for name, value in (("dim", "64"), ("dim", 64.0), ("n_heads", True), ("vocab_size", None), ("evil", 1)):
        with pytest.raises(InputError, match=f"w.json: config.{name}"):
            read_shape(values | {name: value}, "w.json")
    with pytest.raises(InputError, match="w.json: config: dim"):
        read_shape(values | {"dim": 30, "head_dim": None}, "w.json")


def test_a_value_in_a_message_is_one_short_line():
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown("x" * 10_000)) == len(shown(10**4000)) == 60
    assert shown(10**5000) == "a very long int"
