"""Folders of transformers: config.json, safetensors, tokenizer, chat template and generation config.

Llama, Mistral, Qwen2, Qwen3 and MiniMind's own folders are read, and the mixtures of experts of
`transformers_experts.py`. Ours are written as LlamaForCausalLM, as Qwen2ForCausalLM if there are biases, as
Qwen3ForCausalLM if there is qk_norm, as a mixture of experts if there are experts. No code in a folder is run.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError, first_line, shown
from model.LMConfig import EXPERT_FIELDS, LMConfig
from model.storage.archive import load_torch
from model.storage.files import files_of_set, new_folder, read_json, write_json
from model.text.tokenization import end_ids, load_tokenizer, tokenizer_sha256
from model.weights.expert_layouts import gathered
from model.weights.names import in_halves, in_pairs, plain_names, read_state_dict, reordered, transformers_name
from model.weights.shapes import COMMON, LLAMA3_FIELDS, check_expressible, check_f16, read_shape, require_fields
from model.weights.tokenizer_copy import adds_bos, export_tokenizer
from model.weights.transformers_experts import (
    MIXTURES,
    check_fixed,
    mixture_json,
    mixture_kind,
    read_experts,
    read_mixture,
    written_experts,
)
from model.weights.weights import Weights

# Defaults of values that config.json leaves out: n_kv_heads (None: n_heads), context, window, norm_eps, base of RoPE.
DEFAULTS = {
    "llama": (None, 2048, None, 1e-6, 1e4),
    "mistral": (8, 131072, 4096, 1e-6, 1e4),
    "qwen2": (32, 32768, 4096, 1e-6, 1e4),
    "qwen3": (32, 32768, 4096, 1e-6, 1e4),
    "minimind": (2, 32768, None, 1e-5, 1e6),
    "mixtral": (8, 131072, None, 1e-5, 1e6),
    "granitemoeshared": (None, 2048, None, 1e-6, 1e4),
    "qwen2_moe": (16, 32768, 4096, 1e-6, 1e4),
    "qwen3_moe": (4, 32768, 4096, 1e-6, 1e4),
    "ernie4_5_moe": (4, 131072, None, 1e-5, 5e5),
    "glm4_moe": (8, 131072, None, 1e-5, 1e4),
}
WINDOWED = ("mistral", "mixtral")  # whatever use_sliding_window says, which others heed
TIED = ("minimind", "ernie4_5_moe")  # unless config.json says otherwise
LLAMA3 = {
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_seq_len",
}
CONFIG = "config.json"
MATRIX_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # written
EXPRESSED = (*COMMON, "head_dim", "norm_eps", "rope_theta", *LLAMA3_FIELDS, "tie_embeddings", "qk_norm", "qkv_bias")
EXPRESSED += (*EXPERT_FIELDS,)
BIASES_IN_ALL = ("qwen3", "qwen3_moe", "granitemoeshared")  # four projections of attention, or in none
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


# --------------------------------------------------------------------------------------------------------- reading


def is_transformers(path: Path) -> bool:
    """Whether a path is a folder of transformers, even one without weights, or a file of its weights."""
    if path.is_dir():
        return (path / CONFIG).is_file() or (path / "adapter_config.json").is_file()
    if path.name.startswith("pytorch_model") and (path.parent / CONFIG).is_file():
        return path.is_file()
    return path.is_file() and (path.name.endswith(".index.json") or path.suffix == ".safetensors")


def load_transformers_path(path: Path) -> Weights:
    """Read a folder, or one given by a file of its weights or their index; raises as `load_transformers`."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise InputError(
                f"{path}: a LoRA adapter; merge it into its base model first, with peft's merge_and_unload"
            )
        return load_transformers(path)
    if not (path.parent / CONFIG).is_file():
        raise InputError(f"{path}: no config.json beside it, which would describe the model")
    return load_transformers(path.parent, None if path.name.endswith(".index.json") else path.name)


