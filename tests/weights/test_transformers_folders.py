"""Folders of transformers: what it computes from ours, what we compute from its own, and what comes back."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from model.convert import convert, write
from model.errors import InputError
from model.text.tokenization import EMBEDDED_TOKENIZER, load_tokenizer, tokenizer_sha256
from model.text.tokenizer_folder import same_tokenizer
from model.weights import load_weights
from model.weights.transformers_folder import load_transformers, save_transformers
from optimized_inference import GenerationConfig, TextGenerator
from tests.conftest import CHAT_TEMPLATE
from tests.model_shapes import (
    SHAPES,
    TEXT,
    assert_logits,
    assert_same,
    greedy,
    logits_of,
    model_of,
    prompt_ids,
    weights_of,
)

ALL_SHAPES = SHAPES | {
    "qk_norm and biases, as Qwen3": {"qk_norm": True, "qkv_bias": True, "head_dim": 32, "tie_embeddings": False}
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(scope="module", params=ALL_SHAPES.items(), ids=ALL_SHAPES)
def written(request, tmp_path_factory, tokenizer_folder):
    """(folder, the weights that were written to it) for each shape."""
    name, shape = request.param
    own = None if shape.get("vocab_size") else tokenizer_folder
    weights = weights_of(shape, own)
    folder = tmp_path_factory.mktemp("written") / "model"
    save_transformers(folder, weights)
    return folder, weights


def in_transformers(folder, **options):
    """transformers' model, all of whose weights are in the folder and the other way round."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def theirs_of(model, ids):
    with torch.inference_mode():
        return model(ids).logits.float()


# -------------------------------------------------------------------------------------------------------- ours there


@pytest.mark.long
def test_transformers_computes_what_we_do(written):
    folder, weights = written
    model, tokenizer = in_transformers(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, prompt_ids(weights.tokenizer_path))  # the bos once
    assert_logits(theirs_of(model, ids), logits_of(weights, ids))
    assert model.dtype == torch.float32

    ends = {"eos_token_id": None, "repetition_penalty": 1.0}
    found = model.generate(ids, do_sample=False, max_new_tokens=24, **ends)[0, ids.shape[1] :]
    assert found.tolist() == greedy(weights, ids[0].tolist(), 24)


def test_what_was_written_comes_back_bit_for_bit(written):
    folder, weights = written
    assert_same(load_transformers(folder), weights)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".jinja") == names
    values = json.loads((folder / "config.json").read_text())
    older = {key: value for key, value in values.items() if key != "rope_parameters"}  # as transformers 4 reads it
    newer = {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling")}
    for part in (older, newer):
        (folder / "config.json").write_text(json.dumps(part))
        assert_same(load_transformers(folder), weights)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_is_the_rounded_numbers(tmp_path, tokenizer_folder, dtype):
    weights = weights_of({"qk_norm": True, "qkv_bias": True, "head_dim": 32}, tokenizer_folder)
    save_transformers(tmp_path / "model", weights, DTYPES[dtype])
    rounded = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.state_dict.items()}
    found = load_transformers(tmp_path / "model")
    assert_same(found, dataclasses.replace(weights, state_dict=rounded))
    assert in_transformers(tmp_path / "model").dtype == DTYPES[dtype]
    ids = prompt_ids(tokenizer_folder)
    theirs = theirs_of(in_transformers(tmp_path / "model", dtype=torch.float32), ids)
    assert_logits(theirs, logits_of(found, ids))
    assert not torch.equal(theirs, logits_of(weights, ids))


