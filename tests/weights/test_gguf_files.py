"""GGUF files: what comes back from them, what transformers makes of them, and that each script takes them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from model.convert import convert
from model.corpus.export import export_nanotron
from model.errors import InputError
from model.text.tokenization import load_tokenizer, tokenizer_sha256
from model.token_file.manifest import read_manifest
from model.weights import load_weights
from model.weights.gguf import load_gguf, save_gguf
from model.weights.transformers_folder import config_json, save_transformers
from optimized_inference import load_generator
from tests import raw_gguf
from tests.conftest import CHAT_TEMPLATE, corpus_lines
from tests.model_shapes import SHAPES, TEXT, assert_logits, assert_same, logits_of, prompt_ids, weights_of

gguf = pytest.importorskip("gguf")

ROUNDED = {"F16": torch.float16, "BF16": torch.bfloat16}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def own_tokenizer(shape, folder):
    return None if shape.get("vocab_size") else folder


def types_in(path):
    """{name: type} of a file's tensors."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.long
@ALL_SHAPES
def test_f32_comes_back_bit_for_bit(tmp_path, tokenizer_folder, shape):
    weights = weights_of(shape, own_tokenizer(shape, tokenizer_folder))
    assert save_gguf(tmp_path / "a.gguf", weights) == []
    found = load_gguf(tmp_path / "a.gguf")
    assert_same(found, weights)
    assert (found.tokenizer_path, found.begins_with_bos) == (str(tmp_path / "a.gguf"), True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("kind", ROUNDED)
@ALL_SHAPES
def test_half_precision_comes_back_rounded(tmp_path, tokenizer_folder, shape, kind):
    weights = weights_of(shape, own_tokenizer(shape, tokenizer_folder))
    save_gguf(tmp_path / "a.gguf", weights, kind)
    rounded = {
        name: tensor if tensor.dim() == 1 else tensor.to(ROUNDED[kind]) for name, tensor in weights.state_dict.items()
    }
    assert_same(load_gguf(tmp_path / "a.gguf"), dataclasses.replace(weights, state_dict=rounded))


@ALL_SHAPES
def test_q8_0_comes_back_within_half_a_step(tmp_path, tokenizer_folder, shape):
    """A block of 32 numbers shares a scale, its largest number / 127, which is kept as float16."""
    weights = weights_of(shape, own_tokenizer(shape, tokenizer_folder))
    save_gguf(tmp_path / "a.gguf", weights, "Q8_0")
    found = load_gguf(tmp_path / "a.gguf")
    kinds = set()
    for name, tensor in weights.state_dict.items():
        if tensor.dim() == 1:
            assert torch.equal(found.state_dict[name], tensor)
            continue
        kinds.add(found.state_dict[name].dtype)
        if tensor.shape[1] % 32:  # a row is no whole number of blocks
            assert torch.equal(found.state_dict[name], tensor.half())
            continue
        blocks = tensor.view(-1, 32)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        error = (found.state_dict[name].view(-1, 32) - blocks).abs()
        assert (error <= largest / 127 * (0.5 + 127 / 2048)).all() and error.max() > 0
    assert kinds == ({torch.float32, torch.float16} if weights.config.dim % 32 else {torch.float32})
    assert set(types_in(tmp_path / "a.gguf").values()) == {"F32", "Q8_0"} | (
        {"F16"} if torch.float16 in kinds else set()
    )


def test_numbers_that_f16_cannot_hold_are_refused(tmp_path, tokenizer_folder):
    weights = weights_of({}, tokenizer_folder)
    weights.state_dict["layers.1.feed_forward.w2.weight"][3, 5] = -70000.0
    with pytest.raises(InputError, match=r"layers.1.feed_forward.w2.weight holds numbers past 65,504"):
        save_gguf(tmp_path / "a.gguf", weights, "F16")
    with pytest.raises(InputError, match=r"layers.1.mlp.down_proj.weight holds numbers past 65,504"):
        save_transformers(tmp_path / "a", weights, torch.float16)
    assert not list(tmp_path.iterdir())
    save_gguf(tmp_path / "a.gguf", weights, "BF16")
    assert load_gguf(tmp_path / "a.gguf").state_dict["layers.1.feed_forward.w2.weight"][3, 5] == -70144


@pytest.mark.long
def test_what_llama_cpp_has_no_architecture_for_is_refused(tmp_path, tokenizer_folder):
    llama3 = SHAPES["llama3 RoPE scaling"]
    for shape, expected in (
        ({"qk_norm": True, "qkv_bias": True}, "qk_norm with qkv_bias"),
        ({"qkv_bias": True, "head_dim": 32}, r"qkv_bias with head_dim 32 \(only dim / n_heads = 16\)"),
        ({"qkv_bias": True, "n_heads": 3, "n_kv_heads": 1, "head_dim": 16}, r".*only dim / n_heads = 21.3333\)"),
        (llama3 | {"qkv_bias": True}, "qkv_bias with rope_scaling llama3"),
        (llama3 | {"qk_norm": True}, "qk_norm with rope_scaling llama3"),
        ({"n_layers": 513, "dim": 4, "hidden_dim": 4, "n_heads": 2}, r"n_layers 513 \(at most 512\)"),
    ):
        with pytest.raises(InputError, match=f"llama.cpp has no architecture for {expected}; a folder of transform"):
            save_gguf(tmp_path / "a.gguf", weights_of(shape, tokenizer_folder))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_scales_linearly_as_in_llama_cpp(tmp_path, tokenizer_folder, key):
    weights, path = weights_of({}, tokenizer_folder), tmp_path / "a.gguf"
    save_gguf(path, weights)
    file = raw_gguf.read(path.read_bytes())

    def scaled(factor, kind=None):
        file.set(f"llama.{key}", raw_gguf.FLOAT32, factor)
        if kind is not None:
            file.set("llama.rope.scaling.type", raw_gguf.STRING, kind)
        path.write_bytes(bytes(file))
        config = load_gguf(path).config
        return config.rope_scaling, config.rope_factor

    assert scaled(8.1) == ("linear", 8.1)
    assert scaled(0.0) == scaled(1.0) == (None, 1.0)
    assert scaled(8.1, "none") == (None, 1.0)
    assert scaled(8.1, "linear") == ("linear", 8.1)


def test_two_scalings_of_rope_are_refused(tmp_path, tokenizer_folder):
    path = tmp_path / "a.gguf"
    save_gguf(path, weights_of(SHAPES["llama3 RoPE scaling"], tokenizer_folder))
    file = raw_gguf.read(path.read_bytes())
    file.set("llama.rope.scaling.factor", raw_gguf.FLOAT32, 2.0)
    path.write_bytes(bytes(file))
    with pytest.raises(InputError, match=r"RoPE scaled by 2 and by rope_freqs.weight, one of them expected$"):
        load_gguf(path)


def test_llama3s_scaling_comes_back_exactly(tmp_path, tokenizer_folder):
    scaling = {"rope_factor": 8.1, "rope_low_freq_factor": 1.1, "rope_high_freq_factor": 4.3}
    weights = weights_of(SHAPES["llama3 RoPE scaling"] | scaling, tokenizer_folder)
    save_gguf(tmp_path / "a.gguf", weights)
    assert load_gguf(tmp_path / "a.gguf").config == weights.config


def test_biases_with_wide_heads_are_still_read(tmp_path, tokenizer_folder, monkeypatch):
    """Earlier versions wrote such files, which llama.cpp refuses."""
    weights = weights_of({"qkv_bias": True, "head_dim": 32}, tokenizer_folder)
    monkeypatch.setattr("model.weights.gguf._architecture", lambda config, path: "qwen2")
    save_gguf(tmp_path / "a.gguf", weights)
    assert_same(load_gguf(tmp_path / "a.gguf"), weights)


# ------------------------------------------------------------------------------------------------- one of several parts


@pytest.fixture
def parts(tmp_path, tokenizer_folder, monkeypatch):
    """The parts of a file that `gguf` splits, as llama.cpp's tool does, and the weights in it."""
    weights = weights_of({"qk_norm": True}, tokenizer_folder)
    plain = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda *arguments: plain(*arguments, split_max_tensors=9))
    save_gguf(tmp_path / "whole.gguf", weights)
    (tmp_path / "whole.gguf").unlink()  # `gguf` leaves it empty
    parts = sorted(tmp_path.glob("*-of-*.gguf"))
    assert len(parts) == 3
    return parts, weights


