"""A model's shape as files describe it, checked before memory is allocated for the model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError, shown
from model.LMConfig import LMConfig
from model.lora import A, B
from model.options import checked_value, options_of

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights that are read
F16_LARGEST = 65504
# Fields of an LMConfig that do not change what a model computes: a format may omit them.
UNNEEDED = ("multiple_of", "dropout", "flash_attn")
# Fields that every format expresses.
COMMON = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len")
# Fields that each rope_scaling uses.
LLAMA3_FIELDS = ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len")
SCALING_FIELDS = {None: (), "linear": ("rope_factor",), "llama3": LLAMA3_FIELDS}


def require_fields(values: Mapping, names: Iterable[str], path: str | Path) -> None:
    """Check that a description has the fields that a shape needs.

    Raises:
        InputError: naming those that are missing or null.
    """
    if missing := [name for name in names if values.get(name) is None]:
        raise InputError(f"{path}: does not say {', '.join(missing)} of the model")


def read_shape(values, path: str | Path) -> LMConfig:
    """The LMConfig of a dict that a file holds; every value must have the right type and lie within its limits.

    Raises:
        InputError: naming the file and every wrong value.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: config is {shown(values)}, the fields of a model's shape expected")
    problems, parsed = [], {}
    known = options_of(LMConfig)
    for name, value in values.items():
        if name not in known:
            problems.append(f"config.{shown(str(name))[1:-1]} is unknown")
            continue
        try:
            parsed[name] = checked_value(known[name], value)
        except ValueError as error:
            problems.append(f"config.{name}: {shown(value)} found, {error} expected")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems[:5])}")
    try:
        return LMConfig(**parsed)
    except InputError as error:
        raise InputError(f"{path}: config: {error}") from error


