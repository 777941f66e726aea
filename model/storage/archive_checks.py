"""Checks of a `.pth` file before torch reads it, and of the tensors that come out of it.

`torch.load(weights_only=True)` runs no code from a file. But it unpacks a record to a thousand times its size, and may
return ten billion numbers over a storage of four. So the archive's directory is checked first, the tensors afterwards.
"""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from model.errors import InputError, shown
from model.storage.slices import SlicedTensors

MAX_PICKLE_BYTES = 16 << 20  # a checkpoint's values without its tensors take a few hundred kB
MAX_DIRECTORY_BYTES = 16 << 20  # 100,000 tensors
TRAILER_BYTES = 81  # what our own files have after the archive
HEADER_BYTES = 30  # a record's header, without its name
END_BYTES = 22  # the record that ends an archive
END_64_BYTES = 56 + 20  # the two records before it in an archive of 4 GB or more

# torch lets a pickle make zeros of any length by this; the only way to name it that torch reads.
MAKES_BYTES = re.compile(rb"c(?:builtins|__builtin__)\nbytearray\n")

SAVE_AGAIN = "load it where it was made, and save its state_dict() with torch.save"
KINDS = {  # other files that pass for weights, by their first bytes
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": "torch's format before version 1.6; convert it with"
    " torch.save(torch.load(OLD, weights_only=True), NEW)",
    b"\x80": f"a bare pickle, which could run code; {SAVE_AGAIN}",
    b"\x93NUMPY": f"an array of NumPy; {SAVE_AGAIN}",
    b"\x89HDF": f"an HDF5 file, as Keras writes; {SAVE_AGAIN}",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, which only names the file; fetch that with git lfs pull",
    b"<": "a web page or other markup; download the file itself",
}


# ------------------------------------------------------------------------------------------------------- the file


def other_kind(path: Path) -> str | None:
    """The kind of a file that is no zip archive, and what to do with it; None if unknown."""
    with open(path, "rb") as file:
        start = file.read(262)
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "a safetensors file; name it model.safetensors, beside its config.json, and give that folder"
    if start[257:262] == b"ustar":
        return f"a tar archive, of several files or of torch before version 0.2; unpack it, or {SAVE_AGAIN}"
    return next((kind for magic, kind in KINDS.items() if start.startswith(magic)), None)


def check_records(path: Path) -> None:
    """Check a zip archive's directory: every record is uncompressed, lies within the file, and overlaps no other, as in
    archives that torch writes.

    Raises:
        InputError: torch writes no such archive.
        zipfile.BadZipFile: it is damaged, or two readers could find different records in it.
    """
    with open(path, "rb") as file:
        start = _directory(file)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            problem = _problem_of_records(records) or _problem_of_pickle(archive)
        if problem:
            raise InputError(f"{path}: expected tensors and plain values only ({problem}); it is not loaded")
        end = 0
        for record in sorted(records, key=lambda record: record.header_offset):
            if record.header_offset < end or (end == 0 and record.header_offset > 0):
                raise zipfile.BadZipFile("its records lie over each other, or something precedes them")
            file.seek(record.header_offset + HEADER_BYTES - 4)
            name, extra = _number(file.read(2)), _number(file.read(2))
            end = record.header_offset + HEADER_BYTES + name + extra + record.file_size
        if end > start:
            raise zipfile.BadZipFile("its records are not where its directory says")


def _problem_of_pickle(archive: zipfile.ZipFile) -> str | None:
    """Why what describes the tensors could take any amount of memory; None if it cannot."""
    pickled = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
    return "it names bytearray" if MAKES_BYTES.search(archive.read(pickled)) else None


def _directory(file: BinaryIO) -> int:
    """Where an archive's directory begins, which is unambiguous: the records that end the file follow it at once."""
    size = os.fstat(file.fileno()).st_size
    for end in (size - END_BYTES, size - END_BYTES - TRAILER_BYTES):
        file.seek(max(0, end - END_64_BYTES))
        last = file.read(END_64_BYTES + END_BYTES)
        before, last = last[:-END_BYTES], last[-END_BYTES:]
        if last.startswith(b"PK\5\6") and last.endswith(b"\0\0"):  # without a comment
            length, start = _number(last[12:16]), _number(last[16:20])
            if before.startswith(b"PK\6\6") and before[56:60] == b"PK\6\7":
                end -= END_64_BYTES
                if _number(before[64:72]) != end:
                    break
                length, start = _number(before[40:48]), _number(before[48:56])
            if start + length != end:
                break
            if length > MAX_DIRECTORY_BYTES:
                raise zipfile.BadZipFile(
                    f"its directory has {length:,} bytes, at most {MAX_DIRECTORY_BYTES:,} expected"
                )
            return start
    raise zipfile.BadZipFile("it is cut off, or something follows the archive")


def _number(content: bytes) -> int:
    return int.from_bytes(content, "little")


def _problem_of_records(records: list[zipfile.ZipInfo]) -> str | None:
    """Why torch did not write these records; None if it could have."""
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            return f"the record {shown(record.filename)} is compressed to {record.compress_size:,} bytes"
        if record.flag_bits & 1:
            return f"the record {shown(record.filename)} is encrypted"
    names = [record.filename for record in records]
    sizes = {name.partition("/")[2]: record.file_size for name, record in zip(names, records, strict=True)}
    if len({name.partition("/")[0] for name in names}) != 1 or len(sizes) < len(records):
        return "its records are not in one folder, each under its own name"
    if "constants.pkl" in sizes:
        return f"it is a TorchScript archive, which holds a program; {SAVE_AGAIN}"
    if "data.pkl" not in sizes:
        return f"there is no data.pkl in it, but {shown(names[0])}"
    if sizes["data.pkl"] > MAX_PICKLE_BYTES:
        return f"data.pkl has {sizes['data.pkl']:,} bytes, at most {MAX_PICKLE_BYTES:,} expected"
    return None


# ---------------------------------------------------------------------------------------------------- the tensors


def named_tensors(content) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and tuples, once, with the keys that lead to it: "model.norm.weight".

    Of `SlicedTensors` come the slices, as they are stored.
    """
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:  # a pickle can hold a list that holds itself
            continue
        if isinstance(value, SlicedTensors):
            yield from value.stored()
        elif isinstance(value, Tensor):
            seen.add(id(value))
            yield name, value
        elif isinstance(value, Mapping | list | tuple):
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += reversed([(f"{name}.{key}".removeprefix(".")[-100:], inner) for key, inner in items])


def check_tensors(content, path: str | Path) -> None:
    """Check that every loaded tensor is a plain one that lies within its storage.

    Args:
        content: nested dicts, lists and tuples, as `torch.load` returned them.

    Raises:
        InputError: naming the first tensor that is not.
    """
    for name, tensor in named_tensors(content):
        if problem := tensor_problem(tensor):
            raise InputError(f"{path}: the tensor {shown(name)} {problem}; it is not used")


def tensor_problem(tensor: Tensor) -> str | None:
    """Why a tensor from a file is not used; None if it is."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        return "is no dense tensor"
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > held:
        return f"has {tensor.numel():,} numbers, its storage {held:,}"
    return None
