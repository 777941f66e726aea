"""Folders of transformers that are damaged or made to do harm: one line, or a model where that does not matter."""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.convert import convert
from model.weights.transformers_folder import load_transformers, save_transformers
from tests.bad_files import OTHER_KINDS, assert_refused, load_or_refusal, many
from tests.model_shapes import assert_same, weights_of
from tests.reliability.malicious_archives import ARCHIVES, PICKLES, save_pickle

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"
GATE, BIAS = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.o_proj.bias"
MARK = "import os\nos.mkdir('CANARY')\n"
MANY = many(150)


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer_folder):
    """A folder with which nothing is wrong."""
    folder = tmp_path_factory.mktemp("good") / "model"
    save_transformers(folder, weights_of({"max_seq_len": 64}, tokenizer_folder))
    return folder


@pytest.fixture
def bad(good, tmp_path, monkeypatch):
    """A copy, which a test spoils; nothing may be made where it is run, and nothing changed in it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield shutil.copytree(good, tmp_path / "model")
    assert not list(here.iterdir())


def config_of(folder, **changes) -> None:
    """Change keys of config.json; ... takes one away."""
    values = json.loads((folder / "config.json").read_text()) | changes
    write(folder / "config.json", {key: value for key, value in values.items() if value is not ...})


def write(path, value) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


# ---------------------------------------------------------------------------------------------------------- config.json

CONFIGS = {
    "a mixture of experts": ({"num_local_experts": 8}, "num_local_experts is 8"),
    "MiniMind's experts": ({"model_type": "minimind", "use_moe": True}, "use_moe is True, but there are no experts"),
    "another kind": ({"model_type": "gpt2"}, "model_type is 'gpt2', one of llama, mistral, qwen2, qwen3, minimind"),
    "no kind": ({"model_type": ...}, "model_type is None"),
    "a list for the kind": ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .* no such key expected"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', silu or swish expected"),
    "biases of the feed-forward": ({"mlp_bias": True}, "mlp_bias is True"),
    "half of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "half of a head, version 5": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "windows": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    "layers that are a number": ({"layer_types": 5}, "layer_types is 5"),
    "layers by name": ({"layer_types": {"a": 1}}, "layer_types is"),
    "YaRN": ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "RoPE of type 'yarn'"),
    "dynamic, older": ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic"}}, "RoPE of type 'dynamic'"),
    "a list for RoPE": ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
    "linear without a factor": ({"rope_parameters": {"rope_type": "linear"}}, "rope_factor: None found"),
    "llama3 without values": ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_low_freq_factor: None"),
    "a base of nothing": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: 0 found"),
    "a trillion layers": ({"num_hidden_layers": 10**12}, "n_layers: 1000000000000 found"),
    "9,999 layers": ({"num_hidden_layers": 9999}, "holds 2 layers, its description says n_layers 9,999"),
    "a wide model": ({"hidden_size": 2**20}, "by its description"),
    "a number of 401 digits": ({"hidden_size": 10**400}, "dim: .* found"),
    "no heads": ({"num_attention_heads": 0}, "n_heads: 0 found"),
    "no key heads": ({"num_key_value_heads": 0}, "n_kv_heads: 0 found"),
    "three key heads": ({"num_key_value_heads": 3}, "n_kv_heads: 3 does not divide n_heads = 4"),
    "odd heads": ({"head_dim": 15}, "head_dim: 15 is odd"),
    "text for a number": ({"hidden_size": "64"}, "dim: '64' found"),
    "an eps that is none": ({"rms_norm_eps": float("nan")}, "norm_eps: nan found"),
    "no shape": ({"hidden_size": ..., "intermediate_size": ...}, "does not say dim of the model"),
    "not tied": ({"tie_word_embeddings": False}, "no 'output.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_another_model(bad, changes, message):
    config_of(bad, **changes)
    assert_refused(bad, message)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, '{"a":' * 50_000, "\ufeff{}", "9" * 6000])
def test_a_config_that_is_no_object(bad, content):
    write(bad / "config.json", content)
    assert_refused(bad, r"config.json: (a JSON object expected|model_type is None)")


def test_a_config_without_end(bad):
    with open(bad / "config.json", "wb") as file:
        file.truncate(1 << 30)
    assert_refused(bad, "config.json: a JSON object expected .over 16,777,216 bytes")


KEYS = [
    "model_type", "hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types", "use_sliding_window",
]  # fmt: skip
ANYTHING = st.recursive(
    st.sampled_from(OTHER_KINDS) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.long
@MANY
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=3))
def test_any_value_in_a_config(bad, good, changes):
    shutil.copy(good / "config.json", bad / "config.json")
    config_of(bad, **changes)
    load_or_refusal(bad)


def test_code_in_a_folder_is_not_run(bad, good, tmp_path):
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (bad / name).write_text(MARK)
    maps = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    config_of(bad, auto_map=maps | {"AutoTokenizer": ["tokenization_x.X", None]}, architectures=["X"])
    values = json.loads((bad / "tokenizer_config.json").read_text())
    values |= {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    write(bad / "tokenizer_config.json", values)
    assert_same(load_transformers(bad), load_transformers(good))
    convert(bad, tmp_path / "back.pth", say=lambda line: None)
    convert(bad, tmp_path / "back", say=lambda line: None)
    assert not list((tmp_path / "back").glob("*.py"))


# ---------------------------------------------------------------------------------------------------------- safetensors


def parts(folder) -> tuple[dict, bytes]:
    """Header and numbers of its safetensors."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(folder, header, numbers: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(packed + text + numbers)