def weight_shapes(config: LMConfig, lora_rank: int = 0) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a `Transformer`'s weights, without making one.

    Args:
        lora_rank: of the adapters beside the matrices of its layers; 0: it has none.
    """
    dim, head_dim = config.dim, config.head_dim
    of_a_layer = {
        "attention.wq": (config.n_heads * head_dim, dim), "attention.wk": (config.n_kv_heads * head_dim, dim),
        "attention.wv": (config.n_kv_heads * head_dim, dim), "attention.wo": (dim, config.n_heads * head_dim),
        "attention_norm": (dim,), "ffn_norm": (dim,),
    }  # fmt: skip
    if not config.n_experts:
        of_a_layer |= _swiglu("feed_forward", dim, config.hidden_dim)
    elif config.n_shared_experts:
        of_a_layer |= _swiglu("feed_forward.shared", dim, config.shared_hidden_dim)
    adapters = {}
    if lora_rank:
        matrices = {name: shape for name, shape in of_a_layer.items() if len(shape) == 2}
        adapters |= {f"{name}.{A}": (lora_rank, columns) for name, (_, columns) in matrices.items()}
        adapters |= {f"{name}.{B}": (rows, lora_rank) for name, (rows, _) in matrices.items()}
    if config.qk_norm:
        of_a_layer |= {"attention.q_norm": (head_dim,), "attention.k_norm": (head_dim,)}
    of_a_layer = {f"{name}.weight": shape for name, shape in of_a_layer.items()}
    if config.qkv_bias:
        of_a_layer |= {f"attention.{n}.bias": of_a_layer[f"attention.{n}.weight"][:1] for n in ("wq", "wk", "wv")}
    of_a_layer |= adapters
    if config.n_experts:
        of_a_layer |= _experts(config)
    shapes = {f"layers.{n}.{name}": shape for n in range(config.n_layers) for name, shape in of_a_layer.items()}
    embedding = (config.vocab_size, dim)
    return shapes | {"tok_embeddings.weight": embedding, "output.weight": embedding, "norm.weight": (dim,)}


def _swiglu(name: str, dim: int, hidden_dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.w1": (hidden_dim, dim), f"{name}.w2": (dim, hidden_dim), f"{name}.w3": (hidden_dim, dim)}


def _experts(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """The router and the stacks of a layer, whose names have no ".weight"."""
    stacks = _swiglu("feed_forward.experts", config.dim, config.expert_hidden_dim)
    shapes = {name: (config.n_experts, *shape) for name, shape in stacks.items()}
    shapes["feed_forward.router.weight"] = (config.n_experts, config.dim)
    return shapes | ({"feed_forward.router.bias": (config.n_experts,)} if config.expert_bias else {})


def check_shapes(state_dict: Mapping[str, Tensor], config: LMConfig, path: str | Path, lora_rank: int = 0) -> None:
    """Check that weights fit a model of this shape, before memory is allocated for it.

    Args:
        lora_rank: of the adapters that must be among them; 0: there must be none.

    Raises:
        InputError: naming a weight that is missing, unknown, of another shape, or of another dtype than FLOAT_DTYPES.
    """
    layers = {str(key).split(".")[1] for key in state_dict if str(key).startswith("layers.")}
    if len(layers) != config.n_layers:
        raise InputError(f"{path}: holds {len(layers):,} layers, its description says n_layers {config.n_layers:,}")
    wanted = weight_shapes(config, lora_rank)
    missing, others = wanted.keys() - state_dict.keys(), state_dict.keys() - wanted.keys()
    if missing or others:
        found = " and ".join(
            f"{title} {shown(min(map(str, keys)))}{f' ({len(keys)} such)' if len(keys) > 1 else ''}"
            for title, keys in (("no", missing), ("an unknown", others))
            if keys
        )
        raise InputError(f"{path}: {found} inside; its description is of other weights")
    for key, shape in wanted.items():
        weight = state_dict[key]  # once: some mappings put it together
        if not isinstance(weight, Tensor):
            raise InputError(f"{path}: {key} is {shown(weight)}, a tensor expected")
        if tuple(weight.shape) != shape:
            found = shown(tuple(weight.shape))
            raise InputError(f"{path}: {key} is {found}, by its description {shown(shape)} expected")
        if weight.dtype not in FLOAT_DTYPES:
            raise InputError(f"{path}: {key} holds {weight.dtype}, float32, float16 or bfloat16 expected")


def check_f16(name: str, numbers: Tensor, path: str | Path) -> None:
    """Check that F16 can hold a weight's numbers; in float16, those too large for it are infinite already.

    Raises:
        InputError: naming the weight.
    """
    if bool((numbers.abs() > F16_LARGEST).any()):
        raise InputError(f"{path}: {name} holds numbers past {F16_LARGEST:,}, F16's largest; write BF16 or F32")


def check_expressible(
    config: LMConfig, path: str | Path, place: str, expressed: Iterable[str], only: Mapping[str, tuple]
) -> None:
    """Check that a format can express a shape, before anything is written.

    A field unknown to a format must have its default, so that no new field is dropped silently.

    Args:
        place: where the format holds the shape, for the message.
        expressed: fields of which the format can express every value.
        only: for other fields, the values that it can express.

    Raises:
        InputError: naming every field that the format cannot express.
    """
    used = SCALING_FIELDS.get(config.rope_scaling, LLAMA3_FIELDS)
    if "rope_scaling" not in expressed and config.rope_scaling not in only.get("rope_scaling", (None,)):
        used = ()  # one reason is enough
    others = []
    for name, field in options_of(config).items():
        value = getattr(config, name)
        accepted = only.get(name, (field.default,))
        needed = name not in (*UNNEEDED, *expressed) and (name not in LLAMA3_FIELDS or name in used)
        if needed and value not in accepted:
            others.append(f"{name} {shown(value)} (only {' or '.join(map(str, accepted))})")
    if others:
        raise InputError(f"{path}: {place} cannot express {', '.join(others)}; convert to another format")


def fitting_architecture(
    config: LMConfig, choices: Mapping[str, Mapping[str, tuple]], path: str | Path, program: str
) -> str:
    """The first of a program's architectures that computes what a mixture of experts does.

    Args:
        choices: by name, the fields that an architecture does not express in full, and the values that it does.

    Raises:
        InputError: there is none; it names what the nearest one lacks.
    """
    lacking = {
        name: [field for field, accepted in only.items() if getattr(config, field) not in accepted]
        for name, only in choices.items()
    }
    nearest = min(choices, key=lambda name: ("expert_score" in lacking[name], len(lacking[name])))
    if lacking[nearest]:
        found = ", ".join(
            f"{field} {shown(getattr(config, field))} (only {' or '.join(map(str, choices[nearest][field]))})"
            for field in lacking[nearest]
        )
        raise InputError(
            f"{path}: {program} has no architecture for these experts: the nearest, {nearest}, cannot express {found}; "
            "convert to another format"
        )
    return nearest
