"""Meta's releases of Llama: a folder with `params.json` and `consolidated.00.pth`.

params.json does not give the context length; that of the release with the same values is assumed.
"""

from pathlib import Path

from model.errors import InputError, shown
from model.LMConfig import LMConfig
from model.storage.archive import load_torch, save_torch
from model.storage.files import new_folder, read_json, write_json
from model.weights.names import on_cpu, plain_state_dict, whole_pair
from model.weights.shapes import COMMON, check_expressible, check_shapes, read_shape, require_fields
from model.weights.weights import Weights

PARAMS, PART, PARTS = "params.json", "consolidated.00.pth", "consolidated.*.pth"
# Fields of params.json that an LMConfig has too; the others are derived.
FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta")
MORE_FIELDS = ("max_seq_len", "ffn_dim_multiplier", "use_scaled_rope", "max_batch_size")
SCALED_ROPE = {  # what use_scaled_rope means
    "rope_scaling": "llama3",
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_seq_len": 8192,
}
LLAMA_32 = ((2048, 16), (3072, 28))  # dim and n_layers of its 1B and 3B


def is_meta_folder(path: str | Path) -> bool:
    """Whether a folder is laid out as Meta's releases are."""
    path = Path(path)
    return (path / PARAMS).is_file() and any(path.glob(PARTS))


def load_meta_folder(path: str | Path) -> Weights:
    """Read a release in one part, without its tokenizer. `inferred` says which context is assumed.

    Raises:
        InputError: it has several parts, is damaged, or params.json describes other weights or an unsupported model.
    """
    path = Path(path)
    parts = sorted(path.glob(PARTS))
    if [part.name for part in parts] != [PART]:
        found = f"{len(parts)} parts, from {parts[0].name} to {parts[-1].name}" if parts else "none of it"
        raise InputError(f"{path}: {PART} alone expected, {found} found; models split over several are not supported")
    params = _params(path / PARAMS)
    state_dict, tied = whole_pair(plain_state_dict(load_torch(parts[0]), parts[0]))
    if params.get("vocab_size", -1) == -1 and "tok_embeddings.weight" in state_dict:  # Llama 2: the tokenizer's
        params["vocab_size"] = len(state_dict["tok_embeddings.weight"])
    config, release = read_params(params, path / PARAMS)
    config.tie_embeddings = tied
    check_shapes(state_dict, config, path)
    assumed = "" if "max_seq_len" in params else f"max_seq_len {config.max_seq_len} is assumed, as in {release}; "
    inferred = f"{path}: {assumed}its tokenizer is not read: the embedded one is used unless you give one"
    return Weights(state_dict, config, inferred=inferred)


def _params(path: Path) -> dict:
    params = read_json(path)
    unknown = sorted(set(params) - {*FIELDS, *MORE_FIELDS})
    if unknown:
        names = ", ".join(shown(name)[1:-1] for name in unknown[:3])
        raise InputError(f"{path}: {names} inside, so it is no plain Llama; other models are not supported")
    require_fields(params, ("dim", "n_layers", "n_heads"), path)
    return params


def read_params(params: dict, path: str | Path) -> tuple[LMConfig, str]:
    """The config that params.json describes, and the release from which its context is taken if it gives none.

    Raises:
        InputError: a value has the wrong type, or no model can have it.
    """
    values = {name: params[name] for name in FIELDS if params.get(name) is not None}
    values = {"n_kv_heads": values.get("n_heads"), "multiple_of": 256, **values}
    multiplier, scaled = params.get("ffn_dim_multiplier"), params.get("use_scaled_rope") or False
    if not (multiplier is None or (type(multiplier) in (int, float) and 0 < multiplier < 1000)):
        raise InputError(f"{path}: ffn_dim_multiplier is {shown(multiplier)}, a number from 0 to 1000 expected")
    if type(scaled) is not bool:
        raise InputError(f"{path}: use_scaled_rope is {shown(scaled)}, true or false expected")
    config = read_shape(values, path)
    config.hidden_dim = _hidden_dim(config.dim, config.multiple_of, multiplier)
    if scaled:
        for name, value in _scaled_rope(config).items():
            setattr(config, name, value)
    release, config.max_seq_len = _release(config)
    if "max_seq_len" in params:
        config.max_seq_len = read_shape({**values, "max_seq_len": params["max_seq_len"]}, path).max_seq_len
    return config, release


def _hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: 8/3 of dim, times the multiplier, rounded up to multiple_of."""
    hidden_dim = int(8 * dim / 3)
    if multiplier is not None:
        hidden_dim = int(multiplier * hidden_dim)
    return multiple_of * -(-hidden_dim // multiple_of)


def _scaled_rope(config: LMConfig) -> dict:
    return {**SCALED_ROPE, "rope_factor": 32.0 if (config.dim, config.n_layers) in LLAMA_32 else 8.0}


def _release(config: LMConfig) -> tuple[str, int]:
    """(name, max_seq_len) of the release with such values."""
    if config.rope_scaling:
        return "Llama 3.1", 131072
    if config.rope_theta != 1e4:
        return ("Code Llama", 16384) if config.rope_theta == 1e6 else ("Llama 3", 8192)
    return ("Llama 1", 2048) if config.norm_eps < 1e-5 else ("Llama 2", 4096)


def save_meta_folder(path: str | Path, weights: Weights) -> None:
    """Write a folder like Meta's releases in one part, in float32, without a tokenizer.

    rope_theta is always written, since Llama 3's code assumes 500,000 if it is missing.

    Args:
        path: a new or an empty folder.

    Raises:
        InputError: Meta's code cannot express the model, or the folder cannot be written.
    """
    path, config = Path(path), weights.config
    scaled = _scaled_rope(config)
    only = {"head_dim": (config.dim / config.n_heads,), "rope_scaling": (None, scaled.pop("rope_scaling"))}
    only |= {name: (value,) for name, value in scaled.items()}
    check_expressible(config, path, "Meta's params.json", (*COMMON, "norm_eps", "rope_theta", "tie_embeddings"), only)
    params = {name: getattr(config, name) for name in FIELDS} | _hidden_dim_params(config)
    if config.rope_scaling:
        params["use_scaled_rope"] = True
    with new_folder(path) as temporary:
        save_torch(temporary / PART, on_cpu(weights.state_dict))
        write_json(temporary / PARAMS, params)


def _hidden_dim_params(config: LMConfig) -> dict:
    """multiple_of and, if needed, ffn_dim_multiplier, with which Meta's rule yields this hidden_dim."""
    for multiple_of in (config.multiple_of, 256):
        if _hidden_dim(config.dim, multiple_of, None) == config.hidden_dim:
            return {"multiple_of": multiple_of}
    # A quarter above, so that rounding down cannot miss it.
    return {"multiple_of": 1, "ffn_dim_multiplier": (config.hidden_dim + 0.25) / int(8 * config.dim / 3)}
