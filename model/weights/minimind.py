"""State dicts without a description: names and shapes show which program they are from.

MiniMind saved four generations of models as `pretrain_512.pth`, with no description of their shape:

| MiniMind                   | names         | query heads / key heads | RoPE                 | norm_eps |
|----------------------------|---------------|-------------------------|----------------------|----------|
| v1, from 2024-08           | Meta's        | 16 / 8                  | neighbours, base 1e4 | 1e-5     |
| MiniMind2, from 2025-02    | Meta's        | 8 / 2                   | neighbours, base 1e6 | 1e-5     |
| MiniMind2, from 2025-04-26 | transformers' | 8 / 2                   | halves, base 1e6     | 1e-5     |
| minimind-3, from 2026-03   | transformers' | 8 / 4, with qk_norm     | halves, base 1e6     | 1e-6     |

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
from model.weights.names import in_pairs, read_state_dict, reordered, transformers_name, whole_pair
from model.weights.weights import Weights

OVERRIDABLE = ("n_heads", "n_kv_heads", "rope_theta", "max_seq_len", "norm_eps")  # values that shapes do not determine
WIDEST_HEAD = 1024
EXPERTS = (".experts.", ".shared_experts.", ".gate.")  # parts of names in a mixture of experts
LAYER_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.")


class Generation(NamedTuple):
    """The values with which a program builds the models that it saves as such state dicts."""

    title: str
    n_heads: int | None  # None: unknown
    max_seq_len: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5


V1 = Generation("MiniMind v1", 16, 512)
V2 = Generation("MiniMind2", 8, 8192, rope_theta=1e6)
V2_TRANSFORMERS = Generation("MiniMind2 (from 2025-04-26)", 8, 32768, rope_theta=1e6)
V3 = Generation("minimind-3", 8, 32768, rope_theta=1e6, norm_eps=1e-6)
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
        InputError: it is a mixture of experts or no Transformer, or a given value does not fit its shapes.
    """
    experts = next((name for name in state_dict if any(part in name for part in EXPERTS)), None)
    if experts is not None:
        raise InputError(f"{path}: {shown(experts)} inside: a mixture of experts; only dense models are supported")
    halves = any(name.startswith("model.") for name in state_dict)
    rename = transformers_name if halves else str
    state_dict, tied = whole_pair(state_dict, rename)
    config, generation = _shape(state_dict, rename, path, _checked(overrides, path))
    config.tie_embeddings = tied
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    state_dict, config = read_state_dict(config, rename, shapes, state_dict.__getitem__, path)
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
    state_dict: Mapping[str, Tensor], rename: Callable[[str], str], path: str | Path, overrides: Mapping
) -> tuple[LMConfig, Generation]:
    """The config, from shapes, overrides and the generation's values, and the generation."""

    def size(name: str, dimensions: int) -> tuple[int, ...]:
        name = rename(name)
        if name not in state_dict:
            raise InputError(
                f"{path}: no {name} inside; expected Meta's names, as MiniMind v1 (tok_embeddings, layers.0.…), or "
                "transformers' (model.embed_tokens, model.layers.0.…)"
            )
        found = tuple(state_dict[name].shape)
        if len(found) != dimensions or 0 in found:
            expected = "a matrix" if dimensions == 2 else "a vector"
            raise InputError(f"{path}: {name} has shape {shown(found)}, {expected} expected")
        return found

    vocab_size, dim = size("tok_embeddings.weight", 2)
    queries, keys = (size(f"layers.0.attention.{name}.weight", 2)[0] for name in ("wq", "wk"))
    qk_norm = rename("layers.0.attention.q_norm.weight") in state_dict
    head_dim = size("layers.0.attention.q_norm.weight", 1)[0] if qk_norm else None
    generation = _generation(dim, queries, keys, qk_norm, halves=rename is transformers_name)
    n_heads, n_kv_heads = _heads(queries, keys, head_dim, generation, overrides, path)
    usual = {name: getattr(generation, name) for name in ("max_seq_len", "rope_theta", "norm_eps")}
    layers = {match[1] for match in map(LAYER_NAME.match, state_dict) if match}
    shape = dict(
        dim=dim,
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=queries // n_heads,
        vocab_size=vocab_size,
        hidden_dim=size("layers.0.feed_forward.w1.weight", 2)[0],
        qk_norm=qk_norm,
        qkv_bias=rename("layers.0.attention.wq.bias") in state_dict,
    )
    try:
        return LMConfig(**usual | overrides | shape), generation
    except InputError as error:
        raise InputError(f"{path}: no model has such shapes ({error})") from error


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
        return ", ".join(f"{name} {getattr(config, name):g}" for name in names)

    sure = ("n_heads", "n_kv_heads") if config.qk_norm else ()
    assumed = [name for name in OVERRIDABLE if name not in (*overrides, *sure)]
    read = ["dim", "n_layers", *(name for name in sure if name not in overrides), "vocab_size", "hidden_dim"]
    parts = [
        f"no {path.with_suffix('.json').name} beside the weights: their names and shapes are those of "
        f"{generation.title}, read off them {values(*read)}",
        f"assumed {values(*assumed)}" if assumed else "",
        f"given {values(*overrides)}" if overrides else "",
        "the tokenizer is unknown: the embedded one is used unless you give one (MiniMind's own weights need "
        "MiniMind's tokenizer folder: --tokenizer_path)",
    ]
    return "; ".join(part for part in parts if part)