@pytest.mark.long
def test_the_text_is_ours_with_the_settings_that_came_along(tmp_path):
    weights = weights_of(SHAPES["untied, 6,411 tokens"])
    write("transformers", tmp_path / "model", weights)
    model, theirs = in_transformers(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = load_tokenizer()
    defaults = dataclasses.asdict(GenerationConfig())
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"):
        assert getattr(model.generation_config, name) == defaults[name]
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)

    chat = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "嗯"},
        {"role": "user", "content": "?"},
    ]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>user\n你好</s>\n<s>assistant\n嗯</s>\n<s>user\n?</s>\n<s>assistant\n"
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    generator = TextGenerator(model_of(weights), ours, compile=False)
    assert ids == generator.encode_chat(chat)

    prompt = theirs(TEXT, return_tensors="pt")
    assert prompt.input_ids[0, :2].tolist().count(1) == 1
    found = model.generate(**prompt, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert theirs.decode(found, skip_special_tokens=True) == generator.generate(TEXT, GenerationConfig(do_sample=False))


@pytest.mark.long
def test_the_tokenizer_that_comes_back_is_known_for_the_embedded_one(tmp_path):
    weights = weights_of(SHAPES["untied, 6,411 tokens"])
    save_transformers(tmp_path / "model", weights)
    assert tokenizer_sha256(tmp_path / "model") != tokenizer_sha256()  # it adds the bos
    assert same_tokenizer(tmp_path / "model", EMBEDDED_TOKENIZER)
    convert(tmp_path / "model", tmp_path / "a.pth", say=lambda line: None)
    described = json.loads((tmp_path / "a.json").read_text())
    assert (described["tokenizer_path"], described["tokenizer_sha256"]) == (None, tokenizer_sha256())
    assert described["begins_with_bos"] is True and not (tmp_path / "a_tokenizer").exists()
    assert_same(load_weights(tmp_path / "a.pth"), weights)


@pytest.mark.parametrize("begins_with_bos", [True, False])
def test_a_tokenizer_adds_its_bos_where_texts_began_with_it(tmp_path, tokenizer_folder, begins_with_bos):
    weights = dataclasses.replace(weights_of({}, tokenizer_folder), begins_with_bos=begins_with_bos)
    save_transformers(tmp_path / "model", weights)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    plain = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer(TEXT).input_ids == [1] * begins_with_bos + plain
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT
    found = load_transformers(tmp_path / "model")
    assert found.begins_with_bos == begins_with_bos and found.tokenizer_path == str(tmp_path / "model")
    again = tmp_path / "again"
    save_transformers(again, found)
    assert AutoTokenizer.from_pretrained(again)(TEXT).input_ids == [1] * begins_with_bos + plain
    convert(tmp_path / "model", tmp_path / "a.pth", say=lambda line: None)
    described = json.loads((tmp_path / "a.json").read_text())
    assert described["tokenizer_path"] == str(tmp_path / "a_tokenizer")
    assert described["begins_with_bos"] == begins_with_bos
    assert load_tokenizer(tmp_path / "a_tokenizer").chat_template == CHAT_TEMPLATE


def test_a_folder_that_is_there_is_left_alone(tmp_path, tokenizer_folder):
    (tmp_path / "model").mkdir()
    save_transformers(tmp_path / "model", weights_of({}, tokenizer_folder))  # an empty one is taken
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="model exists already"):
        save_transformers(tmp_path / "model", weights_of({}, tokenizer_folder, seed=1))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -------------------------------------------------------------------------------------------------------- theirs here

