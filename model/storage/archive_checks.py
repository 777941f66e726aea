"""What a `.pth` file must be before torch may read it, and what must be true of the tensors that come out of it.

`torch.load(weights_only=True)` runs no code from a file. But it unpacks a record to a thousand times its size, returns
tensors of ten billion numbers over a storage of four, and what its error says of a forged size depends on its version.
So a file is looked through first, without making anything that it asks for.
"""

import dataclasses
import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError, first_line, shown
from model.LMConfig import LMConfig
from model.training.settings import parse_value

MAX_PICKLE_BYTES = 16 << 20  # the values of a checkpoint without its tensors take a few hundred KB
MAX_SIDECAR_BYTES = 1 << 16
LOCAL_HEADER = 30  # bytes of a record's header in a zip file, before its name
END_RECORD = 22  # bytes of the record that ends a zip file
TRAILER = 81  # bytes that a checkpoint of ours has after that
ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1,
}  # fmt: skip
# What tensors and plain values are made of. No layouts but strided ones, no subclasses, nothing that runs.
ACCEPTED = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"), ("torch.storage", "UntypedStorage"), *(("torch", name) for name in ITEM_BYTES),
}  # fmt: skip


# What torch does not write: it looks names up elsewhere, or reserves as much memory as it asks for.
REFUSED = {code[0] for code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)}


class _Refused(Exception):
    """Why a file is not read; the message is the reason."""


# ------------------------------------------------------------------------------------------------------- the file


