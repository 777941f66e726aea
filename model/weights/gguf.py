"""GGUF, llama.cpp's format: shape, weights and tokenizer in one file. The library `gguf` writes it.

The architectures llama and granitemoe pair neighbouring numbers of a head for RoPE, as we do; the others pair the two
halves. Quantised matrices are read as float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, first_line, shown
from model.LMConfig import EXPERT_FIELDS, LMConfig
from model.model import rope_frequencies
from model.storage.files import files_of_set, replacing
from model.storage.gguf_header import GGUFFile, Refused, StoredTensor, Value, single_value
from model.text.gguf_tokenizer import write_tokenizer
from model.text.tokenization import tokenizer_folder, tokenizer_sha256
from model.weights.expert_layouts import without_zeros
from model.weights.gguf_experts import (
    MODULES,
    TENSORS,
    check_attention_scale,
    mixture_architecture,
    read_mixture,
    with_zeros,
    write_mixture,
)
from model.weights.names import Names, in_halves, in_pairs, read_state_dict, reordered
from model.weights.shapes import COMMON, LLAMA3_FIELDS, check_expressible, check_f16, read_shape, require_fields
from model.weights.tokenizer_copy import check_links
from model.weights.weights import Weights

if TYPE_CHECKING:
    import gguf

MATRIX_TYPES = ("F32", "F16", "BF16", "Q8_0")  # written; others are only read
IN_HALVES = {  # the supported architectures
    "llama": False, "qwen2": True, "qwen3": True, "granitemoe": False, "qwen3moe": True, "glm4moe": True,
}  # fmt: skip
MOST_LAYERS = 512  # llama.cpp's limit
ROPE_TENSOR = "rope_freqs.weight"
# layers.0.attention.wq.weight -> blk.0.attn_q.weight
gguf_name = Names(
    "blk",
    {
        "tok_embeddings": "token_embd",
        "attention_norm": "attn_norm",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
        "norm": "output_norm",
        "output": "output",
    }
    | MODULES,
    TENSORS,
)
EXPRESSED = (*COMMON, "head_dim", "norm_eps", "rope_theta", *LLAMA3_FIELDS, "tie_embeddings", "qk_norm", "qkv_bias")
EXPRESSED += (*EXPERT_FIELDS,)


def names_of(architecture: str) -> Names:
    """The names that an architecture's files have for our weights."""
    if architecture != "glm4moe":
        return gguf_name
    return gguf_name._replace(modules=gguf_name.modules | {"ffn_norm": "post_attention_norm"})


# --------------------------------------------------------------------------------------------------------- reading


def load_gguf(path: str | Path) -> Weights:
    """Read a GGUF file. Any part of a split file stands for all of them.

    `tokenizer_path` of the result is the file itself, or its first part, which holds the tokenizer.

    Raises:
        InputError: the file is damaged, a part is missing, or the model's architecture is not supported.
    """
    paths = files_of_set(Path(path))
    try:
        fields, tensors = _joined([GGUFFile(part) for part in paths], Path(path))
        return _weights(fields, tensors, paths[0])
    except Refused as error:
        raise InputError(f"{path}: {error}") from error


def _joined(files: list[GGUFFile], path: Path) -> tuple[Mapping[str, Value], Mapping[str, StoredTensor]]:
    """The values in the first part, which are those of the model, and the tensors of all parts."""
    for number, file in enumerate(files):
        count, own = (single_value(file.fields, f"split.{key}", int) for key in ("count", "no"))
        if (count or 1, own or 0) != (len(files), number):
            claim = f"its header says that it is part {(own or 0) + 1} of {count or 1}, its name part {number + 1}"
            raise InputError(f"{path}: {claim} of {len(files)}; give the parts their own names, one folder for all")
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if len(tensors) != sum(len(file.tensors) for file in files):
        raise InputError(f"{path}: a tensor is in two of its {len(files)} parts")
    return files[0].fields, tensors


def _weights(fields: Mapping[str, Value], tensors: Mapping[str, StoredTensor], path: Path) -> Weights:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    factors = shapes.pop(ROPE_TENSOR, None) and _dequantised(tensors[ROPE_TENSOR], path)
    architecture, config = _config(fields, shapes, factors, path)

    def read(name: str) -> Tensor:
        return _dequantised(tensors[name], path)

    state_dict, config = read_state_dict(config, names_of(architecture), shapes, read, path)
    if architecture == "glm4moe":
        state_dict, config = without_zeros(state_dict, config)
    if IN_HALVES[architecture]:
        state_dict = reordered(state_dict, config, in_pairs)
    has_tokenizer = "tokenizer.ggml.tokens" in fields
    begins_with_bos = True
    if has_tokenizer:
        added = single_value(fields, "tokenizer.ggml.add_bos_token", bool)
        begins_with_bos = single_value(fields, "tokenizer.ggml.model", str) == "llama" if added is None else added
    return Weights(
        state_dict,
        config,
        str(path) if has_tokenizer else None,
        tokenizer_sha256(path) if has_tokenizer else None,
        begins_with_bos=begins_with_bos,
    )