THEIR_SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 200, "rms_norm_eps": 0.01,
}  # fmt: skip
THEIRS = {
    "Llama": LlamaConfig(**THEIR_SHAPE, tie_word_embeddings=True),
    "Llama, biases": LlamaConfig(**THEIR_SHAPE, attention_bias=True),
    "Llama, heads of 24": LlamaConfig(**THEIR_SHAPE, head_dim=24),
    "Llama, linear": LlamaConfig(
        **THEIR_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    ),
    "Llama 3.1": LlamaConfig(
        **THEIR_SHAPE,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "Mistral": MistralConfig(**THEIR_SHAPE, sliding_window=None),
    "Mistral, window": MistralConfig(**THEIR_SHAPE, sliding_window=150),
    "Qwen2": Qwen2Config(**THEIR_SHAPE, tie_word_embeddings=True),
    "Qwen2, window not used": Qwen2Config(**THEIR_SHAPE, use_sliding_window=False, sliding_window=100),
    "Qwen3": Qwen3Config(**THEIR_SHAPE, head_dim=32),
    "Qwen3, biases": Qwen3Config(**THEIR_SHAPE, head_dim=32, attention_bias=True, tie_word_embeddings=True),
}  # fmt: skip


def their_model(config, seed: int = 0):
    """A model of transformers with random gains and biases, but for those of the output projection, which are 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.2)
                elif not name.endswith("o_proj.bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.long
@pytest.mark.parametrize("config", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_we_compute_what_transformers_does(tmp_path, config, form):
    model = their_model(config)
    if form == "bin":
        config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="40KB" if form == "shards" else "1GB")
        assert (len([*tmp_path.glob("*.safetensors")]) > 2) == (form == "shards")
    weights = load_weights(tmp_path)
    windowed = config.model_type == "mistral" and config.sliding_window
    assert weights.config.max_seq_len == (150 if windowed else 200)
    assert weights.tokenizer_path is None
    ids = torch.randint(0, 300, (2, weights.config.max_seq_len), generator=torch.Generator().manual_seed(1))
    assert_logits(logits_of(weights, ids), theirs_of(model, ids))
    if form == "safetensors":
        again = tmp_path / "again"
        save_transformers(again, weights)
        assert_logits(theirs_of(in_transformers(again), ids), theirs_of(model, ids))
        assert_same(load_transformers(again), weights)


def test_biases_that_we_have_not_are_refused(tmp_path):
    model = their_model(THEIRS["Llama, biases"])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias[3] = 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layers.1.self_attn.o_proj.bias' is not zero; such models are not supported"):
        load_weights(tmp_path)


OLDER = {  # what transformers 4 wrote in place of rope_parameters
    "linear": ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, "Llama, linear"),
    "llama3": (
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "Llama 3.1",
    ),
    "default": ({"rope_theta": 10000.0, "rope_scaling": None}, "Llama"),
    "nothing": ({}, "Llama"),
}  # fmt: skip


@pytest.mark.parametrize(("rope", "name"), OLDER.values(), ids=OLDER)
def test_the_older_form_of_a_config(tmp_path, rope, name):
    their_model(THEIRS[name]).save_pretrained(tmp_path)
    newer = load_weights(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"], values["dtype"]
    values |= rope | {"torch_dtype": "float32", "_name_or_path": "x", "use_cache": True, "pretraining_tp": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    older = load_weights(tmp_path)
    scaling = rope.get("rope_scaling") or {}
    assert older.config == newer.config
    assert older.config.rope_scaling == scaling.get("rope_type", scaling.get("type"))
    ids = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)  # transformers reads the older form too
    assert_logits(logits_of(older, ids), theirs_of(model, ids))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path, kind):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 32}
    given = {"model_type": kind, "vocab_size": 300, **shape}
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = AutoConfig.from_pretrained(tmp_path)
    model = their_model(config)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    weights = load_weights(tmp_path)
    limit = config.max_position_embeddings
    if getattr(config, "sliding_window", None):
        limit = min(limit, config.sliding_window)
    assert (weights.config.max_seq_len, weights.config.norm_eps) == (limit, config.rms_norm_eps)
    assert weights.config.rope_theta == config.rope_parameters["rope_theta"]
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    short = dataclasses.replace(weights, config=dataclasses.replace(weights.config, max_seq_len=64))
    assert_logits(logits_of(short, ids), theirs_of(model, ids))


def test_a_chosen_file_of_safetensors_stands_for_its_folder(tmp_path, tokenizer_folder):
    weights = weights_of({}, tokenizer_folder)
    save_transformers(tmp_path / "model", weights)
    assert_same(load_weights(tmp_path / "model" / "model.safetensors"), weights)
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "other.safetensors")
    with pytest.raises(InputError, match="other.safetensors"):
        load_weights(tmp_path / "model" / "other.safetensors")


# ------------------------------------------------------------------------ what transformers loads under other names


def without_prefix(tensors):
    """As `LlamaModel.save_pretrained` writes them."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def only_lm_head(tensors):
    """The tied matrix under its other name."""
    tensors = dict(tensors)
    return {"lm_head.weight": tensors.pop("model.embed_tokens.weight")} | tensors


def both_of_the_pair(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def another_lm_head(tensors):
    """The config says that the pair is tied, but it is not."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).clone()}


NAMES = {
    "no prefix": without_prefix,
    "only lm_head": only_lm_head,
    "no prefix, only lm_head": lambda tensors: without_prefix(only_lm_head(tensors)),
    "both": both_of_the_pair,
    "no prefix, both": lambda tensors: without_prefix(both_of_the_pair(tensors)),
    "both, not tied": another_lm_head,
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A folder of a tied model, and its tensors."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    their_model(THEIRS["Qwen2"]).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_names_that_transformers_takes(tmp_path, tied, rename, file):
    folder, tensors = tied
    shutil.copy(folder / "config.json", tmp_path)
    save = save_file if file.endswith("safetensors") else torch.save
    save(rename(tensors), tmp_path / file)
    weights = load_weights(tmp_path)
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    assert_logits(logits_of(weights, ids), theirs_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids))
    assert weights.config.tie_embeddings == (rename is not another_lm_head)
    assert_same(load_weights(tmp_path / file), weights)  # the file stands for its folder


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_that_a_wrapper_left(tmp_path, tied, before):
    folder, tensors = tied
    shutil.copy(folder / "config.json", tmp_path)
    inner = {f"{before}{name}".replace(".mlp.", f".{before}mlp."): tensor for name, tensor in tensors.items()}
    save_file(inner, tmp_path / "model.safetensors")
    assert_same(load_weights(tmp_path), load_weights(folder))


def test_a_weight_that_is_there_under_two_names_is_refused(tmp_path, tied):
    folder, tensors = tied
    shutil.copy(folder / "config.json", tmp_path)
    save_file(tensors | {"module.model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.norm.weight' and .*model.norm.weight' inside mean the same weight"):
        load_weights(tmp_path)


def test_a_base_model_whose_output_layer_nobody_knows_is_refused(tmp_path):
    """transformers would draw the missing lm_head at random."""
    their_model(THEIRS["Llama, biases"]).model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no 'output.weight' inside"):
        load_weights(tmp_path)


def test_a_base_model_without_a_description_is_recognised(tmp_path, tied):
    _, tensors = tied
    no_bias = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
    for number, renamed in enumerate((no_bias, without_prefix(no_bias), only_lm_head(no_bias))):
        torch.save(renamed, tmp_path / f"{number}.pth")
    expected, *others = (load_weights(tmp_path / f"{n}.pth", {"n_heads": 4, "n_kv_heads": 2}) for n in range(3))
    for found in others:
        assert_same(found, expected)


# ------------------------------------------------------------------------------------------------ one file of a set


@pytest.fixture
def shards(tmp_path, tokenizer_folder):
    """A folder of several files, and the weights in it."""
    their_model(THEIRS["Qwen3, biases"]).save_pretrained(tmp_path, max_shard_size="40KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    return parts, load_weights(tmp_path)


def test_one_shard_stands_for_all(shards):
    parts, weights = shards
    for path in (parts[0], parts[-1], parts[0].with_name("model.safetensors.index.json")):
        assert_same(load_weights(path), weights)


def test_shards_are_found_without_their_index(shards):
    parts, weights = shards
    (parts[0].parent / "model.safetensors.index.json").unlink()
    for path in (parts[0].parent, parts[1]):
        assert_same(load_weights(path), weights)
    parts[1].unlink()
    for path in (parts[0].parent, parts[0]):
        with pytest.raises(InputError, match=f"one of a set of {len(parts)} files; {parts[1].name} is missing"):
            load_weights(path)


def test_shards_under_another_name_are_read_where_one_is_given(shards):
    parts, weights = shards
    (parts[0].parent / "model.safetensors.index.json").unlink()
    renamed = [part.rename(part.with_name(part.name.replace("model", "qwen"))) for part in parts]
    assert_same(load_weights(renamed[1]), weights)
    with pytest.raises(InputError, match="neither model.safetensors nor pytorch_model.bin"):
        load_weights(parts[0].parent)


def test_an_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="a LoRA adapter; merge it into its base model"):
        load_weights(tmp_path)


def test_safetensors_without_a_config_beside_them(tmp_path, tied):
    shutil.copy(tied[0] / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match="no config.json beside it"):
        load_weights(tmp_path / "model.safetensors")
