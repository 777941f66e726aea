"""The names that programs give to weights, and how they order the numbers of a head.

RoPE rotates pairs of numbers. In Meta's files and ours a pair is two neighbours, 2j and 2j + 1; transformers pairs j
with j + D / 2. To convert, the rows of queries and keys, their biases and the gains of qk_norm are reordered; every
product and sum stays the same.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import LMConfig
from model.weights.shapes import FLOAT_DTYPES, check_shapes, weight_shapes

# Prefixes that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add to a module's name.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Tables that some versions of programs saved; all of them follow from the shape.
TABLES = re.compile(r"(?:^|\.)(?:mask|inv_freq|rope\.freqs|freqs_cis|freqs_cos|freqs_sin|pos_cis)$")
TIED_PAIR = ("tok_embeddings.weight", "output.weight")
# What some files hold and we lack, accepted where it is 0: a bias, and what the shared expert's sigmoid is computed of.
ZEROS = (".o_proj.bias", ".attn_output.bias", ".shared_expert_gate.weight")
ROTATED = ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm")  # by RoPE


class Names(NamedTuple):
    """A program's names for weights: called with one of ours, returns theirs.

    Attributes:
        layers: what precedes a layer's number.
        modules: our names of modules to theirs; those of a layer without "layers.N.".
        tensors: our names of a layer's tensors to theirs, where the module's name is not enough.
    """

    layers: str
    modules: Mapping[str, str]
    tensors: Mapping[str, str] = {}

    def __call__(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module in self.modules:
            return f"{self.modules[module]}.{kind}"
        _, number, part = name.split(".", 2)
        if part in self.tensors:
            return f"{self.layers}.{number}.{self.tensors[part]}"
        return f"{self.layers}.{number}.{self.modules[part.rpartition('.')[0]]}.{kind}"


# layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight; experts as `expert_layouts.gathered` has them
transformers_name = Names(
    "model.layers",
    {
        "tok_embeddings": "model.embed_tokens",
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.router": "mlp.router",
        "feed_forward.experts": "mlp.experts",
        "feed_forward.shared.w1": "mlp.shared.w1",
        "feed_forward.shared.w2": "mlp.shared.w2",
        "feed_forward.shared.w3": "mlp.shared.w3",
        "norm": "model.norm",
        "output": "lm_head",
    },
)


def reordered(state_dict: Mapping[str, Tensor], config: LMConfig, order: Callable[[Tensor, int], Tensor]) -> dict:
    """Our state dict with `order`, `in_halves` or `in_pairs`, applied to everything that RoPE rotates."""
    result = dict(state_dict)
    for name, tensor in state_dict.items():
        part = name.split(".", 2)[-1].rpartition(".")[0]
        if part in ROTATED:
            result[name] = order(tensor, config.head_dim)
    return result


def in_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """[heads * D, ...] with neighbouring pairs -> the first number of every pair, then the second of every pair."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)


def in_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `in_halves`."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def read_state_dict(
    config: LMConfig,
    rename: Callable[[str], str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    path: str | Path,
) -> tuple[dict[str, Tensor], LMConfig]:
    """A state dict under our names, with heads in the file's order. All shapes are checked before anything is read.

    Args:
        config: as the file describes the model.
        rename: our names to the file's.
        shapes: of everything in the file, by its names.
        read: returns a tensor, given its name in the file.
        path: for messages.

    Returns:
        the state dict, and the config: with tie_embeddings off if the file holds two different matrices.

    Raises:
        InputError: a weight is missing, unknown, or of another shape than the config says.
    """
    wanted = {name: rename(name) for name in weight_shapes(config)}
    ours = {theirs: name for name, theirs in wanted.items()}
    extra = shapes.keys() - ours.keys()
    zeros = sorted(name for name in extra if name.endswith(ZEROS))
    found = {ours.get(name, name): torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for name in zeros:
        if bool(read(name).any()):
            raise InputError(f"{path}: {shown(name)} is not zero; such models are not supported")
        del found[name]
    if config.tie_embeddings:
        found = {theirs: found[ours] for ours, theirs in (TIED_PAIR, TIED_PAIR[::-1]) if ours in found} | found
    check_shapes(found, config, path)
    state_dict = {name: read(theirs) for name, theirs in wanted.items() if theirs in shapes}
    if config.tie_embeddings:
        state_dict, tied = whole_pair(state_dict)
        config = replace(config, tie_embeddings=tied)
    for name, tensor in state_dict.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise InputError(f"{path}: {wanted[name]} holds {tensor.dtype}, float32, float16 or bfloat16 expected")
    return state_dict, config


def plain_state_dict(content: Mapping, path: str | Path) -> dict[str, Tensor]:
    """The weights alone, by their plain names.

    Raises:
        InputError: the content is not a dict from names to tensors.
    """
    if not content or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        dicts = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        inner = [key for key, value in dicts.items() if any(isinstance(tensor, Tensor) for tensor in value.values())]
        hint = f"; save its {shown(inner[0])} alone with torch.save" if inner else ""
        found = ", ".join(map(shown, [*content][:5])) or "nothing"
        raise InputError(f"{path}: expected a state dict of tensors or a MateConv checkpoint, found {found}{hint}")
    return {plain: content[name] for plain, name in plain_names(content, path).items()}


def plain_names(names: Iterable[str], path: str | Path) -> dict[str, str]:
    """{plain name: name in the file} of weights: without the prefixes of wrappers, and for transformers' models with
    the prefix `model.`, which `LlamaModel.save_pretrained` leaves out. Tables are left out.

    Raises:
        InputError: two names in the file mean the same weight.
    """
    plain = [(WRAPPERS.sub("", name), name) for name in names]
    plain = [(name, theirs) for name, theirs in plain if not TABLES.search(name)]
    if any(name.startswith("layers.0.self_attn.") for name, _ in plain):
        plain = [(name if name.startswith("lm_head.") else f"model.{name}", theirs) for name, theirs in plain]
    found: dict[str, str] = {}
    for name, theirs in plain:
        if (other := found.setdefault(name, theirs)) != theirs:
            raise InputError(f"{path}: {shown(other)} and {shown(theirs)} inside mean the same weight; one expected")
    return found


def whole_pair(state_dict: Mapping[str, Tensor], rename: Callable[[str], str] = str) -> tuple[dict[str, Tensor], bool]:
    """A state dict with both embedding and output, and whether they are one matrix.

    Programs that tie them save either or both.

    Args:
        rename: our names to the state dict's.
    """
    names = [rename(name) for name in TIED_PAIR]
    pair = [state_dict[name] for name in names if name in state_dict]
    tied = len(pair) < 2 or (pair[0].dtype == pair[1].dtype and torch.equal(*pair))
    return {**state_dict, **(dict.fromkeys(names, pair[0]) if pair and tied else {})}, tied


def on_cpu(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached float32 tensors on the CPU. Keys that share a matrix still share it, so that it is stored once."""
    moved: dict[int, Tensor] = {}
    result = {}
    for key, tensor in state_dict.items():
        address = tensor.data_ptr()  # 0: of an empty one, or on a device that tells none
        if not address or address not in moved:
            moved[address] = tensor.detach().to("cpu", torch.float32)
        result[key] = moved[address]
    return result
