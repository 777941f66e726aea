"""Meta's release folders: params.json and consolidated.00.pth, read and written."""

import dataclasses
import json

import pytest
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights import Weights
from model.weights.meta_folder import is_meta_folder, load_meta_folder, read_params, save_meta_folder
from tests.conftest import random_model

SHAPES = {
    "grouped heads": dict(dim=64, n_heads=4, n_kv_heads=2, vocab_size=320),
    "odd heads, an odd vocabulary": dict(dim=72, n_heads=9, n_kv_heads=3, vocab_size=331),
    "a width of its own": dict(dim=48, n_heads=2, n_kv_heads=1, vocab_size=300, hidden_dim=101),
    "Llama 3": dict(dim=64, n_heads=4, n_kv_heads=2, vocab_size=320, rope_theta=5e5, norm_eps=1e-6),
    "Llama 3.1": dict(
        dim=64, n_heads=4, n_kv_heads=2, vocab_size=320, rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0
    ),
}  # fmt: skip


def some_weights(**shape):
    config = LMConfig(n_layers=2, **shape)
    return Weights(random_model(config).state_dict(), config)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_folder_gives_back_what_went_in(tmp_path, shape, tie_embeddings):
    weights = some_weights(**shape, tie_embeddings=tie_embeddings)
    save_meta_folder(tmp_path / "model", weights)
    assert is_meta_folder(tmp_path / "model")

    found = load_meta_folder(tmp_path / "model")

    context = dict(max_seq_len=512, multiple_of=64)  # no file says the one, and the other is done with
    assert dataclasses.replace(found.config, **context) == dataclasses.replace(weights.config, **context)
    assert found.state_dict.keys() == weights.state_dict.keys()
    assert all(torch.equal(found.state_dict[name], weight) for name, weight in weights.state_dict.items())
    assert f"max_seq_len {found.config.max_seq_len} is assumed, as in Llama" in found.inferred
    assert "tokenizer" in found.inferred and "\n" not in found.inferred


# The releases' params.json, but for Llama 1's and 2's vocab_size (-1: the tokenizer's), and what Meta's code and
# transformers' conversion make of them.
RELEASES = {
    "Llama 1 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": 32000},
        dict(hidden_dim=11008, n_kv_heads=32, vocab_size=32000, rope_theta=1e4, max_seq_len=2048, norm_eps=1e-6),
    ),
    "Llama 2 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": 32000},
        dict(hidden_dim=11008, n_kv_heads=32, vocab_size=32000, rope_theta=1e4, max_seq_len=4096),
    ),
    "Llama 3 8B": (
        {
            "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
        },
        dict(hidden_dim=14336, n_kv_heads=8, vocab_size=128256, rope_theta=5e5, max_seq_len=8192, rope_scaling=None),
    ),
    "Llama 3.1 8B": (
        {
            "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
        },
        dict(hidden_dim=14336, rope_scaling="llama3", rope_factor=8.0, rope_low_freq_factor=1.0,
             rope_high_freq_factor=4.0, rope_original_max_seq_len=8192, max_seq_len=131072),
    ),
    "Llama 3.2 1B": (
        {
            "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
            "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
        },
        dict(hidden_dim=8192, rope_scaling="llama3", rope_factor=32.0, max_seq_len=131072),
    ),
}  # fmt: skip


@pytest.mark.parametrize("params, expected", RELEASES.values(), ids=RELEASES)
def test_the_shapes_of_the_releases(params, expected):
    config, release = read_params(params, "params.json")
    assert {name: getattr(config, name) for name in expected} == expected
    assert release in ("Llama 1", "Llama 2", "Llama 3", "Llama 3.1")


def write(folder, params, state=None, part="consolidated.00.pth"):
    weights = some_weights(**SHAPES["grouped heads"])
    (folder / "params.json").write_text(params if isinstance(params, str) else json.dumps(PARAMS | params))
    torch.save(weights.state_dict if state is None else state, folder / part)
    return weights


PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 64}
PARAMS |= {"norm_eps": 1e-5}


def test_bfloat16_buffers_and_a_missing_output(tmp_path):
    weights = some_weights(**SHAPES["grouped heads"])
    state = {name: weight.bfloat16() for name, weight in weights.state_dict.items() if name != "output.weight"}
    write(tmp_path, {"max_seq_len": 99}, {**state, "rope.freqs": torch.ones(8)})

    found = load_meta_folder(tmp_path)

    assert found.config == dataclasses.replace(weights.config, max_seq_len=99) and "assumed" not in found.inferred
    model = Transformer(found.config)
    model.load_state_dict(found.state_dict)
    assert torch.equal(model.output.weight, state["tok_embeddings.weight"].float())


@pytest.mark.parametrize(
    "params, message",
    [
        ({"dim": 32}, r"tok_embeddings.weight is \(320, 64\)|is \(\d+, \d+\), by its description"),
        ({"ffn_dim_multiplier": 2}, "by its description"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier is 1e\\+300"),
        ({"ffn_dim_multiplier": "a"}, "ffn_dim_multiplier is 'a'"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes'"),
        ({"n_layers": 10**12}, "n_layers: 1000000000000 found"),
        ({"n_heads": 5}, "dim: 64 is not a multiple"),
        ({"multiple_of": 0}, "multiple_of: 0 found"),
        ({"max_seq_len": 2**40}, "max_seq_len: .* found"),
        ({"moe": {"num_experts": 8}}, "moe inside, so it is no plain Llama"),
        ("[1]", "a JSON object expected"),
        ("{", "a JSON object expected"),
        ("[" * 5000, "a JSON object expected"),
        ('{"n_heads": 4}', "does not say dim, n_layers"),
        (" " * (17 << 20), "over 16,777,216 bytes"),
    ],
)
def test_params_that_describe_other_weights_are_one_line(tmp_path, params, message):
    write(tmp_path, params)
    with pytest.raises(InputError, match=message) as raised:
        load_meta_folder(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_parts_that_are_missing_too_many_or_damaged(tmp_path):
    assert not is_meta_folder(tmp_path)
    weights = write(tmp_path, {})
    (tmp_path / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(InputError, match="2 parts, from consolidated.00.pth to consolidated.01.pth found"):
        load_meta_folder(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    content = (tmp_path / "consolidated.00.pth").read_bytes()
    (tmp_path / "consolidated.00.pth").write_bytes(content[:-1000])
    with pytest.raises(InputError, match="truncated"):
        load_meta_folder(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    assert not is_meta_folder(tmp_path)
    with pytest.raises(InputError, match="none of it found"):
        load_meta_folder(tmp_path)
    with pytest.raises(InputError, match="exists already"):
        save_meta_folder(tmp_path, weights)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_norm": True}, "qk_norm True"),
        ({"qkv_bias": True}, "qkv_bias True"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, r"rope_scaling 'linear' \(only None or llama3\)"),
        ({"rope_scaling": "llama3", "rope_factor": 32.0}, r"rope_factor 32.0 \(only 8.0\)"),
    ],
)
def test_what_params_json_cannot_say_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"Meta's params.json cannot express {message}"):
        save_meta_folder(tmp_path / "model", some_weights(**SHAPES["grouped heads"], **changes))
    assert not list(tmp_path.iterdir())
