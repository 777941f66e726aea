"""Mixtures of experts in folders of transformers: what each model_type calls the fields of an LMConfig, and how it
differs from ours.

| model_type      | weights of the chosen experts       | shared expert | beside that                            |
|-----------------|-------------------------------------|---------------|----------------------------------------|
| mixtral         | softmax, normalised                 | none          |                                        |
| granitemoeshared | softmax, normalised                | any width     | multipliers, which must be neutral     |
| qwen2_moe       | softmax                             | any width     | times a sigmoid, 1/2 if its matrix is 0 |
| qwen3_moe       | softmax                             | none          | qk_norm                                |
| ernie4_5_moe    | softmax, normalised, expert_bias    | n experts     | RoPE in pairs                          |
| glm4_moe        | sigmoid, expert_bias                | n experts     | qk_norm or not                         |

minimind, in all its versions, is read only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import LMConfig
from model.weights.expert_layouts import Layout, shared_experts, without_zeros
from model.weights.shapes import fitting_architecture

FIRST = "model.layers.0.mlp."


class Mixture(NamedTuple):
    """A model_type with experts.

    Attributes:
        architecture: its class.
        keys: fields of an LMConfig to their keys in config.json, and the values where these are missing.
        only: fields of an LMConfig that it does not express in full, and the values that it does.
        layout: of its weights.
        pairs: whether its heads are in our order (see `names.py`).
    """

    architecture: str
    keys: Mapping[str, tuple[str, int | bool | None]]
    only: Mapping[str, tuple]
    layout: Layout
    pairs: bool = False


NO_BIAS, NORMALIZED, UNSHARED = (
    {"expert_bias": (False,)},
    {"normalize_expert_weights": (True,)},
    {"n_shared_experts": (0,)},
)
SOFTMAX, SIGMOID = {"expert_score": ("softmax",)}, {"expert_score": ("sigmoid",)}
NO_QK_NORM = {"qk_norm": (False,)}
# In the order in which they are tried for writing.
MIXTURES = {
    "mixtral": Mixture(
        "MixtralForCausalLM",
        {
            "n_experts": ("num_local_experts", 8),
            "n_active_experts": ("num_experts_per_tok", 2),
            "expert_hidden_dim": ("intermediate_size", None),
        },
        SOFTMAX | NORMALIZED | NO_BIAS | UNSHARED | NO_QK_NORM | {"qkv_bias": (False,)},
        Layout("block_sparse_moe", {"w1": "w1", "w2": "w2", "w3": "w3"}),
    ),
    "granitemoeshared": Mixture(
        "GraniteMoeSharedForCausalLM",
        {
            "n_experts": ("num_local_experts", 8),
            "n_active_experts": ("num_experts_per_tok", 2),
            "expert_hidden_dim": ("intermediate_size", None),
            "shared_hidden_dim": ("shared_intermediate_size", 0),
        },
        SOFTMAX | NORMALIZED | NO_BIAS | NO_QK_NORM,
        Layout("block_sparse_moe", None, router="router.layer.weight", shared="shared_mlp"),
    ),
    "qwen3_moe": Mixture(
        "Qwen3MoeForCausalLM",
        {
            "n_experts": ("num_experts", 128),
            "n_active_experts": ("num_experts_per_tok", 8),
            "expert_hidden_dim": ("moe_intermediate_size", 768),
            "normalize_expert_weights": ("norm_topk_prob", False),
        },
        SOFTMAX | NO_BIAS | UNSHARED | {"qk_norm": (True,)},
        Layout(),
    ),
    "qwen2_moe": Mixture(
        "Qwen2MoeForCausalLM",
        {
            "n_experts": ("num_experts", 60),
            "n_active_experts": ("num_experts_per_tok", 4),
            "expert_hidden_dim": ("moe_intermediate_size", 1408),
            "shared_hidden_dim": ("shared_expert_intermediate_size", 5632),
            "normalize_expert_weights": ("norm_topk_prob", False),
        },
        SOFTMAX | NO_BIAS | NO_QK_NORM,
        Layout(shared="mlp.shared_expert"),
    ),
    "ernie4_5_moe": Mixture(
        "Ernie4_5_MoeForCausalLM",
        {
            "n_experts": ("moe_num_experts", 64),
            "n_active_experts": ("moe_k", 6),
            "expert_hidden_dim": ("moe_intermediate_size", 1536),
            "n_shared_experts": ("moe_num_shared_experts", 2),
        },
        SOFTMAX | NORMALIZED | NO_QK_NORM | {"qkv_bias": (False,)},
        Layout(bias="moe_statics.e_score_correction_bias"),
        pairs=True,
    ),
    "glm4_moe": Mixture(
        "Glm4MoeForCausalLM",
        {
            "n_experts": ("n_routed_experts", 128),
            "n_active_experts": ("num_experts_per_tok", 8),
            "expert_hidden_dim": ("moe_intermediate_size", 1408),
            "n_shared_experts": ("n_shared_experts", 1),
            "normalize_expert_weights": ("norm_topk_prob", True),
        },
        SIGMOID,
        Layout(),
    ),
}


def fixed_keys(kind: str, config: LMConfig) -> dict[str, tuple]:
    """Keys of config.json of which one value computes what we do: the value where the key is missing, that which is
    written, and others that mean the same."""
    sparse = {"decoder_sparse_step": (1, 1), "mlp_only_layers": (None, [], None)}
    return {
        "granitemoeshared": {
            "embedding_multiplier": (1.0, 1.0), "logits_scaling": (1.0, 1.0), "residual_multiplier": (1.0, 1.0),
            "attention_multiplier": (1.0, config.head_dim**-0.5),
        },
        "qwen2_moe": sparse,
        "qwen3_moe": sparse,
        "ernie4_5_moe": {
            "use_bias": (False, False), "moe_layer_start_index": (1, 0), "moe_layer_interval": (1, 1),
            "moe_layer_end_index": (-1, config.n_layers - 1, -1),
        },
        "glm4_moe": {
            "first_k_dense_replace": (1, 0), "n_group": (1, 1), "topk_group": (1, 1),
            "routed_scaling_factor": (1.0, 1.0), "partial_rotary_factor": (0.5, 1.0),
        },
        "minimind": {"scoring_func": ("softmax", "softmax")},
    }.get(kind, {})  # fmt: skip


# --------------------------------------------------------------------------------------------------------- reading


def read_mixture(kind: str, values: Mapping, shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict:
    """The fields of an LMConfig that describe a folder's experts; none if its model is dense.

    Args:
        values: of config.json.
        shapes: of the weights, as `expert_layouts.gathered` returns them.

    Raises:
        InputError: MiniMind's has none among its weights.
    """
    if kind == "minimind":
        return _minimind(values, shapes, path) if values.get("use_moe") else {}
    if kind not in MIXTURES:
        return {}
    found = {field: values.get(key, default) for field, (key, default) in MIXTURES[kind].keys.items()}
    if kind in ("qwen2_moe", "qwen3_moe"):  # transformers writes either name
        found["n_experts"] = values.get("num_local_experts", found["n_experts"])
    found["expert_score"] = MIXTURES[kind].only["expert_score"][0]
    found["expert_bias"] = f"{FIRST}router.bias" in shapes
    return found | shared_experts(found.pop("shared_hidden_dim", None), found["expert_hidden_dim"])


def _minimind(values: Mapping, shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict:
    """Of MiniMind2 and minimind-3, which differ in names and in what one active expert's weight is."""
    width = (*shapes.get(f"{FIRST}experts.w1", ()), None, None)[1]
    if width is None:
        raise InputError(f"{path}: use_moe is True, but there are no experts among the weights")
    is_v3 = "num_experts" in values
    found = {
        "n_experts": values.get("num_experts" if is_v3 else "n_routed_experts", 4),
        "n_active_experts": values.get("num_experts_per_tok", 1 if is_v3 else 2),
        "expert_hidden_dim": width,
        "normalize_expert_weights": values.get("norm_topk_prob", True),
    }
    if not is_v3 and found["n_active_experts"] == 1:
        found["normalize_expert_weights"] = False
    shared = shapes.get(f"{FIRST}shared.w1.weight", (0,))
    return found | shared_experts(shared[0], found["expert_hidden_dim"])


