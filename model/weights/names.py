"""What other programs call a weight, and in which order they keep the numbers of a head.

RoPE turns pairs of numbers. In Meta's files and ours a pair is two neighbours, 2j and 2j + 1; transformers pairs j with
j + D / 2. The same model is kept in both orders: the rows of queries and keys, their biases, and the gains of qk_norm
change places, and every product and sum stays what it was.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import LMConfig
from model.storage.archive_checks import check_shapes, weight_shapes

# Of a layer: our name, transformers' and GGUF's.
LAYER = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "attention.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attention.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
}
TRANSFORMERS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
GGUF = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
TURNED = ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm")  # by RoPE


def transformers_name(name: str) -> str:
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight."""
    return _renamed(name, TRANSFORMERS, "model.layers", 0)


def gguf_name(name: str) -> str:
    """layers.0.attention.wq.weight -> blk.0.attn_q.weight."""
    return _renamed(name, GGUF, "blk", 1)


def _renamed(name: str, others: Mapping[str, str], layers: str, column: int) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in others:
        return f"{others[stem]}.{kind}"
    _, number, part = stem.split(".", 2)
    return f"{layers}.{number}.{LAYER[part][column]}.{kind}"


def reordered(state_dict: Mapping[str, Tensor], config: LMConfig, order: Callable[[Tensor, int], Tensor]) -> dict:
    """Our state dict with `order`, `in_halves` or `in_pairs`, done to all that RoPE turns."""
    result = dict(state_dict)
    for name, tensor in state_dict.items():
        part = name.split(".", 2)[-1].rpartition(".")[0]
        if part in TURNED:
            result[name] = order(tensor, config.head_dim)
    return result


def in_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """[heads * D, ...] with pairs of neighbours -> the same with the first of all pairs, then the second."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)


def in_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Undoes `in_halves`."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def gather(
    config: LMConfig,
    rename: Callable[[str], str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    path: str | Path,
) -> dict[str, Tensor]:
    """A state dict under our names, in the order that the file has; all shapes are compared before anything is read.

    Args:
        rename: ours to theirs.
        shapes: of all that the file holds, by their names.
        read: a tensor, by its name there.
        path: for messages.

    Raises:
        InputError: a weight is missing, unknown, or of another shape than the config says.
    """
    wanted = {name: rename(name) for name in weight_shapes(config)}
    ours = {theirs: name for name, theirs in wanted.items()}
    extra = shapes.keys() - ours.keys()
    biases = sorted(name for name in extra if name.endswith((".o_proj.bias", ".attn_output.bias")))
    found = {ours.get(name, name): torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for name in biases:  # some have them, of zeros
        if bool(read(name).any()):
            raise InputError(f"{path}: {shown(name)} is not zero; such models are not supported")
        del found[name]
    if config.tie_embeddings:
        found["output.weight"] = found.get("tok_embeddings.weight")
    check_shapes(found, config, path)
    state_dict = {name: read(theirs) for name, theirs in wanted.items() if theirs in shapes}
    if config.tie_embeddings:
        state_dict["output.weight"] = state_dict["tok_embeddings.weight"]
    for name, tensor in state_dict.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{path}: {wanted[name]} holds {tensor.dtype}, float32, float16 or bfloat16 expected")
    return state_dict