def _config(fields: Mapping, shapes: Mapping[str, tuple], factors: Tensor | None, path: Path) -> tuple[str, LMConfig]:
    architecture = single_value(fields, "general.architecture", str)
    if architecture not in IN_HALVES:
        raise InputError(f"{path}: architecture {shown(architecture)}, one of {', '.join(IN_HALVES)} expected")

    def value(key: str, kind: type, default=None):
        found = single_value(fields, f"{architecture}.{key}", kind)
        return default if found is None else found

    heads = value("attention.head_count", int)
    head_dim = value("attention.key_length", int)
    embedding = shapes.get("token_embd.weight", (None, None))
    for key in ("attention.value_length", "rope.dimension_count"):
        own = head_dim or (embedding[-1] // heads if embedding[-1] and heads else None)
        if value(key, int, own) != own:
            raise InputError(f"{path}: {architecture}.{key} is {value(key, int)}, {own} expected, a head's width")
    window, max_seq_len = value("attention.sliding_window", int), value("context_length", int)
    found = {
        "dim": value("embedding_length", int),
        "n_layers": value("block_count", int),
        "n_heads": heads,
        "n_kv_heads": value("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": embedding[0],
        "hidden_dim": value("feed_forward_length", int),
        "norm_eps": _shortest(value("attention.layer_norm_rms_epsilon", float)),
        "max_seq_len": min(window, max_seq_len) if window and max_seq_len else max_seq_len,
        "rope_theta": _shortest(value("rope.freq_base", float, 10000.0)),
        "tie_embeddings": "output.weight" not in shapes,
        "qk_norm": "blk.0.attn_q_norm.weight" in shapes,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
    }
    found |= read_mixture(architecture, value, shapes, path)
    require_fields(found, [name for name in found if name != "head_dim"], path)
    factor = value("rope.scaling.factor", float, value("rope.scale_linear", float, 0.0))  # the latter is an older key
    is_scaled = factor not in (0.0, 1.0)
    scaling = value("rope.scaling.type", str, "linear" if is_scaled else "none")  # llama.cpp's default
    if scaling == "linear" and is_scaled and factors is not None:
        raise InputError(f"{path}: RoPE scaled by {factor:g} and by {ROPE_TENSOR}, one of them expected")
    if scaling == "linear":
        found |= {"rope_scaling": "linear", "rope_factor": _shortest(factor or 1.0)}
    elif scaling != "none" and factors is None:
        raise InputError(f"{path}: RoPE of type {shown(scaling)}, linear or Llama 3's expected")
    config = read_shape(found, path)
    if config.n_experts:
        check_attention_scale(value("attention.scale", float, 0.0), config.head_dim, path)
    return architecture, config if factors is None else _llama3(config, fields, factors, path)


def _shortest(number: float | None) -> float | None:
    """The shortest decimal of a float32: 1e-05, which the file's 9.999999747378752e-06 was."""
    return None if number is None else float(str(np.float32(number)))


def _llama3(config: LMConfig, fields: Mapping, factors: Tensor, path: Path) -> LMConfig:
    """The shape with the llama3 scaling that yields these factors, which are all that GGUF stores.

    Our files store the scaling's settings too; for other files those of Llama 3.1 to 3.3 are tried.
    """
    kinds = (float, float, float, int)
    own = [single_value(fields, f"mateconv.{key}", kind) for key, kind in zip(LLAMA3_FIELDS, kinds, strict=True)]
    own = [_shortest(number) if isinstance(number, float) else number for number in own]
    usual = [[factor, 1.0, 4.0, 8192] for factor in (8.0, 32.0)]
    for values in [own] if None not in own else usual:
        shape = vars(config) | {"rope_scaling": "llama3"} | dict(zip(LLAMA3_FIELDS, values, strict=True))
        tried = read_shape(shape, path)
        wanted = rope_factors(tried)
        if wanted.shape == factors.shape and torch.allclose(wanted, factors.float(), rtol=1e-5, atol=0):
            return tried
    raise InputError(f"{path}: {ROPE_TENSOR} holds factors that are not Llama 3's; such models are not supported")


def rope_factors(config: LMConfig) -> Tensor:
    """The divisor of each pair's frequency, float32 [head_dim / 2]."""
    plain = read_shape(vars(config) | {"rope_scaling": None}, "rope_scaling")
    return rope_frequencies(plain) / rope_frequencies(config)


def _dequantised(tensor: StoredTensor, path: Path) -> Tensor:
    """A tensor as float32; stored float16 and bfloat16 stay what they are."""
    import gguf

    kept = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
    if tensor.kind in kept:
        return torch.from_numpy(np.array(tensor.rows)).view(kept[tensor.kind]).view(tensor.shape)
    try:
        numbers = gguf.quants.dequantize(tensor.rows, tensor.kind)
    except (NotImplementedError, ValueError, KeyError) as error:
        found = f"{shown(tensor.name)} is stored as {tensor.kind.name}"
        raise InputError(f"{path}: {found}, which cannot be read ({first_line(error)})") from error
    return torch.from_numpy(np.array(numbers, dtype=np.float32)).view(tensor.shape)


# --------------------------------------------------------------------------------------------------------- writing


def save_gguf(path: str | Path, weights: Weights, kind: str = "F32") -> list[str]:
    """Write a GGUF file that llama.cpp reads, with the tokenizer.

    Args:
        kind: type of the matrices, one of MATRIX_TYPES; norms, biases and routers are always F32. Q8_0 needs rows of a
            multiple of 32 numbers; a matrix with other rows is written as F16.

    Returns:
        a line for each difference in how llama.cpp tokenizes; usually none.

    Raises:
        InputError: llama.cpp cannot express the model or its tokenizer, a number is too large for F16, or the file
            cannot be written.
    """
    import gguf

    path, config = Path(path), weights.config
    architecture, folder = _architecture(config, path), tokenizer_folder(weights.tokenizer_path)
    check_links(folder)
    with replacing(path) as file:
        writer = gguf.GGUFWriter(file.name, architecture)  # opens the file again
        _write_shape(writer, config, kind, path.stem)
        if config.n_experts:
            write_mixture(writer, config, architecture)
        remarks = write_tokenizer(writer, folder, config.vocab_size, weights.begins_with_bos, weights.chat)
        if config.rope_scaling == "llama3":
            writer.add_tensor(ROPE_TENSOR, rope_factors(config).numpy())
        names = names_of(architecture)
        for name, tensor in _to_write(weights, architecture).items():
            numbers = tensor.detach().to("cpu", torch.float32).contiguous()
            whole = numbers.ndim == 1 or name.endswith("router.weight")
            chosen = gguf.GGMLQuantizationType["F32" if whole else kind]
            if chosen == gguf.GGMLQuantizationType.Q8_0 and numbers.shape[-1] % 32:
                chosen = gguf.GGMLQuantizationType.F16
            if chosen == gguf.GGMLQuantizationType.F16:
                check_f16(name, numbers, path)
            writer.add_tensor(names(name), gguf.quants.quantize(numbers.numpy(), chosen), raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return remarks


def _architecture(config: LMConfig, path: Path) -> str:
    """The architecture of llama.cpp that computes the same.

    Raises:
        InputError: there is none.
    """
    check_expressible(config, path, "GGUF", EXPRESSED, {"rope_scaling": (None, "linear", "llama3")})
    if config.n_experts:
        name = mixture_architecture(config, path)
    else:
        name = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    problems = []
    if config.qk_norm and config.qkv_bias and not config.n_experts:
        problems.append("qk_norm with qkv_bias")
    if name == "qwen2" and config.n_heads * config.head_dim != config.dim:  # it makes queries of dim numbers
        problems.append(
            f"qkv_bias with head_dim {config.head_dim} (only dim / n_heads = {config.dim / config.n_heads:g})"
        )
    if IN_HALVES[name] and config.rope_scaling == "llama3":  # it reads no rope_freqs for them
        reason = f"experts as {name}" if config.n_experts else "qk_norm" if config.qk_norm else "qkv_bias"
        problems.append(f"{reason} with rope_scaling llama3")
    if config.n_layers > MOST_LAYERS:
        problems.append(f"n_layers {config.n_layers:,} (at most {MOST_LAYERS})")
    if problems:
        raise InputError(
            f"{path}: llama.cpp has no architecture for {', '.join(problems)}; a folder of transformers can"
        )
    return name


def _to_write(weights: Weights, architecture: str) -> dict[str, Tensor]:
    """The weights with heads in the architecture's order; a tied matrix once."""
    halves = IN_HALVES[architecture]
    state_dict = reordered(weights.state_dict, weights.config, in_halves) if halves else dict(weights.state_dict)
    if architecture == "glm4moe":
        state_dict = with_zeros(state_dict, weights.config)
    if weights.config.tie_embeddings:
        state_dict.pop("output.weight")
    return state_dict


def _write_shape(writer: "gguf.GGUFWriter", config: LMConfig, kind: str, name: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.expert_hidden_dim if config.n_experts else config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
    elif config.rope_scaling == "llama3":
        for key in LLAMA3_FIELDS:
            value = getattr(config, key)
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"mateconv.{key}", value)