def check_fixed(kind: str, values: Mapping, config: LMConfig, path: Path) -> None:
    """Refuse a mixture of experts of which config.json says something that an LMConfig cannot.

    Raises:
        InputError: naming the key.
    """
    rope = values.get("rope_parameters")
    nested = rope if isinstance(rope, Mapping) else {}  # where transformers 5 puts partial_rotary_factor
    for key, (default, *accepted) in fixed_keys(kind, config).items() if config.n_experts else ():
        value = values.get(key, nested.get(key, default))
        if value not in accepted:
            raise InputError(
                f"{path}: {key} is {shown(value)}, {accepted[0]} expected: such mixtures of experts are not supported"
            )


def read_experts(state_dict: dict[str, Tensor], config: LMConfig, kind: str) -> tuple[dict[str, Tensor], LMConfig]:
    """What a folder's weights are with our shared expert, which no sigmoid weighs and which is not there if it is 0."""
    if kind == "qwen2_moe":
        state_dict |= {name: 0.5 * tensor for name, tensor in state_dict.items() if name.endswith(".shared.w2.weight")}
    return without_zeros(state_dict, config)


# --------------------------------------------------------------------------------------------------------- writing


def mixture_kind(config: LMConfig, path: str | Path) -> str:
    """The model_type that computes what a mixture of experts does.

    Raises:
        InputError: there is none.
    """
    usual = {"shared_hidden_dim": (config.n_shared_experts * config.expert_hidden_dim or None,)}
    choices = {
        kind: mixture.only | (usual if "n_shared_experts" in mixture.keys else {}) for kind, mixture in MIXTURES.items()
    }
    return fitting_architecture(config, choices, path, "transformers")


