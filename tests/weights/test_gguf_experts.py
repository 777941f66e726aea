"""Mixtures of experts in GGUF files: what comes back, under which architecture, and what is refused. That llama.cpp
computes the same and writes the same text: benchmarks/exports.py."""

import dataclasses

import pytest
import torch

from model.errors import InputError
from model.weights.gguf import load_gguf, save_gguf
from model.weights.transformers_folder import config_json
from tests.model_shapes import SHAPES, assert_logits, assert_same, logits_of, prompt_ids, weights_of

gguf = pytest.importorskip("gguf")

EXPERTS = {"n_experts": 6, "hidden_dim": 64, "expert_hidden_dim": 64}
SHARED = {"n_shared_experts": 2, "shared_hidden_dim": 128}
GLM = EXPERTS | SHARED | {"expert_score": "sigmoid", "expert_bias": True, "qk_norm": True, "qkv_bias": True}
LLAMA3 = SHAPES["llama3 RoPE scaling"]
WRITTEN = {
    "softmax, normalised": ("llama", EXPERTS),
    "one active expert, llama3": ("llama", EXPERTS | LLAMA3 | {"n_active_experts": 1}),
    "shared, of another width, llama3": (
        "granitemoe", EXPERTS | LLAMA3 | {"n_shared_experts": 1, "shared_hidden_dim": 96},
    ),
    "qk_norm": ("qwen3moe", EXPERTS | {"qk_norm": True, "head_dim": 32}),
    "not normalised": ("glm4moe", EXPERTS | {"normalize_expert_weights": False}),
    "qk_norm, shared, linear": (
        "glm4moe", EXPERTS | SHARED | {"qk_norm": True, "rope_scaling": "linear", "rope_factor": 4.0},
    ),
    "sigmoid, everything": ("glm4moe", GLM),
    "softmax with a bias for the choice": ("glm4moe", EXPERTS | {"expert_bias": True}),
}  # fmt: skip


def with_bias(weights):
    """Routers' biases that are not 0."""
    for name, tensor in weights.state_dict.items():
        if name.endswith("router.bias"):
            tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return weights


@pytest.mark.parametrize("architecture, shape", WRITTEN.values(), ids=WRITTEN)
def test_f32_comes_back_bit_for_bit(tmp_path, tokenizer_folder, architecture, shape):
    weights = with_bias(weights_of(shape, tokenizer_folder))
    save_gguf(tmp_path / "a.gguf", weights)
    assert_same(load_gguf(tmp_path / "a.gguf"), weights)
    written = gguf.GGUFReader(tmp_path / "a.gguf").fields["general.architecture"].contents()
    assert written == architecture


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_routers_stay_float32(tmp_path, tokenizer_folder, kind):
    """Rounded scores would choose other experts."""
    weights = with_bias(weights_of(GLM, tokenizer_folder))
    save_gguf(tmp_path / "a.gguf", weights, kind)
    found = load_gguf(tmp_path / "a.gguf")
    for name, tensor in weights.state_dict.items():
        if tensor.dim() == 1 or "router" in name:
            assert torch.equal(found.state_dict[name], tensor), name
        elif kind == "BF16":
            assert torch.equal(found.state_dict[name], tensor.bfloat16()), name
    assert found.state_dict["layers.0.feed_forward.experts.w1"].dim() == 3
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == kind and types["blk.1.ffn_gate_inp.weight"] == "F32"
    ids = prompt_ids(tokenizer_folder)
    near = logits_of(dataclasses.replace(found, state_dict={n: t.float() for n, t in found.state_dict.items()}), ids)
    assert (near - logits_of(weights, ids)).abs().mean() < 0.2


@pytest.mark.long
def test_transformers_computes_what_we_do(tmp_path, tokenizer_folder):
    pytest.importorskip("accelerate")  # which transformers asks for
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = weights_of(EXPERTS | {"qk_norm": True}, tokenizer_folder)
    save_gguf(tmp_path / "a.gguf", weights)
    config = AutoConfig.for_model(**config_json(weights.config, "qwen3_moe", torch.float32))  # 5.24 misses the width
    options = {"gguf_file": "a.gguf", "config": config, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    ids = prompt_ids(tokenizer_folder)
    with torch.inference_mode():
        assert_logits(model(ids).logits, logits_of(weights, ids))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "shape, message",
    [
        (GLM | LLAMA3, "no architecture for experts as glm4moe with rope_scaling llama3"),
        (GLM | {"shared_hidden_dim": 100}, r"glm4moe, cannot express shared_hidden_dim 100 \(only 128\)"),
    ],
)
def test_what_llama_cpp_has_no_architecture_for_is_refused(tmp_path, tokenizer_folder, shape, message):
    with pytest.raises(InputError, match=message):
        save_gguf(tmp_path / "a.gguf", weights_of(shape, tokenizer_folder))
    assert not list(tmp_path.iterdir())


CHANGED = {  # what a file says of its experts, and what is said of it
    "granitemoe": (
        ("logit_scale", 0.5, "granitemoe.logit_scale is 0.5, 1 expected"),
        ("residual_scale", 0.25, "granitemoe.residual_scale is 0.25, 1 expected"),
        ("attention.scale", 0.125, "attention.scale is 0.125, 0.25, one over the root"),
        ("expert_used_count", 9, "n_active_experts: 9 found, at most n_experts = 6"),
        ("expert_count", 0, "granitemoe.expert_count is 0, 1 or more, expected"),
        ("expert_count", 8, r"experts.w1 is \(6, 64, 64\), by its description \(8, 64, 64\)"),
    ),
    "glm4moe": (
        ("expert_gating_func", 3, "expert_gating_func is 3, 1 or 2 expected"),
        ("leading_dense_block_count", 1, "leading_dense_block_count is 1, 0 expected"),
        ("expert_group_count", 2, "expert_group_count is 2, 1 expected"),
        ("expert_weights_scale", 2.5, "expert_weights_scale is 2.5, 1 expected"),
    ),
}


@pytest.mark.parametrize("architecture, change", [(name, one) for name, some in CHANGED.items() for one in some])
def test_what_we_do_not_compute_is_refused_by_its_key(tmp_path, tokenizer_folder, monkeypatch, architecture, change):
    key, value, message = change

    class Changed(gguf.GGUFWriter):
        """Writes another value."""

        def write_header_to_file(self, *given):
            kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
            self.kv_data[0].pop(f"{architecture}.{key}", None)
            self.add_key_value(f"{architecture}.{key}", value, kind)
            super().write_header_to_file(*given)

    monkeypatch.setattr(gguf, "GGUFWriter", Changed)
    shape = GLM if architecture == "glm4moe" else EXPERTS | SHARED
    save_gguf(tmp_path / "a.gguf", weights_of(shape, tokenizer_folder))
    with pytest.raises(InputError, match=message) as raised:
        load_gguf(tmp_path / "a.gguf")
    assert "\n" not in str(raised.value)


def test_experts_in_an_architecture_without_are_refused(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("model.weights.gguf.mixture_architecture", lambda config, path: "qwen2")
    save_gguf(tmp_path / "a.gguf", weights_of(EXPERTS, tokenizer_folder))
    with pytest.raises(InputError, match="qwen2.expert_count is 6, 0, or an architecture of llama, granitemoe, qwen3"):
        load_gguf(tmp_path / "a.gguf")
