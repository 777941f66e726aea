"""llama2.c's files: what run.c reads and computes is what the model does, and each format gives back what went in."""

import dataclasses
import struct

import numpy as np
import pytest
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights import Weights, load_weights
from model.weights.llama2c import is_llama2c_bin, load_llama2c, save_llama2c, save_llama2c_checkpoint
from tests.conftest import random_model
from tests.paper_llama import paper_logits

SHAPES = {
    "grouped heads": dict(dim=64, n_heads=4, n_kv_heads=2, vocab_size=320),
    "odd heads, an odd vocabulary": dict(dim=72, n_heads=9, n_kv_heads=3, vocab_size=331),
    "one key head": dict(dim=48, n_heads=2, n_kv_heads=1, vocab_size=300, hidden_dim=100),
}
TIED = pytest.mark.parametrize("tie_embeddings", [True, False])
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
TOKENS = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(1))


def some_weights(**shape):
    config = LMConfig(n_layers=3, max_seq_len=50, **shape)
    state = random_model(config).state_dict()
    return Weights({n: w * 0.3 if n.startswith("layers.") and w.dim() == 2 else w for n, w in state.items()}, config)


def assert_same(found, weights):
    """Every weight bit for bit, and the shape; multiple_of has done its work once hidden_dim is there."""
    assert dataclasses.replace(found.config, multiple_of=64) == weights.config
    assert found.state_dict.keys() == weights.state_dict.keys()
    assert all(torch.equal(found.state_dict[name], weight) for name, weight in weights.state_dict.items())
    Transformer(found.config).load_state_dict(found.state_dict)