def test_any_part_of_a_file_stands_for_all(parts):
    paths, weights = parts
    for path in paths:
        found = load_weights(path)
        assert_same(found, weights)
        assert found.tokenizer_path == str(paths[0]) and found.tokenizer_sha256 == tokenizer_sha256(path)
    generator = load_generator(paths[2], device="cpu", compile=False)
    assert generator.encode_prompt("中国")[0] == 1


def test_a_part_that_is_missing_or_of_another_file_is_named(parts):
    paths, _ = parts
    content = paths[1].read_bytes()
    paths[1].unlink()
    for path in (paths[0], paths[2]):
        with pytest.raises(InputError, match=f"one of a set of 3 files; {paths[1].name} is missing beside it"):
            load_weights(path)
    with pytest.raises(InputError, match="is missing beside it"):
        load_tokenizer(paths[2])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(InputError, match="its header says that it is part 3 of 3, its name part 2 of 3"):
        load_weights(paths[0])
    paths[0].with_name("other.gguf").write_bytes(content)
    with pytest.raises(InputError, match="its header says that it is part 2 of 3, its name part 1 of 1"):
        load_weights(paths[0].with_name("other.gguf"))


# ------------------------------------------------------------------------------------------------- in transformers


@ALL_SHAPES
def test_transformers_computes_what_we_do(tmp_path, tokenizer_folder, shape):
    pytest.importorskip("accelerate")  # which transformers asks for
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    weights = weights_of(shape, own_tokenizer(shape, tokenizer_folder))
    save_gguf(tmp_path / "a.gguf", weights)
    options = {"gguf_file": "a.gguf", "dtype": torch.float32}
    if shape.keys() & {"head_dim", "rope_scaling"}:  # transformers 5.24 does not look for these in a GGUF file
        kind = "qwen3" if "qk_norm" in shape else "llama"
        values = config_json(weights.config, kind, torch.float32)
        options["config"] = AutoConfig.for_model(**values)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info.values()), info
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")(TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, prompt_ids(weights.tokenizer_path))
    with torch.inference_mode():
        assert_logits(model.eval()(ids).logits, logits_of(weights, ids))


