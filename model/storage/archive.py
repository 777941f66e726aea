"""Files of tensors that notice damage: `torch.save`'s format followed by a SHA-256.

`torch.load` checks no checksum, so a flipped bit passes for a weight. Here the file ends with

    MateConv sha256 {64 hexadecimal digits}\n

of everything before it, which `torch.load` and other readers of the format skip. A new file is read back before it
replaces the old one, and every byte is checked before anything is loaded.
"""

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from model.errors import InputError, first_line, shown
from model.storage.archive_checks import TRAILER_BYTES, check_records, check_tensors, named_tensors, other_kind
from model.storage.files import drop_from_cache, replacing

TRAILER_PREFIX, DIGEST_BYTES = b"MateConv sha256 ", 64

# What zipfile and torch.load raise for files that are damaged, truncated or forged.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError,
    TypeError, LookupError, AttributeError, OverflowError, NotImplementedError, AssertionError, MemoryError,
)  # fmt: skip


def save_torch(path: str | Path, content: Mapping) -> str:
    """`torch.save` that leaves either the old file or the new one, whatever happens, and reads the new one back.

    Returns:
        the SHA-256 at its end, hex.

    Raises:
        InputError: the file cannot be written, or reads back differently.
    """
    with replacing(path, needed=tensor_bytes(content), check=_read_back) as file:
        hashing = _HashingWriter(file)
        try:
            torch.save(content, hashing)
        except RuntimeError as error:  # torch's archive writer hides the system's error
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from error
        file.write(TRAILER_PREFIX + hashing.sha256.hexdigest().encode() + b"\n")
    return hashing.sha256.hexdigest()


class _HashingWriter:
    """Writes to a file and computes its SHA-256 on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _read_back(path: Path) -> None:
    drop_from_cache(path)
    if not digest_is_right(path):
        raise InputError(f"{path}: what was read back is not what was written; the disk is failing")


def recorded_digest(path: Path) -> str | None:
    """The SHA-256 at the end of a file, hex; None if it has none. Whether it is right: see `digest_is_right`."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TRAILER_BYTES))
        found = re.fullmatch(re.escape(TRAILER_PREFIX) + rb"([0-9a-f]{%d})\n" % DIGEST_BYTES, file.read())
    return found[1].decode() if found else None


def digest_is_right(path: Path) -> bool | None:
    """Whether a file's SHA-256 is the one at its end; None if it has none."""
    recorded = recorded_digest(path)
    if recorded is None:
        return None
    sha256, left = hashlib.sha256(), path.stat().st_size - TRAILER_BYTES
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            sha256.update(block)
            left -= len(block)
    return sha256.hexdigest() == recorded


def load_torch(path: str | Path, own: bool = False, mmap: bool = False) -> dict:
    """`torch.load(weights_only=True)` onto the CPU, after every byte was checked against the file's SHA-256.

    Files of other programs, which have none, are checked against the checksums of their zip records.

    Args:
        own: the file must have a SHA-256, as all files written by this program do.
        mmap: map the tensors into memory, where they are read from the file when they are used.

    Raises:
        InputError: the file is missing, truncated, damaged, not a dict, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, a file expected' if path.is_dir() else 'no such file'}")
    try:
        _check_bytes(path, own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch does not write
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # its text advises loading unsafely; what it found is enough
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {shown(found[1])[1:-1]}" if found else "its pickle is damaged, or not by torch.save"
        raise InputError(f"{path}: expected tensors and plain values only ({reason}); it is not loaded") from error
    except DAMAGE as error:
        reason = first_line(error)
        raise InputError(f"{path}: truncated, damaged or not a PyTorch file ({reason}); use an older file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    check_tensors(content, path)
    return content


def _check_bytes(path: Path, own: bool) -> None:
    """Check that a file is an archive as torch writes it, and that no byte has changed since."""
    if kind := other_kind(path):
        raise InputError(f"{path}: it is {kind}")
    right = digest_is_right(path)
    if right is False:
        raise InputError(f"{path}: damaged (its SHA-256 is not the one at its end); use an older file")
    if right is None and own:
        raise InputError(f"{path}: damaged (its end, where its SHA-256 should be, is missing); use an older file")
    check_records(path)
    if right is None:
        with zipfile.ZipFile(path) as archive:
            if wrong := archive.testzip():
                raise InputError(f"{path}: damaged (the checksum of {shown(wrong)} is wrong); use an older file")


def tensor_bytes(content) -> int:
    """Bytes of all tensors in `content`; those that share a storage count once."""
    storages = (tensor.untyped_storage() for _, tensor in named_tensors(content))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def is_finite(content) -> bool:
    """Whether no floating-point number in `content` is NaN or infinite. Numbers that torch cannot add, such as float8,
    are refused too: no file of ours holds them."""
    floats = (tensor for _, tensor in named_tensors(content) if tensor.is_floating_point())
    try:
        return all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in floats)  # a sum is faster
    except NotImplementedError:
        return False
