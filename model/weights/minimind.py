"""State dicts without a description: names and shapes show which program they are from.

MiniMind saved four generations of models as `pretrain_512.pth`, or `pretrain_512_moe.pth` with experts, with no
description of their shape:

| MiniMind                   | names         | heads / key heads   | RoPE                 | norm_eps | active experts |
|----------------------------|---------------|---------------------|----------------------|----------|----------------|
| v1, from 2024-08           | Meta's        | 16 / 8              | neighbours, base 1e4 | 1e-5     | 2              |
| MiniMind2, from 2025-02    | Meta's        | 8 / 2               | neighbours, base 1e6 | 1e-5     | 2              |
| MiniMind2, from 2025-04-26 | transformers' | 8 / 2               | halves, base 1e6     | 1e-5     | 2              |
| minimind-3, from 2026-03   | transformers' | 8 / 4, with qk_norm | halves, base 1e6     | 1e-6     | 1              |

The weights of a token's active experts are divided by their sum, of a single one only in minimind-3, where it is 1
then; since 2026-09-17 no longer, so its files of experts exist in both kinds.

baby-llama2-chinese and llama2.c, from which v1 descends, also use Meta's names, with as many key heads as query heads.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import LMConfig
from model.options import options_of, parse_value
from model.weights.expert_layouts import gathered, shared_experts
from model.weights.names import in_pairs, read_state_dict, reordered, transformers_name, whole_pair
from model.weights.weights import Weights

# Values that shapes do not determine, the last ones those of a mixture of experts.
OF_EXPERTS = ("n_active_experts", "normalize_expert_weights")
OVERRIDABLE = ("n_heads", "n_kv_heads", "rope_theta", "max_seq_len", "norm_eps", *OF_EXPERTS)
WIDEST_HEAD = 1024
LAYER_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.")


class Generation(NamedTuple):
    """The values with which a program builds the models that it saves as such state dicts."""

    title: str
    n_heads: int | None  # None: unknown
    max_seq_len: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    n_active_experts: int = 2


V1 = Generation("MiniMind v1", 16, 512)
V2 = Generation("MiniMind2", 8, 8192, rope_theta=1e6)
V2_TRANSFORMERS = Generation("MiniMind2 (from 2025-04-26)", 8, 32768, rope_theta=1e6)
V3 = Generation("minimind-3", 8, 32768, rope_theta=1e6, norm_eps=1e-6, n_active_experts=1)
OURS = Generation("MateConv, with qk_norm", None, 512)  # the gain of a head's norm tells the heads
UNKNOWN = Generation("no known model", None, 512)
WITHOUT_GROUPS = {  # by dim: baby-llama2-chinese's two models, and llama2.c's stories15M and stories110M
    288: Generation("llama2.c", 6, 256),
    512: Generation("baby-llama2 or llama2.c", 8, 512),
    768: Generation("llama2.c", 12, 1024),
    1024: Generation("baby-llama2", 8, 1024),
}


def recognise(state_dict: Mapping[str, Tensor], path: str | Path, overrides: Mapping[str, float]) -> Weights:
    """Weights from a state dict without a description, with Meta's names or transformers'.

    Args:
        state_dict: as `plain_state_dict` returns it.
        path: its file, for messages.
        overrides: values by names of `OVERRIDABLE`, which replace those that would be inferred.

    Returns:
        Weights whose `inferred` says in one line what was read, what was assumed, and which tokenizer is used.

    Raises:
        InputError: it is no Transformer, an expert is missing, or a given value does not fit its shapes.
    """
    halves = any(name.startswith("model.") for name in state_dict)
    rename = transformers_name if halves else str
    state_dict, tied = whole_pair(state_dict, rename)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    shapes, read = gathered(shapes, state_dict.__getitem__, path)
    config, generation = _shape(shapes, rename, path, _checked(overrides, path))
    config.tie_embeddings = tied
    state_dict, config = read_state_dict(config, rename, shapes, read, path)
    if halves:
        state_dict = reordered(state_dict, config, in_pairs)
    return Weights(state_dict, config, inferred=_line(config, generation, Path(path), overrides))


def _checked(overrides: Mapping[str, float], path: str | Path) -> dict:
    checked = {}
    for name, value in overrides.items():
        if name not in OVERRIDABLE:
            raise InputError(f"{path}: {name} follows from the weights' shapes; {', '.join(OVERRIDABLE)} can be given")
        try:
            checked[name] = parse_value(options_of(LMConfig)[name], value)
        except ValueError as error:
            raise InputError(f"{name}: {shown(value)} found, {error} expected") from error
    return checked


def _shape(
    shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str], path: str | Path, overrides: Mapping
) -> tuple[LMConfig, Generation]:
    """The config, from shapes, overrides and the generation's values, and the generation."""

    def size(name: str, dimensions: int) -> tuple[int, ...]:
        name = rename(name)
        if name not in shapes:
            raise InputError(
                f"{path}: no {name} inside; expected Meta's names, as MiniMind v1 (tok_embeddings, layers.0.…), or "
                "transformers' (model.embed_tokens, model.layers.0.…)"
            )
        found = shapes[name]
        if len(found) != dimensions or 0 in found:
            expected = {1: "a vector", 2: "a matrix", 3: "a matrix of each expert"}[dimensions]
            raise InputError(f"{path}: {name} has shape {shown(found)}, {expected} expected")
        return found

    vocab_size, dim = size("tok_embeddings.weight", 2)
    queries, keys = (size(f"layers.0.attention.{name}.weight", 2)[0] for name in ("wq", "wk"))
    qk_norm = rename("layers.0.attention.q_norm.weight") in shapes
    head_dim = size("layers.0.attention.q_norm.weight", 1)[0] if qk_norm else None
    generation = _generation(dim, queries, keys, qk_norm, halves=rename is transformers_name)
    n_heads, n_kv_heads = _heads(queries, keys, head_dim, generation, overrides, path)
    usual = {name: getattr(generation, name) for name in ("max_seq_len", "rope_theta", "norm_eps")}
    layers = {match[1] for match in map(LAYER_NAME.match, shapes) if match}
    shape = dict(
        dim=dim,
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=queries // n_heads,
        vocab_size=vocab_size,
        qk_norm=qk_norm,
        qkv_bias=rename("layers.0.attention.wq.bias") in shapes,
    )
    if rename("layers.0.feed_forward.experts.w1") in shapes:
        shape |= _experts(size, shapes, rename)
        usual |= _usual_experts(generation, overrides)
    elif given := [name for name in OF_EXPERTS if name in overrides]:
        raise InputError(f"{path}: {given[0]} was given, but there are no experts inside; omit it")
    else:
        shape["hidden_dim"] = size("layers.0.feed_forward.w1.weight", 2)[0]
    try:
        return LMConfig(**usual | overrides | shape), generation
    except InputError as error:
        raise InputError(f"{path}: no model has such shapes ({error})") from error