def as_run_c_reads(path):
    """(shape, weights) of a `.bin` of version 0, in the order of run.c's memory_map_weights."""
    content = path.read_bytes()
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = struct.unpack("<7i", content[:28])
    numbers, at = np.frombuffer(content, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].reshape(shape)

    keys = dim * n_kv_heads // n_heads
    weights = {"tok_embeddings.weight": take(abs(vocab_size), dim)}
    for name, *shape in (
        ("attention_norm", dim), ("attention.wq", dim, dim), ("attention.wk", keys, dim), ("attention.wv", keys, dim),
        ("attention.wo", dim, dim), ("ffn_norm", dim), ("feed_forward.w1", hidden_dim, dim),
        ("feed_forward.w2", dim, hidden_dim), ("feed_forward.w3", hidden_dim, dim),
    ):  # fmt: skip
        weights |= {f"layers.{n}.{name}.weight": matrix for n, matrix in enumerate(take(n_layers, *shape))}
    weights["norm.weight"] = take(dim)
    cosines, _ = take(seq_len, dim // n_heads // 2), take(seq_len, dim // n_heads // 2)
    assert np.allclose(cosines[:, 0], np.cos(np.arange(seq_len)), atol=1e-6)
    if vocab_size < 0:
        weights["output.weight"] = take(-vocab_size, dim)
    assert at == len(numbers)
    return (n_heads, n_kv_heads, seq_len), weights


@pytest.mark.long
@TIED
@ALL_SHAPES
def test_run_c_computes_what_the_model_does(tmp_path, shape, tie_embeddings):
    weights = some_weights(**shape, tie_embeddings=tie_embeddings)
    save_llama2c(tmp_path / "model.bin", weights, 0)

    (n_heads, n_kv_heads, seq_len), theirs = as_run_c_reads(tmp_path / "model.bin")

    assert (n_heads, n_kv_heads, seq_len) == (weights.config.n_heads, weights.config.n_kv_heads, 50)
    model = Transformer(weights.config).eval()
    model.load_state_dict(load_llama2c(tmp_path / "model.bin").state_dict)
    with torch.no_grad():
        logits = model(TOKENS[None])[0]
    expected = torch.from_numpy(paper_logits(theirs, TOKENS, n_heads, n_kv_heads))
    assert expected.std() > 1
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("version", [0, 1])
@TIED
@ALL_SHAPES
def test_a_bin_gives_back_what_went_in(tmp_path, shape, tie_embeddings, version):
    weights = some_weights(**shape, tie_embeddings=tie_embeddings)
    save_llama2c(tmp_path / "model.bin", weights, version)
    assert is_llama2c_bin(tmp_path / "model.bin")
    found = load_llama2c(tmp_path / "model.bin")
    assert_same(found, weights)
    assert "llama2.c's files name no tokenizer" in found.inferred


@TIED
def test_the_header_of_version_1_is_llama2cs(tmp_path, tie_embeddings):
    weights = some_weights(**SHAPES["grouped heads"], tie_embeddings=tie_embeddings)
    save_llama2c(tmp_path / "model.bin", weights, 1)
    content = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack("<Ii7iB", content[:37]) == (0x616B3432, 1, 64, 192, 3, 4, 2, 320, 50, tie_embeddings)
    assert not any(content[37:256])
    first_norm = weights.state_dict["layers.0.attention_norm.weight"].numpy()
    assert content[256:].startswith(first_norm.astype("<f4").tobytes())


@pytest.mark.parametrize("shape, group", [(SHAPES["grouped heads"], 64), (SHAPES["one key head"], 4)])
@TIED
def test_int8_is_off_by_half_a_step_at_most(tmp_path, shape, group, tie_embeddings):
    weights = some_weights(**shape, tie_embeddings=tie_embeddings)
    weights.state_dict["layers.1.attention.wq.weight"][0] = 0  # a group of zeros has no scale
    save_llama2c(tmp_path / "model.bin", weights, 2)
    assert struct.unpack("<i", (tmp_path / "model.bin").read_bytes()[37:41]) == (group,)
    found = load_llama2c(tmp_path / "model.bin")
    assert found.config == weights.config
    for name, weight in weights.state_dict.items():
        read = found.state_dict[name]
        if weight.dim() == 1:
            assert torch.equal(read, weight)
        else:
            steps = (weight.view(-1, group).abs().amax(1, keepdim=True) / 127).expand(-1, group).reshape(weight.shape)
            assert ((read - weight).abs() <= steps * 0.5001).all()
    # What was rounded once is its own nearest: nothing moves any more.
    save_llama2c(tmp_path / "again.bin", found, 2)
    again = load_llama2c(tmp_path / "again.bin").state_dict
    assert all(torch.allclose(again[name], weight, rtol=1e-6, atol=0) for name, weight in found.state_dict.items())


@ALL_SHAPES
def test_a_checkpoint_gives_back_what_went_in(tmp_path, shape):
    weights = some_weights(**shape, norm_eps=1e-6)
    save_llama2c_checkpoint(tmp_path / "ckpt.pt", weights)
    assert_same(load_llama2c(tmp_path / "ckpt.pt"), weights)
    assert_same(load_weights(tmp_path / "ckpt.pt"), weights)

    content = torch.load(tmp_path / "ckpt.pt")  # as export.py does, whose ModelArgs has these fields and no others
    assert content.keys() == {"model", "model_args", "iter_num", "best_val_loss", "config"}
    assert content["model_args"] == {
        "dim": shape["dim"], "n_layers": 3, "n_heads": shape["n_heads"], "n_kv_heads": shape["n_kv_heads"],
        "vocab_size": shape["vocab_size"], "hidden_dim": weights.config.hidden_dim, "multiple_of": 64,
        "norm_eps": 1e-6, "max_seq_len": 50, "dropout": 0.0,
    }  # fmt: skip


@TIED
def test_a_checkpoint_of_train_py(tmp_path, tie_embeddings):
    """With what its train.py saves beside the model, and hidden_dim from multiple_of = 256."""
    weights = some_weights(
        dim=64, n_heads=4, n_kv_heads=4, vocab_size=320, hidden_dim=256, tie_embeddings=tie_embeddings
    )
    model = Transformer(weights.config)
    model.load_state_dict(weights.state_dict)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95))
    model(TOKENS[None, :-1], TOKENS[None, 1:]).backward()
    optimizer.step()
    shape = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": None, "vocab_size": 320, "multiple_of": 256}
    torch.save(
        {
            "model": {f"_orig_mod.{name}": weight for name, weight in weights.state_dict.items()},
            "optimizer": optimizer.state_dict(),
            "model_args": {**shape, "max_seq_len": 50, "dropout": 0.0},
            "iter_num": 1000,
            "best_val_loss": torch.tensor(1.25),
            "config": {"out_dir": "out", "batch_size": 128, "learning_rate": 5e-4, "compile": True},
        },
        tmp_path / "ckpt.pt",
    )
    assert_same(load_llama2c(tmp_path / "ckpt.pt"), weights)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_norm": True}, "qk_norm True"),
        ({"qkv_bias": True, "rope_theta": 1e6}, r"rope_theta 1000000.0 \(only 10000.0\), qkv_bias True \(only False\)"),
        ({"head_dim": 32}, r"head_dim 32 \(only 16.0\)"),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, "rope_scaling 'linear'"),
    ],
)
def test_what_llama2c_cannot_compute_is_named(tmp_path, changes, message):
    weights = some_weights(**SHAPES["grouped heads"], **changes)
    for save in (save_llama2c, save_llama2c_checkpoint):
        with pytest.raises(InputError, match=f"llama2.c's .* cannot express .*{message}"):
            save(tmp_path / "model", weights)
    assert not list(tmp_path.iterdir())


def test_each_format_has_its_limits(tmp_path):
    with pytest.raises(InputError, match=r"cannot express norm_eps 1e-06 \(only 1e-05\)"):
        save_llama2c(tmp_path / "model.bin", some_weights(**SHAPES["grouped heads"], norm_eps=1e-6))
    with pytest.raises(InputError, match=r"cannot express tie_embeddings False \(only True\)"):
        save_llama2c_checkpoint(tmp_path / "ckpt.pt", some_weights(**SHAPES["grouped heads"], tie_embeddings=False))
    with pytest.raises(InputError, match="version 3 of llama2.c's format requested"):
        save_llama2c(tmp_path / "model.bin", some_weights(**SHAPES["grouped heads"]), 3)
    assert not list(tmp_path.iterdir())