def check_archive(path: str | Path) -> None:
    """See that a file is an archive as torch writes them, and asks for nothing but tensors and plain values.

    Every record is stored as it is, lies where the archive says and over no other, and their sizes add up to no more
    than the file's. Its pickle names only what `ACCEPTED` lists, and no storage claims more than its record holds.

    Raises:
        InputError: with what was found.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            _check_pickle(archive, _check_records(file, archive, path))
    except _Refused as error:
        raise InputError(f"{path}: expected tensors and plain values only ({error}); it is not loaded") from error
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"{path}: truncated, damaged or not a PyTorch file ({first_line(error)}); use an older file"
        ) from (error)


def _check_records(file, archive: zipfile.ZipFile, path: Path) -> dict[str, int]:
    """Look at the archive's directory; the size of each record, by its name within the one folder that there is."""
    size, records = os.fstat(file.fileno()).st_size, archive.infolist()
    end = {file.seek(size - back) and file.read(4) for back in (END_RECORD, END_RECORD + TRAILER) if back <= size}
    if b"PK\x05\x06" not in end:  # two readers could find different directories in such a file
        raise zipfile.BadZipFile("the archive does not end where the file ends")
    names = [record.filename for record in records]
    if len(set(names)) < len(names):
        raise _Refused(f"the record {shown(next(n for n in names if names.count(n) > 1))} is there twice")
    folder = names[0].split("/")[0] if names else ""
    starts = {}  # of each record's bytes, which its own header comes before
    taken = []  # (first byte, byte after the last) of each record with its header
    for record in records:
        name = record.filename
        if not name.startswith(f"{folder}/") or ".." in name.split("/") or "\\" in name or name.endswith("/"):
            raise _Refused(f"a record is called {shown(name)}")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise _Refused(f"the record {shown(name)} is compressed to {record.compress_size:,} bytes")
        if record.flag_bits & 1:
            raise _Refused(f"the record {shown(name)} is encrypted")
        file.seek(record.header_offset)
        header = file.read(LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        inner = name[len(folder) + 1 :]
        starts[inner] = record.header_offset + LOCAL_HEADER + lengths
        taken.append((record.header_offset, starts[inner] + record.file_size))
    taken.sort()
    if not taken or taken[0][0] != 0 or taken[-1][1] > archive.start_dir:
        raise zipfile.BadZipFile("its records are not where its directory says")
    if any(end > start for (_, end), (start, _) in zip(taken, taken[1:], strict=False)):
        raise _Refused("its records lie over each other")
    torchs = torch._C.PyTorchFileReader(str(path))  # torch has a reader of its own: both must see the same archive
    if starts != {name: torchs.get_record_offset(name) for name in torchs.get_all_records()}:
        raise zipfile.BadZipFile("its directory can be read in two ways")
    return {record.filename[len(folder) + 1 :]: record.file_size for record in records}


def _check_pickle(archive: zipfile.ZipFile, sizes: Mapping[str, int]) -> None:
    """Go through the archive's pickle without making what it names."""
    if "data.pkl" not in sizes:
        raise zipfile.BadZipFile("there is no data.pkl in it")
    if sizes["data.pkl"] > MAX_PICKLE_BYTES:
        raise _Refused(f"data.pkl has {sizes['data.pkl']:,} bytes, at most {MAX_PICKLE_BYTES:,} expected")
    name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
    try:
        _Scan(archive.read(name), sizes).load()
    except (_Refused, MemoryError):
        raise
    except Exception as error:  # whatever a pickle that is damaged, or none, makes Python's unpickler raise
        raise zipfile.BadZipFile(f"data.pkl: {first_line(error)}") from error


class _Inert:
    """Stands for what a pickle names or makes; can be called, filled and given a state, and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments) -> "_Inert":
        return _Inert(f"{self.name}()")

    def __setitem__(self, key, value) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


class _Scan(pickle._Unpickler):  # the one in Python, not in C: a memo index or a length without end costs no memory
    """Reads a pickle for what it names and for the storages that it asks for; makes neither."""

    dispatch = {code: read for code, read in pickle._Unpickler.dispatch.items() if code not in REFUSED}

    def __init__(self, content: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> _Inert:
        if (module, name) not in ACCEPTED:
            raise _Refused(f"it names {shown(f'{module}.{name}')[1:-1]}")
        return _Inert(name)

    def persistent_load(self, wanted) -> _Inert:
        kind, storage, key, _, elements = wanted
        bytes_each = ITEM_BYTES.get(getattr(storage, "name", None))
        record = self._sizes.get(f"data/{key}")
        if kind != "storage" or bytes_each is None or record is None or type(elements) is not int:
            raise _Refused(f"it asks for {shown(wanted)}")
        if not 0 <= elements * bytes_each <= record:
            raise _Refused(f"the storage {shown(key)} claims {elements:,} numbers, its record has {record:,} bytes")
        return _Inert("storage")


# ---------------------------------------------------------------------------------------------------- the tensors


def check_tensors(content, path: str | Path) -> None:
    """See that every tensor in a value that was loaded is a plain one, and lies within its storage.

    Args:
        content: nested dicts, lists and tuples, as `torch.load` returned them.

    Raises:
        InputError: naming the first tensor that is not.
    """
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            if problem := tensor_problem(value):
                raise InputError(f"{path}: the tensor {shown(name.removeprefix('.'))} {problem}; it is not used")
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # a pickle can hold a list that holds itself
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{key}"[-100:], inner) for key, inner in items]


def tensor_problem(tensor: Tensor) -> str | None:
    """Why a tensor from a file is not used; None where it is."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        return "is no dense tensor"
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > held:
        return f"has {tensor.numel():,} numbers, its storage {held:,}"
    offset, shape, strides = tensor.storage_offset(), tensor.shape, tensor.stride()
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tensor.numel() and not (0 <= offset and min(strides, default=0) >= 0 and last < held):
        return f"reaches from {offset:,} to {last:,} in a storage of {held:,} numbers"
    return None


# ------------------------------------------------------------------------------------------------------- the shape


def read_shape(values, path: str | Path) -> LMConfig:
    """The LMConfig that a file holds as a dict, with every value of the right kind and within the limits of settings.

    Raises:
        InputError: naming the file and every value that is wrong.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: config is {shown(values)}, the fields of a model's shape expected")
    problems, parsed = [], {}
    known = {field.name for field in dataclasses.fields(LMConfig)}
    for name, value in values.items():
        if name not in known:
            problems.append(f"config.{shown(str(name))[1:-1]} is unknown")
            continue
        try:
            parsed[name] = parse_value(name, value)
            if (isinstance(value, str) and name != "rope_scaling") or (value is None and name == "vocab_size"):
                raise ValueError("a number")
        except ValueError as error:
            problems.append(f"config.{name}: {shown(value)} found, {error} expected")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems[:5])}")
    try:
        return LMConfig(**parsed)
    except InputError as error:
        raise InputError(f"{path}: config: {error}") from error


def read_sidecar(path: str | Path) -> tuple[LMConfig, str | None, str | None, bool]:
    """What lies beside weights, `{stem}.json`: the shape, the tokenizer's folder and its SHA-256, and whether texts
    begin with its bos.

    Raises:
        InputError: it is no such file, or holds what no shape or tokenizer has.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SIDECAR_BYTES + 1)
        if len(content) > MAX_SIDECAR_BYTES:
            raise ValueError(f"over {MAX_SIDECAR_BYTES:,} bytes")
        described = json.loads(content)
        config, *tokenizer = (described[key] for key in ("config", "tokenizer_path", "tokenizer_sha256"))
        if any(value is not None and not isinstance(value, str) for value in tokenizer):
            raise TypeError(f"tokenizer {tokenizer!r}")
        begins_with_bos = described.get("begins_with_bos", True)  # earlier versions knew nothing else
        if not isinstance(begins_with_bos, bool):
            raise TypeError(f"begins_with_bos {begins_with_bos!r}")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = shown(f"{type(error).__name__}: {error}")[1:-1]
        raise InputError(f"{path}: does not describe weights ({reason}); without it the shapes are read") from error
    return read_shape(config, path), *tokenizer, begins_with_bos