# ------------------------------------------------------------------------------------------------ the tokenizer inside


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, tokenizer_folder):
    """A model with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("gguf") / "小.gguf"
    save_gguf(path, weights_of({"max_seq_len": 64}, tokenizer_folder))
    return path


def test_the_tokenizer_inside_is_the_folders(model_file, tokenizer_folder):
    inside, folder = load_tokenizer(model_file), load_tokenizer(tokenizer_folder)
    texts = [json.loads(line)["text"] for line in corpus_lines(20)]
    for text in (TEXT, *texts, "<s>user\n</s>"):
        assert inside(text, add_special_tokens=False).input_ids == folder(text, add_special_tokens=False).input_ids
    assert inside(TEXT).input_ids == [1, *folder(TEXT).input_ids]  # llama.cpp begins every text with it
    for name in ("bos", "eos", "unk"):
        assert getattr(inside, f"{name}_token_id") == getattr(folder, f"{name}_token_id")
    assert inside.chat_template == CHAT_TEMPLATE
    assert tokenizer_sha256(model_file) == load_weights(model_file).tokenizer_sha256


def test_the_embedded_tokenizer_is_known_again(tmp_path):
    weights = weights_of({"vocab_size": 6400})
    save_gguf(tmp_path / "a.gguf", weights)
    convert(tmp_path / "a.gguf", tmp_path / "a.pth", say=lambda line: None)
    described = json.loads((tmp_path / "a.json").read_text())
    assert (described["tokenizer_path"], described["tokenizer_sha256"]) == (None, tokenizer_sha256())
    assert_same(load_weights(tmp_path / "a.pth"), weights)


@pytest.mark.parametrize("begins_with_bos", [True, False])
def test_the_file_says_whether_texts_begin_with_the_bos(tmp_path, tokenizer_folder, begins_with_bos):
    weights = dataclasses.replace(weights_of({}, tokenizer_folder), begins_with_bos=begins_with_bos)
    save_gguf(tmp_path / "a.gguf", weights)
    assert load_gguf(tmp_path / "a.gguf").begins_with_bos == begins_with_bos
    generator = load_generator(tmp_path / "a.gguf", device="cpu", compile=False)
    assert (generator.encode_prompt("中国")[0] == 1) == begins_with_bos


@pytest.mark.long
def test_data_are_processed_with_the_tokenizer_inside(tmp_path, model_file, tokenizer_folder, process_data_here):
    (tmp_path / "raw.jsonl").write_bytes(b"".join(corpus_lines(20)))
    made = []
    for number, tokenizer in enumerate((model_file, tokenizer_folder)):
        output = tmp_path / f"{number}.bin"
        flags = ["--input_path", tmp_path / "raw.jsonl", "--output_path", output, "--stats_path", tmp_path / "s.json"]
        code, said = process_data_here("--tokenizer_path", tokenizer, *flags, "--workers", "1")
        assert code == 0, said
        made.append(np.fromfile(output, "<u2").tolist())
    assert made[0] == made[1] and len(made[0]) > 1000
    assert read_manifest(tmp_path / "0.bin").tokenizer_sha256 == tokenizer_sha256(model_file)
    export_nanotron(tmp_path / "0.bin", lambda line: None, model_file)
    named = (tmp_path / "0.ds.metadata").read_text(encoding="utf-8").split("|")[0]  # where nanotron finds a folder
    assert tokenizer_sha256(named) == tokenizer_sha256(model_file)