def mixture_json(config: LMConfig, kind: str) -> dict:
    """What config.json says of the experts of a model_type."""
    mixture = MIXTURES[kind]
    values = {key: getattr(config, field) for field, (key, _) in mixture.keys.items()}
    values |= {key: accepted[0] for key, (_, *accepted) in fixed_keys(kind, config).items()}
    if mixture.keys.get("shared_hidden_dim") and not config.n_shared_experts:
        values[mixture.keys["shared_hidden_dim"][0]] = 0
    if kind == "qwen2_moe":
        values["qkv_bias"] = config.qkv_bias
    elif kind == "glm4_moe":
        values |= {"use_qk_norm": config.qk_norm, "num_nextn_predict_layers": 0}
    return values | {"architectures": [mixture.architecture], "output_router_logits": False}


def written_experts(tensors: Mapping[str, Tensor], config: LMConfig, kind: str) -> dict[str, Tensor]:
    """A model's tensors, named by `transformers_name`, as the files of a model_type hold them."""
    tensors, like = dict(tensors), tensors[f"{FIRST}router.weight"]
    for layer in range(config.n_layers):
        block = f"model.layers.{layer}.mlp"
        if kind in ("qwen2_moe", "glm4_moe") and not config.n_shared_experts:  # which have one, be it of width 0
            shapes = {"w1": (0, config.dim), "w2": (config.dim, 0), "w3": (0, config.dim)}
            tensors |= {f"{block}.shared.{name}.weight": like.new_zeros(shape) for name, shape in shapes.items()}
        if kind == "qwen2_moe":
            tensors[f"{block}.shared.w2.weight"] = 2 * tensors[f"{block}.shared.w2.weight"]
        if kind in ("ernie4_5_moe", "glm4_moe"):
            bias = tensors.get(f"{block}.router.bias", torch.zeros(config.n_experts))
            tensors[f"{block}.router.bias"] = bias[None] if kind == "ernie4_5_moe" else bias
    found = MIXTURES[kind].layout.split(tensors)
    if kind == "qwen2_moe":  # whose shared expert is weighed by sigmoid(0) = 1/2
        for layer in range(config.n_layers):
            found[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = like.new_zeros(1, config.dim)
    return found