@pytest.mark.parametrize("length", [0, 3, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_another_length(bad, length):
    put_together(bad, *parts(bad), length=length)
    assert_refused(bad, "no whole safetensors file")


@MANY
@example(0)
@example(7)
@given(st.integers(0, 330_000))
def test_safetensors_that_are_cut_off(bad, good, place):
    content = (good / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[: min(place, len(content) - 1)])
    assert_refused(bad, "no whole safetensors file")


@MANY
@given(st.lists(st.tuples(st.integers(8, 2000), st.integers(0, 255)), min_size=1, max_size=4))
def test_safetensors_with_other_bytes_in_the_header(bad, good, changes):
    content = bytearray((good / "model.safetensors").read_bytes())
    for place, byte in changes:
        content[place] = byte
    (bad / "model.safetensors").write_bytes(content)
    load_or_refusal(bad)


ENTRIES = {
    "over another": {"data_offsets": [0, 16384]},
    "past the end": {"data_offsets": [2**62, 2**62 + 16384]},
    "backwards": {"data_offsets": [16384, 0]},
    "below 0": {"data_offsets": [-4, 16380]},
    "of 2^64 numbers": {"shape": [2**32, 2**32]},
    "of none": {"shape": [0, 2**63]},
    "of fewer": {"shape": [64, 32]},
    "of an unknown kind": {"dtype": "F31"},
    "without a shape": {"shape": None},
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_header_that_lies(bad, entry):
    header, numbers = parts(bad)
    header[QUERY] |= entry
    put_together(bad, header, numbers)
    assert_refused(bad, "no whole safetensors file")


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (QUERY, torch.zeros(64, 64, dtype=torch.int8), "holds torch.int8, floating-point numbers expected|torch.int8"),
        (QUERY, torch.zeros(64, 64, dtype=torch.bool), "torch.bool"),
        (QUERY, torch.zeros(64, 64, dtype=torch.float64), "torch.float64, float32, float16 or bfloat16 expected"),
        (QUERY, torch.zeros(64, 64, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (NORM, torch.zeros(64, dtype=torch.complex64), "torch.complex64"),
        (QUERY, torch.zeros(64), r"is \(64,\), by its description \(64, 64\)"),
        (QUERY, torch.zeros(64, 64, 1), r"is \(64, 64, 1\)"),
        (BIAS, torch.ones(64), "o_proj.bias' is not zero"),
        ("model.layers.7.mlp.up_proj.weight", torch.zeros(2), "an unknown"),
        ("x" * 100_000 + "\n", torch.zeros(2), "an unknown"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_a_tensor_of_another_kind(bad, name, tensor, message):
    save_file(load_file(bad / "model.safetensors") | {name: tensor}, bad / "model.safetensors")
    assert_refused(bad, message)


@pytest.mark.parametrize("dtype, bits", [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("I64", 64)])
def test_numbers_of_a_kind_that_torch_or_we_have_not(bad, dtype, bits):
    header, _ = parts(bad)
    size, place = 0, {}
    for name, entry in header.items():
        if name != "__metadata__":
            each = bits if name == QUERY else 32
            begin, size = size, size + torch.Size(entry["shape"]).numel() * each // 8
            place[name] = {"dtype": dtype if name == QUERY else "F32", "shape": entry["shape"]}
            place[name]["data_offsets"] = [begin, size]
    put_together(bad, place, bytes(size))
    assert_refused(bad, "q_proj.weight.* (cannot be read|holds torch)|is .*by its description")


def test_a_gate_without_dimensions(bad):
    save_file(load_file(bad / "model.safetensors") | {GATE: torch.zeros(())}, bad / "model.safetensors")
    config_of(bad, intermediate_size=...)
    assert_refused(bad, "does not say hidden_dim|is .., by its description")


def test_what_does_no_harm_is_read(bad, good):
    harmless = {BIAS: torch.zeros(64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(load_file(bad / "model.safetensors") | harmless, bad / "model.safetensors")
    assert_same(load_or_refusal(bad), load_transformers(good))


# ----------------------------------------------------------------------------------------- an index, and torch's files

INDEXES = {
    "another folder": {"weight_map": {"a": "../good/model.safetensors"}},
    "from the root": {"weight_map": {"a": "/etc/passwd"}},
    "up": {"weight_map": {"a": ".."}},
    "a list": {"weight_map": {"a": ["part.safetensors"]}},
    "a number": {"weight_map": {"a": "part.safetensors", "b": 5}},
    "missing": {"weight_map": {"a": "part.safetensors", "b": "other.safetensors"}},
    "a long name": {"weight_map": {"a": "x" * 5000}},
    "a zero in a name": {"weight_map": {"a": "a\0b"}},
    "half of a character": {"weight_map": {"a": "\ud800"}},
    "a config": {"weight_map": {"a": "config.json"}},
    "nothing": {"weight_map": {}},
    "no map": {"weight_map": None},
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("content", INDEXES.values(), ids=INDEXES)
def test_an_index_that_names_something_else(bad, content):
    (bad / "model.safetensors").rename(bad / "part.safetensors")
    write(bad / "model.safetensors.index.json", content)
    assert_refused(bad, "no map from weights to files|is missing|PyTorch|a JSON object expected")


@pytest.mark.parametrize("name", ["os.system", "subprocess", "a module of the folder", "a text of 2**62 bytes"])
def test_a_pickle_that_runs_something_is_refused(bad, name):
    (bad / "model.safetensors").unlink()
    save_pickle(bad / "pytorch_model.bin", PICKLES[name])
    assert_refused(bad, "pytorch_model.bin: (expected tensors and plain values only|truncated)")


@pytest.mark.parametrize("name", [*ARCHIVES][::6])
def test_an_archive_that_is_forged_is_refused(bad, name):
    (bad / "model.safetensors").unlink()
    ARCHIVES[name](bad / "pytorch_model.bin")
    assert_refused(bad, "pytorch_model.bin: ")


@pytest.mark.parametrize("more", [{0: torch.zeros(2)}, {None: torch.zeros(2), "step": 3}, {(1, 2): torch.zeros(2)}])
def test_a_state_dict_may_hold_what_is_no_weight(bad, good, more):
    torch.save(load_file(bad / "model.safetensors") | more, bad / "pytorch_model.bin")
    (bad / "model.safetensors").unlink()
    assert_same(load_or_refusal(bad), load_transformers(good))


# ---------------------------------------------------------------------------------------------------- its tokenizer

FIRST = {"SpecialToken": {"id": "<x>", "type_id": 0}}
TEXT_OF = {"Sequence": {"id": "A", "type_id": 0}}
HARMLESS = {  # what a post-processor adds is not asked for
    "a token that is not there": {
        "type": "TemplateProcessing", "single": [FIRST, TEXT_OF], "pair": [TEXT_OF], "special_tokens": {},
    },
    "nothing at all": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    "two of nothing": {"type": "Sequence", "processors": []},
    "BERT's": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_a_post_processor_is_not_run(bad, good, name):
    """The library panics over one that names a token which it does not have."""
    values = json.loads((bad / "tokenizer.json").read_text(encoding="utf-8")) | {"post_processor": HARMLESS[name]}
    write(bad / "tokenizer.json", values)
    found = load_or_refusal(bad)
    assert_same(found, load_transformers(good))
    assert found.begins_with_bos == (name == "BERT's")


TOKENIZERS = {
    "tokenizer.json": ["", "[]", "{}", "[" * 100_000, '{"model": {"type": "Wonder"}}'],
    "tokenizer_config.json": ["", "[]", "{", "[" * 100_000, '{"eos_token": 5}', '{"bos_token": "<s>"}'],
}


@pytest.mark.long
@pytest.mark.parametrize("name, content", [(name, each) for name, all_ in TOKENIZERS.items() for each in all_])
def test_a_tokenizer_that_is_damaged(bad, name, content):
    write(bad / name, content)
    assert_refused(bad, "tokenizer_path: .*(cannot be loaded|names no eos_token)")
