"""Mixtures of experts in folders of transformers: the same logits both ways, and weights that come back bit for bit."""

import dataclasses
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from model.errors import InputError
from model.weights import load_weights
from model.weights.transformers_folder import load_transformers, save_transformers
from tests.model_shapes import assert_logits, assert_same, logits_of, weights_of

IDS = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 200, "rms_norm_eps": 0.01,
}  # fmt: skip
QWEN = SHAPE | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GRANITE = SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 3, "attention_multiplier": 0.25}
ERNIE = SHAPE | {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 40, "moe_layer_start_index": 0}
GLM = SHAPE | {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 24}
GLM |= {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}
THEIRS = {
    "Mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "Mixtral, one active expert": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=1),
    "Qwen2": Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=56),
    "Qwen2, normalised, no biases": Qwen2MoeConfig(
        **QWEN, shared_expert_intermediate_size=80, norm_topk_prob=True, qkv_bias=False
    ),
    "Qwen3": Qwen3MoeConfig(**QWEN, norm_topk_prob=True, head_dim=32),
    "Qwen3, not normalised": Qwen3MoeConfig(**QWEN, norm_topk_prob=False, tie_word_embeddings=True),
    "Granite": GraniteMoeSharedConfig(**GRANITE, shared_intermediate_size=48),
    "Granite, none shared": GraniteMoeSharedConfig(**GRANITE),
    "ERNIE": Ernie4_5_MoeConfig(**ERNIE, tie_word_embeddings=False),
    "ERNIE, none shared": Ernie4_5_MoeConfig(**ERNIE, moe_num_shared_experts=0),
    "GLM": Glm4MoeConfig(**GLM, n_shared_experts=2),
    "GLM, biases, qk_norm": Glm4MoeConfig(**GLM, attention_bias=True, use_qk_norm=True, norm_topk_prob=False),
    "GLM, none shared": Glm4MoeConfig(**GLM, n_shared_experts=0),
}


def their_model(config):
    """A model of transformers with random weights, but for the matrix of Qwen2's shared sigmoid, which is 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
                if "shared_expert_gate" in name:
                    parameter.zero_()
                elif name.endswith("e_score_correction_bias"):
                    parameter.normal_(0, 0.1)
                elif parameter.dim() >= 2:
                    parameter.normal_(0, 0.2)
                elif "rotary" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def theirs_of(model):
    with torch.inference_mode():
        return model(IDS).logits.float()


def in_transformers(folder, **options):
    """transformers' model, all of whose weights are in the folder and the other way round."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.long
@pytest.mark.parametrize("config", THEIRS.values(), ids=THEIRS)
def test_we_compute_what_transformers_does(tmp_path, config):
    """From its files as ever, from files as version 5 has them in memory; and it from ours."""
    model = their_model(config)
    expected = theirs_of(model)
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)

    weights = load_weights(tmp_path / "each")

    assert_logits(logits_of(weights, IDS), expected)
    assert_same(load_weights(tmp_path / "fused"), weights)
    save_transformers(tmp_path / "again", weights)
    assert_same(load_transformers(tmp_path / "again"), weights)
    assert_logits(theirs_of(in_transformers(tmp_path / "again")), expected)


def test_mixtrals_window_is_its_context(tmp_path):
    """Past it, transformers attends to the window only, and we refuse."""
    model = their_model(MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=8))
    model.save_pretrained(tmp_path)
    weights = load_weights(tmp_path)
    assert weights.config.max_seq_len == 8
    assert_logits(logits_of(weights, IDS[:, :8]), theirs_of(model)[:, :8])
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"use_sliding_window": False}))  # which it does not heed
    assert load_weights(tmp_path).config.max_seq_len == 8


EXPERTS = {"n_experts": 6, "hidden_dim": 48, "expert_hidden_dim": 48}
SHARED = {"n_shared_experts": 2, "shared_hidden_dim": 96}
OURS = {  # the model_type that each is written as
    "mixtral": {"head_dim": 24},
    "qwen3_moe": {"qk_norm": True, "qkv_bias": True, "normalize_expert_weights": False, "n_active_experts": 1},
    "granitemoeshared": SHARED | {"head_dim": 24, "qkv_bias": True},
    "qwen2_moe": {"normalize_expert_weights": False, "head_dim": 24},
    "ernie4_5_moe": SHARED | {"expert_bias": True},
    "glm4_moe": SHARED | {"expert_score": "sigmoid", "expert_bias": True, "qk_norm": True, "qkv_bias": True},
}