def weight_shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a `Transformer` of this shape has, without making one."""
    dim, hidden_dim, head_dim = config.dim, config.hidden_dim, config.head_dim
    of_a_layer = {
        "attention.wq": (config.n_heads * head_dim, dim), "attention.wk": (config.n_kv_heads * head_dim, dim),
        "attention.wv": (config.n_kv_heads * head_dim, dim), "attention.wo": (dim, config.n_heads * head_dim),
        "feed_forward.w1": (hidden_dim, dim), "feed_forward.w2": (dim, hidden_dim),
        "feed_forward.w3": (hidden_dim, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
    }  # fmt: skip
    if config.qk_norm:
        of_a_layer |= {"attention.q_norm": (head_dim,), "attention.k_norm": (head_dim,)}
    of_a_layer = {f"{name}.weight": shape for name, shape in of_a_layer.items()}
    if config.qkv_bias:
        of_a_layer |= {f"attention.{n}.bias": of_a_layer[f"attention.{n}.weight"][:1] for n in ("wq", "wk", "wv")}
    shapes = {f"layers.{n}.{name}": shape for n in range(config.n_layers) for name, shape in of_a_layer.items()}
    embedding = (config.vocab_size, dim)
    return shapes | {"tok_embeddings.weight": embedding, "output.weight": embedding, "norm.weight": (dim,)}


def check_shapes(state_dict: Mapping[str, Tensor], config: LMConfig, path: str | Path) -> None:
    """See that weights are those of a model of this shape, before memory is taken for one.

    Raises:
        InputError: naming what is missing, too much, or of another shape.
    """
    layers = {str(key).split(".")[1] for key in state_dict if str(key).startswith("layers.")}
    if len(layers) != config.n_layers:
        raise InputError(f"{path}: holds {len(layers):,} layers, its description says n_layers {config.n_layers:,}")
    wanted = weight_shapes(config)
    missing, others = wanted.keys() - state_dict.keys(), state_dict.keys() - wanted.keys()
    if missing or others:
        found = " and ".join(
            f"{title} {shown(min(map(str, keys)))}{f' ({len(keys)} such)' if len(keys) > 1 else ''}"
            for title, keys in (("no", missing), ("an unknown", others))
            if keys
        )
        raise InputError(f"{path}: {found} inside; these are not the weights that its description is of")
    for key, shape in wanted.items():
        if not isinstance(state_dict[key], Tensor):
            raise InputError(f"{path}: {key} is {shown(state_dict[key])}, a tensor expected")
        found = tuple(state_dict[key].shape)
        if found != shape:
            raise InputError(f"{path}: {key} is {shown(found)}, by its description {shown(shape)} expected")
        if not state_dict[key].is_floating_point():
            raise InputError(f"{path}: {key} holds {state_dict[key].dtype}, floating-point numbers expected")
