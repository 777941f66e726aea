"""Mixtures of experts in GGUF: llama.cpp's architectures, and how they differ from ours.

| architecture | weights of the chosen experts                     | shared expert    | beside that              |
|--------------|---------------------------------------------------|------------------|--------------------------|
| llama        | softmax, normalised                               | none             |                          |
| granitemoe   | softmax, normalised                               | any width        | scales, which must be 1  |
| qwen3moe     | softmax, normalised                               | none             | qk_norm                  |
| glm4moe      | softmax or sigmoid, normalised or not, expert_bias | n experts, n ≥ 1 | qk_norm and biases or not |

glm4moe computes a shared expert and reads a bias whatever its file says, so a model without them gets zeros. qwen3moe
normalises whatever its file says.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError
from model.LMConfig import LMConfig
from model.weights.expert_layouts import shared_experts
from model.weights.shapes import fitting_architecture

if TYPE_CHECKING:
    import gguf

MODULES = {
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared.w1": "ffn_gate_shexp",
    "feed_forward.shared.w2": "ffn_down_shexp",
    "feed_forward.shared.w3": "ffn_up_shexp",
}
TENSORS = {
    "feed_forward.experts.w1": "ffn_gate_exps.weight",
    "feed_forward.experts.w2": "ffn_down_exps.weight",
    "feed_forward.experts.w3": "ffn_up_exps.weight",
    "feed_forward.router.bias": "exp_probs_b.bias",
}
SIMPLE = {"expert_score": ("softmax",), "normalize_expert_weights": (True,), "expert_bias": (False,)}
# What each does not express in full, in the order in which they are tried for writing.
ONLY = {
    "llama": SIMPLE | {"n_shared_experts": (0,), "qk_norm": (False,), "qkv_bias": (False,)},
    "granitemoe": SIMPLE | {"qk_norm": (False,), "qkv_bias": (False,)},
    "qwen3moe": SIMPLE | {"n_shared_experts": (0,), "qk_norm": (True,), "qkv_bias": (False,)},
    "glm4moe": {},
}
SCORES = {1: "softmax", 2: "sigmoid"}  # expert_gating_func
SCALES = ("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale")


def mixture_architecture(config: LMConfig, path: Path) -> str:
    """The architecture that computes what a mixture of experts does.

    Raises:
        InputError: there is none.
    """
    usual = (config.n_shared_experts * config.expert_hidden_dim or None,)
    return fitting_architecture(config, ONLY | {"glm4moe": {"shared_hidden_dim": usual}}, path, "llama.cpp")


def read_mixture(architecture: str, value: Callable, shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict:
    """The fields of an LMConfig that describe a file's experts; none if its model is dense.

    Args:
        value: returns a value of the file, given its key without the architecture, its type, and a default.
        shapes: of its tensors.

    Raises:
        InputError: the file says something that an LMConfig cannot.
    """
    n_experts = value("expert_count", int, 0)
    may_be_dense = architecture == "llama" or architecture not in ONLY
    if not n_experts and may_be_dense:
        return {}
    if not n_experts or architecture not in ONLY:
        expected = "1 or more" if architecture in ONLY else f"0, or an architecture of {', '.join(ONLY)}"
        raise InputError(f"{path}: {architecture}.expert_count is {n_experts}, {expected}, expected")
    for key in SCALES:
        if (scale := value(key, float, 1.0)) not in (0.0, 1.0):  # 0: none
            raise InputError(f"{path}: {architecture}.{key} is {scale:g}, 1 expected: such models are not supported")
    for key, most in (("leading_dense_block_count", 0), ("expert_group_count", 1)):
        if (found := value(key, int, 0)) > most:
            raise InputError(f"{path}: {architecture}.{key} is {found}, {most} expected: such models are not supported")
    width = value("expert_feed_forward_length", int, value("feed_forward_length", int))
    shared = shapes.get("blk.0.ffn_gate_shexp.weight", (0,))[0]
    found = {
        "n_experts": n_experts,
        "n_active_experts": value("expert_used_count", int),
        "hidden_dim": width,
        "expert_hidden_dim": width,
        "expert_bias": "blk.0.exp_probs_b.bias" in shapes,
    }
    if architecture == "glm4moe":
        score = value("expert_gating_func", int, 2)
        if score not in SCORES:
            raise InputError(f"{path}: {architecture}.expert_gating_func is {score}, 1 or 2 expected")
        normalized = value("expert_weights_norm", bool, False)
        found |= {"expert_score": SCORES[score], "normalize_expert_weights": normalized}
    return found | shared_experts(shared, width)


def check_attention_scale(scale: float, head_dim: int, path: Path) -> None:
    """Refuse a scale of the attention's scores other than ours; 0 means ours.

    Raises:
        InputError: it is another.
    """
    if scale and not np.isclose(scale, head_dim**-0.5, rtol=1e-6):
        expected = f"{head_dim**-0.5:g}, one over the root of a head's width, expected"
        raise InputError(f"{path}: attention.scale is {scale:g}, {expected}: such models are not supported")


def write_mixture(writer: "gguf.GGUFWriter", config: LMConfig, architecture: str) -> None:
    """Write the values that describe a model's experts."""
    import gguf

    writer.add_expert_count(config.n_experts)
    writer.add_expert_used_count(config.n_active_experts)
    writer.add_expert_feed_forward_length(config.expert_hidden_dim)
    if architecture == "granitemoe":
        writer.add_logit_scale(1.0)
        if config.n_shared_experts:
            writer.add_expert_shared_feed_forward_length(config.shared_hidden_dim)
    elif architecture == "glm4moe":
        writer.add_expert_shared_count(config.n_shared_experts or 1)
        writer.add_leading_dense_block_count(0)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[config.expert_score.upper()])
        writer.add_expert_weights_norm(config.normalize_expert_weights)
        writer.add_expert_weights_scale(1.0)


def with_zeros(state_dict: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """A model's tensors for glm4moe, with a shared expert and a bias of zeros if it has none."""
    added = {}
    for layer in range(config.n_layers):
        prefix, dim, width = f"layers.{layer}.feed_forward", config.dim, config.expert_hidden_dim
        if not config.n_shared_experts:
            shapes = {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}
            added |= {f"{prefix}.shared.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
        if not config.expert_bias:
            added[f"{prefix}.router.bias"] = torch.zeros(config.n_experts)
    return state_dict | added