def load_transformers(folder: str | Path, chosen: str | None = None) -> Weights:
    """Read a folder as `save_pretrained` writes it, with its tokenizer. Whatever transformers loads exactly, by prefix
    or by tying, loads here.

    Args:
        chosen: a file of its weights, which stands for all of them.

    Raises:
        InputError: a file is missing or damaged, or the model's architecture is not supported.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    tensors = _Tensors(folder, chosen)
    shapes, read = gathered(tensors.shapes, tensors.read, folder)
    config = read_config(values, shapes, folder / CONFIG)
    state_dict, config = read_state_dict(config, transformers_name, shapes, read, folder)
    kind = values["model_type"]
    if config.n_experts:
        state_dict, config = read_experts(state_dict, config, kind)
    if kind not in MIXTURES or not MIXTURES[kind].pairs:
        state_dict = reordered(state_dict, config, in_pairs)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Weights(
        state_dict,
        config,
        str(folder) if has_tokenizer else None,
        tokenizer_sha256(folder) if has_tokenizer else None,
        begins_with_bos=adds_bos(folder) if has_tokenizer else True,
    )


def read_config(values: Mapping, shapes: Mapping[str, tuple], path: Path) -> LMConfig:
    """The LMConfig that a config.json describes.

    Args:
        shapes: of the weights by transformers' names, with experts stacked; they show whether there are biases.

    Raises:
        InputError: the model is not a `Transformer`.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise InputError(f"{path}: model_type is {shown(kind)}, one of {', '.join(DEFAULTS)} expected")
    _refuse_others(values, kind, path)
    n_kv_heads, max_seq_len, window, norm_eps, rope_theta = DEFAULTS[kind]
    rope = _rope(values, path)
    window = values.get("sliding_window", window)
    max_seq_len = values.get("max_position_embeddings", max_seq_len)
    is_used = kind in WINDOWED or values.get("use_sliding_window", False)
    if isinstance(window, int) and isinstance(max_seq_len, int) and is_used:
        max_seq_len = min(max_seq_len, window)  # up to the window, attention is the same without it
    heads, n_kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads", n_kv_heads)
    head_dim = values.get("head_dim")
    found = {
        "dim": values.get("hidden_size"),
        "n_layers": values.get("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": heads if n_kv_heads is None else n_kv_heads,
        "head_dim": 128 if kind == "qwen3" and head_dim is None else head_dim,
        "vocab_size": values.get("vocab_size"),
        "hidden_dim": values.get("intermediate_size"),
        "norm_eps": values.get("rms_norm_eps", norm_eps),
        "max_seq_len": max_seq_len,
        "rope_theta": rope.pop("rope_theta", rope_theta),
        "tie_embeddings": values.get("tie_word_embeddings", kind in TIED),
        "qk_norm": "model.layers.0.self_attn.q_norm.weight" in shapes,
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
    }
    gate = shapes.get("model.layers.0.mlp.gate_proj.weight")
    if found["hidden_dim"] is None and gate:
        found["hidden_dim"] = gate[0]  # MiniMind computes it
    if mixture := read_mixture(kind, values, shapes, path):
        found |= mixture | {"hidden_dim": mixture["expert_hidden_dim"]}  # no layer is dense
    require_fields(found, ("dim", "n_layers", "n_heads", "vocab_size", "hidden_dim"), path)
    config = read_shape(found | rope, path)
    check_fixed(kind, values, config, path)
    return config


def _refuse_others(values: Mapping, kind: str, path: Path) -> None:
    """Refuse settings that change the computation and that LMConfig cannot express."""
    expected = {
        "hidden_act": ("silu", "swish"), "mlp_bias": (False,), "partial_rotary_factor": (1, 1.0),
        "pretraining_tp": tuple(range(65)), "quantization_config": (),
    }  # fmt: skip
    if kind != "minimind" and kind not in MIXTURES:
        expected |= {"use_moe": (False,), "num_local_experts": (0, 1)}
    for name, accepted in expected.items():
        if values.get(name) is not None and values[name] not in accepted:
            wanted = " or ".join(map(str, accepted[:2])) or "no such key"
            raise InputError(
                f"{path}: {name} is {shown(values[name])}, {wanted} expected: such models are not supported"
            )
    layers = values.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(layer == "full_attention" for layer in layers)):
        raise InputError(f"{path}: layer_types is {shown(layers)}, a list of full_attention only expected")


def _rope(values: Mapping, path: Path) -> dict:
    """An LMConfig's fields for RoPE, from version 5's rope_parameters or the older rope_theta and rope_scaling."""
    described = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(described, Mapping):
        raise InputError(f"{path}: rope_parameters is {shown(described)}, an object expected")
    kind = described.get("rope_type", described.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"{path}: RoPE of type {shown(kind)}, default, linear or llama3 expected")
    if described.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{path}: RoPE rotates only part of a head (partial_rotary_factor), which is not supported")
    rope = {}
    for source in (values, described):
        if source.get("rope_theta") is not None:
            rope["rope_theta"] = source["rope_theta"]
    if kind != "default":
        rope |= {"rope_scaling": kind, "rope_factor": described.get("factor")}
    if kind == "llama3":
        rope |= {ours: described.get(theirs) for theirs, ours in LLAMA3.items()}
    return rope


class _Tensors:
    """The tensors of a folder by their plain names, read one by one.

    Attributes:
        shapes: {name: shape}, before any is read.
    """

    def __init__(self, folder: Path, chosen: str | None) -> None:
        self._folder, files = folder, _files(folder, chosen)
        if all(path.suffix == ".safetensors" for path in files):
            from safetensors import SafetensorError, safe_open

            of = {}  # name in the file -> the open file that holds it
            for path in files:
                try:
                    opened = safe_open(str(path), framework="pt")
                    of |= dict.fromkeys(opened.keys(), opened)
                except (SafetensorError, OSError) as error:
                    raise InputError(f"{path}: no whole safetensors file ({first_line(error)})") from error
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name, opened in of.items()}
        else:
            content = {name: tensor for path in files for name, tensor in load_torch(path).items()}
            of = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
            shapes = {name: tuple(tensor.shape) for name, tensor in of.items()}
        names = plain_names(of, folder)
        self._of = {plain: (of[name], name) for plain, name in names.items()}
        self.shapes = {plain: shapes[name] for plain, name in names.items()}

    def read(self, name: str) -> Tensor:
        found, name = self._of[name]
        if isinstance(found, Tensor):
            return found
        from safetensors import SafetensorError

        try:
            return found.get_tensor(name)
        except SafetensorError as error:  # numbers of 4 or 6 bits, which torch lacks
            raise InputError(f"{self._folder}: {shown(name)} cannot be read ({first_line(error)})") from error