@pytest.mark.long
@pytest.mark.parametrize("rope", [{}, {"rope_scaling": "linear", "rope_factor": 4.0}])
@pytest.mark.parametrize("kind, shape", OURS.items())
def test_what_is_written_computes_the_same_and_comes_back(tmp_path, kind, shape, rope):
    weights = with_bias(weights_of(EXPERTS | shape | rope))
    save_transformers(tmp_path / "model", weights)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == kind
    assert_logits(theirs_of(in_transformers(tmp_path / "model")), logits_of(weights, IDS))
    assert_same(load_transformers(tmp_path / "model"), weights)


def with_bias(weights):
    """Routers' biases that change choices."""
    drawn = torch.Generator().manual_seed(0)
    for name, tensor in weights.state_dict.items():
        if name.endswith("router.bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=drawn) * 0.1)
    return weights


def test_half_precision_keeps_the_routers_bias(tmp_path):
    weights = with_bias(weights_of(EXPERTS | OURS["glm4_moe"]))
    save_transformers(tmp_path / "model", weights, torch.bfloat16)
    rounded = {
        name: tensor if name.endswith("router.bias") else tensor.bfloat16()
        for name, tensor in weights.state_dict.items()
    }
    assert_same(load_transformers(tmp_path / "model"), dataclasses.replace(weights, state_dict=rounded))


@pytest.mark.parametrize(
    "shape, message",
    [
        (SHARED | {"qk_norm": True}, r"the nearest, granitemoeshared, cannot express qk_norm True \(only False\)"),
        ({"expert_bias": True, "qkv_bias": True}, "cannot express expert_bias True"),
        (
            {"expert_bias": True, "normalize_expert_weights": False},
            r"qwen2_moe, cannot express expert_bias True \(only F",
        ),
        (
            {"expert_score": "sigmoid", "n_shared_experts": 1, "shared_hidden_dim": 50},
            r"the nearest, glm4_moe, cannot express shared_hidden_dim 50 \(only 48\)",
        ),
    ],
)
def test_what_no_architecture_expresses_is_refused_by_name(tmp_path, shape, message):
    with pytest.raises(InputError, match=message) as raised:
        save_transformers(tmp_path / "model", weights_of(EXPERTS | shape))
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ what is refused


REFUSED = {  # keys of config.json, and what is said
    "granitemoeshared": [({"residual_multiplier": 0.5}, "residual_multiplier is 0.5, 1.0 expected")],
    "qwen2_moe": [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"num_experts": 7}, "experts.w1 is .*6, 48, 64.*, by its description .*7, 48, 64.* expected"),
        ({"num_experts_per_tok": 7}, "n_active_experts: 7 found, at most n_experts = 6 expected"),
        ({"num_experts": 0}, "config.json"),
        ({"num_experts": "six"}, "n_experts: 'six' found"),
        ({"shared_expert_intermediate_size": [3]}, "shared_hidden_dim"),
        ({"shared_expert_intermediate_size": 0}, "an unknown 'model.layers.0.mlp.shared"),
    ],
    "ernie4_5_moe": [
        ({"moe_layer_start_index": 1}, "moe_layer_start_index is 1, 0 expected"),
        ({"use_bias": True}, "use_bias is True"),
    ],
    "glm4_moe": [
        ({"n_group": 2}, "n_group is 2"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ({"partial_rotary_factor": ..., "rope_parameters": ...}, "partial_rotary_factor is 0.5, 1.0 expected"),
    ],
}
SMALL = {"normalize_expert_weights": False, "n_shared_experts": 2, "shared_hidden_dim": 96}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each model_type that is spoilt."""
    made = tmp_path_factory.mktemp("folders")
    for kind in REFUSED:
        shape = OURS[kind] | (SMALL if kind == "qwen2_moe" else {})
        save_transformers(made / kind, weights_of(EXPERTS | shape))
    return made


@pytest.mark.parametrize("kind, changes, message", [(kind, *case) for kind, cases in REFUSED.items() for case in cases])
def test_what_we_do_not_compute_is_refused_by_its_key(folders, tmp_path, kind, changes, message):
    values = json.loads((folders / kind / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(folders / kind / "model.safetensors")
    with pytest.raises(InputError, match=message) as raised:
        load_weights(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_shared_expert_that_a_sigmoid_weighs_is_refused(tmp_path):
    model = their_model(THEIRS["Qwen2"])
    with torch.no_grad():
        model.model.layers[1].mlp.shared_expert_gate.weight[0, 3] = 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layers.1.mlp.shared_expert_gate.weight' is not zero"):
        load_weights(tmp_path)