def _experts(size: Callable[[str, int], tuple], shapes: Mapping, rename: Callable[[str], str]) -> dict:
    """What shapes show of a mixture of experts."""
    n_experts, width, _ = size("layers.0.feed_forward.experts.w1", 3)
    shared = shapes.get(rename("layers.0.feed_forward.shared.w1.weight"), (0,))
    bias = rename("layers.0.feed_forward.router.bias") in shapes
    found = {"n_experts": n_experts, "hidden_dim": width, "expert_hidden_dim": width, "expert_bias": bias}
    return found | shared_experts(shared[0], width)


def _usual_experts(generation: Generation, overrides: Mapping) -> dict:
    n_active = overrides.get("n_active_experts", generation.n_active_experts)
    return {"n_active_experts": n_active, "normalize_expert_weights": n_active > 1 or generation is V3}


def _generation(dim: int, queries: int, keys: int, qk_norm: bool, halves: bool) -> Generation:
    """Whose weights these are, by their names (transformers' pair halves of a head) and the rows of wq and wk."""
    if halves:
        return V3 if qk_norm else V2_TRANSFORMERS
    if qk_norm:
        return OURS
    if queries == keys:
        return WITHOUT_GROUPS.get(dim, UNKNOWN)
    return {2: V1, 4: V2}.get(queries / keys, UNKNOWN)


def _heads(
    queries: int, keys: int, head_dim: int | None, generation: Generation, overrides: Mapping, path: str | Path
) -> tuple[int, int]:
    """(n_heads, n_kv_heads): the overrides, or else the generation's.

    Raises:
        InputError: they do not fit the rows of wq and wk, or are unknown; the message lists those that fit.
    """
    widths = range(2, min(queries, keys, WIDEST_HEAD) + 1, 2) if head_dim is None else (head_dim,)
    pairs = {(queries // width, keys // width) for width in widths if not (queries % width or keys % width)}
    fitting = sorted((n_heads, n_kv_heads) for n_heads, n_kv_heads in pairs if n_heads % n_kv_heads == 0)
    wanted, whose = {name: overrides[name] for name in ("n_heads", "n_kv_heads") if name in overrides}, ""
    if not wanted and generation.n_heads and head_dim is None:
        wanted, whose = {"n_heads": generation.n_heads}, f", as in {generation.title},"
    found = [p for p in fitting if all(p[name == "n_kv_heads"] == value for name, value in wanted.items())]
    if len(found) == 1:
        return found[0]
    asked = " with ".join(f"{name} {value}" for name, value in wanted.items())
    what = f"{asked}{whose} does not fit its shapes" if wanted else "its shapes do not show the number of heads"
    accepted = ", ".join(f"{n_heads}/{n_kv_heads}" for n_heads, n_kv_heads in fitting[:20]) or "none"
    raise InputError(f"{path}: {what} (wq has {queries} rows, wk {keys}); give n_heads/n_kv_heads that fit: {accepted}")


def _line(config: LMConfig, generation: Generation, path: Path, overrides: Mapping) -> str:
    """One line on the values that were read, assumed, given, and are unknown."""

    def values(*names: str) -> str:
        found = {name: getattr(config, name) for name in names}
        return ", ".join(
            f"{name} {value if isinstance(value, bool) else f'{value:g}'}" for name, value in found.items()
        )

    sure = ("n_heads", "n_kv_heads") if config.qk_norm else ()
    open_ = [name for name in OVERRIDABLE if config.n_experts or name not in OF_EXPERTS]
    assumed = [name for name in open_ if name not in (*overrides, *sure)]
    read = ["dim", "n_layers", *(name for name in sure if name not in overrides), "vocab_size", "hidden_dim"]
    if config.n_experts:
        read += ["n_experts", "n_shared_experts"]
    parts = [
        f"no {path.with_suffix('.json').name} beside the weights: their names and shapes are those of "
        f"{generation.title}, read off them {values(*read)}",
        f"assumed {values(*assumed)}" if assumed else "",
        f"given {values(*overrides)}" if overrides else "",
        "the tokenizer is unknown: the embedded one is used unless you give one (MiniMind's own weights need "
        "MiniMind's tokenizer folder: --tokenizer_path)",
    ]
    return "; ".join(part for part in parts if part)