def _files(folder: Path, chosen: str | None) -> list[Path]:
    """The files that hold a folder's weights: the usual ones, else all files of the chosen one's numbered set.

    Raises:
        InputError: there are none, one is missing, or `chosen` is none of them.
    """
    files = next(filter(None, (_usual_files(folder, name) for name in ("model.safetensors", "pytorch_model.bin"))), [])
    if chosen is None and not files:
        raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin in it; weights expected")
    if chosen is None or folder / chosen in files:
        return files
    if files:
        raise InputError(f"{folder / chosen}: the weights of this folder are in {files[0].name}; give the folder")
    return files_of_set(folder / chosen)


def _usual_files(folder: Path, name: str) -> list[Path]:
    """The file that `save_pretrained` writes, or those that its index names; empty where there is neither."""
    path, index = folder / name, folder / f"{name}.index.json"
    if path.is_file():
        return [path]
    if not index.is_file():
        parts = sorted(folder.glob(f"{path.stem}-*-of-*{path.suffix}"))
        return files_of_set(parts[0]) if parts else []
    weight_map = read_json(index).get("weight_map")
    parts = weight_map.values() if isinstance(weight_map, dict) else []
    # A name with a folder in it would read from elsewhere.
    if not parts or not all(isinstance(part, str) and Path(part).name == part for part in parts):
        raise InputError(f"{index}: weight_map is no map from weights to files of this folder")
    names = sorted(set(parts))
    if missing := sorted(set(names) - {path.name for path in folder.iterdir()}):
        raise InputError(f"{folder}: {shown(missing[0])} is missing, of {len(names)} files of weights")
    return [folder / name for name in names]


# --------------------------------------------------------------------------------------------------------- writing


def save_transformers(
    folder: str | Path,
    weights: Weights,
    dtype: torch.dtype = torch.float32,
    generation: Mapping | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        folder: a new or an empty folder.
        dtype: of its weights.
        generation: its defaults for sampling, for generation_config.json.

    Raises:
        InputError: the folder is not empty or cannot be written, the tokenizer cannot be read, transformers cannot
            express the model, or a number is too large for F16.
    """
    from safetensors.torch import save

    config = weights.config
    check_expressible(config, folder, "config.json", EXPRESSED, {"rope_scaling": (None, "linear", "llama3")})
    kind = _kind(config, folder)
    in_order = kind in MIXTURES and MIXTURES[kind].pairs
    state_dict = dict(weights.state_dict) if in_order else reordered(weights.state_dict, config, in_halves)
    if config.tie_embeddings:
        state_dict.pop("output.weight")
    tensors = {
        transformers_name(name): tensor.to("cpu", torch.float32 if name.endswith("router.bias") else dtype)
        for name, tensor in state_dict.items()
    }
    if config.n_experts:
        tensors = written_experts(tensors, config, kind)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16:
            check_f16(name, tensor, folder)
    tokenizer = load_tokenizer(weights.tokenizer_path)
    ends = weights.all_ends(end_ids(tokenizer))
    if kind in BIASES_IN_ALL and config.qkv_bias:
        for layer in range(config.n_layers):
            tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(config.dim, dtype=dtype)
    with new_folder(folder) as temporary:
        export_tokenizer(weights, temporary)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        write_json(temporary / CONFIG, config_json(config, kind, dtype) | ids)
        write_json(temporary / "generation_config.json", ids | {"pad_token_id": ends[0], **(generation or {})})
        (temporary / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _kind(config: LMConfig, path: str | Path) -> str:
    """The model_type that computes the same; raises as `mixture_kind`."""
    if config.n_experts:
        return mixture_kind(config, path)
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def config_json(config: LMConfig, kind: str, dtype: torch.dtype) -> dict:
    """A config.json for versions 4 and 5 of transformers, and for programs that know only the older names."""
    rope = {"rope_theta": config.rope_theta, "rope_type": config.rope_scaling or "default"}
    if config.rope_scaling:
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope |= {theirs: getattr(config, ours) for theirs, ours in LLAMA3.items()}
    values = {
        "architectures": [ARCHITECTURES.get(kind)],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {key: rope[key] for key in rope if key != "rope_theta"} if config.rope_scaling else None,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return values | (mixture_json(config, kind) if config.n_experts else {})