HEADER_0 = (64, 192, 3, 4, 2, 320, 50)
MOST = 2**31 - 1
ABSURD = {
    "a dim that is no number of heads": ((65, 192, 3, 4, 2, 320, 50), "dim: 65"),
    "no layers": ((64, 192, 0, 4, 2, 320, 50), "n_layers: 0 found"),
    "heads below 0": ((64, 192, 3, -4, 2, 320, 50), "n_heads: -4 found"),
    "key heads that do not divide": ((64, 192, 3, 4, 3, 320, 50), "n_kv_heads: 3 does not divide"),
    "no vocabulary": ((64, 192, 3, 4, 2, 0, 50), "vocab_size: 0 found"),
    "all at their most": ((MOST,) * 7, "found"),
    "a model of a petabyte": ((2**20, 2**24, 9_000, 4, 2, 2**24, 2**20), "expected; it is truncated"),
    "a context without end": ((64, 192, 3, 4, 2, 320, MOST), "max_seq_len: 2147483647 found"),
}


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("shape, message", ABSURD.values(), ids=ABSURD)
def test_absurd_headers_are_one_line_and_take_no_memory(tmp_path, shape, message, version):
    header = struct.pack("<7i", *shape)
    if version:
        header = (struct.pack("<Ii", 0x616B3432, version) + header + struct.pack("<Bi", 1, 64)).ljust(256, b"\0")
    path = tmp_path / "model.bin"
    path.write_bytes(header + bytes(1000))
    with pytest.raises(InputError, match=message) as raised:
        load_llama2c(path)
    assert "\n" not in str(raised.value) and "model.bin" in str(raised.value)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_file_of_another_size_is_noticed(tmp_path, version):
    path = tmp_path / "model.bin"
    save_llama2c(path, some_weights(**SHAPES["grouped heads"]), version)
    content = path.read_bytes()
    for size in (0, 3, 20, 27, 28, 40, 255, 256, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="truncated"):
            load_llama2c(path)
        assert is_llama2c_bin(path) == (size >= (4 if version else 28))  # what the header says is believed
    path.write_bytes(content + b"\0")
    with pytest.raises(InputError, match=f"{len(content) + 1:,} bytes, by its header {len(content):,} expected"):
        load_llama2c(path)


def test_other_headers_of_version_1_and_2(tmp_path):
    path = tmp_path / "model.bin"
    for version, group, message in ((3, 64, "version 3 of"), (2, 48, "48 numbers share a scale"), (2, 0, "0 numbers")):
        header = struct.pack("<Ii7iBi", 0x616B3432, version, *HEADER_0, 1, group)
        path.write_bytes(header.ljust(256, b"\0"))
        with pytest.raises(InputError, match=message):
            load_llama2c(path)


def test_other_files_are_no_models_of_llama2c(tmp_path, tiny_model):
    ids = np.tile(np.arange(1, 50), 500)
    ids.astype("<u2").tofile(tmp_path / "tokens.bin")  # token files have the same suffix
    ids.astype("<u4").tofile(tmp_path / "wide_tokens.bin")
    torch.save(tiny_model.state_dict(), tmp_path / "pretrain_64.pth")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "text.bin").write_bytes("春江潮水连海平，海上明月共潮生。".encode())
    (tmp_path / "half.pt").write_bytes((tmp_path / "pretrain_64.pth").read_bytes()[:5000])
    paths = list(tmp_path.iterdir())
    assert len(paths) == 6 and not any(is_llama2c_bin(path) for path in [*paths, tmp_path, tmp_path / "none"])
    for path in paths:
        with pytest.raises(InputError) as raised:
            load_llama2c(path)
        assert "\n" not in str(raised.value)


ARGS = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 9}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": {}}, "no model with its model_args"),
        ({"model": [], "model_args": ARGS}, "no model with its model_args"),
        ({"model": {}, "model_args": {"n_layer": 12, "n_head": 12, "n_embd": 768}}, "does not say dim, n_layers"),
        ({"model": {}, "model_args": {**ARGS, "n_layers": "2"}}, "n_layers: '2' found"),
        ({"model": {}, "model_args": {**ARGS, "experts": 1}}, "experts is unknown"),
        ({"model": {}, "model_args": ARGS}, "expected a state dict"),
        ({"model": {"a": torch.ones(2)}, "model_args": ARGS}, "holds 0 layers"),
    ],
)
def test_checkpoints_that_are_none(tmp_path, content, message):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=message) as raised:
        load_llama2c(tmp_path / "ckpt.pt")
    assert "\n" not in str(raised.value)
