"""The layout of a token file: ours and nanoGPT's have no header, llm.c's has one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import InputError
from model.token_file.manifest import Manifest

# Of llm.c and modded-nanogpt: 256 little-endian int32, the first three are magic, version and the number of tokens.
HEADER_BYTES = 1024
HEADERS = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}  # magic: (version, dtype); GPT-2's, Llama 3's


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens are in a file, and their dtype."""

    dtype: np.dtype  # little-endian
    offset: int  # bytes before the first
    count: int
    origin: str  # whose format this is, for the user


def find_layout(path: Path, manifest: Manifest | None) -> TokenLayout:
    """The layout that a file's manifest or header describes; with neither, MiniMind's and nanoGPT's.

    Raises:
        InputError: its size contradicts its manifest or header.
    """
    size = path.stat().st_size
    if manifest is not None:
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        if size != manifest.tokens * dtype.itemsize:
            raise InputError(
                f"{path}: {size:,} bytes, but its manifest says {manifest.tokens:,} tokens of {dtype.itemsize}"
                " bytes; make it again with optimized_data_processing.py"
            )
        return TokenLayout(dtype, 0, manifest.tokens, "MateConv's")
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(12), "<i4", count=min(3, size // 4))  # magic, version, tokens
    if len(header) and int(header[0]) in HEADERS:
        return _behind_header(path, size, header)
    if size % 2:
        raise InputError(f"{path}: {size:,} bytes and no manifest; uint16 tokens need an even number")
    return TokenLayout(np.dtype("<u2"), 0, size // 2, "MiniMind's and nanoGPT's headerless uint16")


class FileShortened(InputError):
    """A token file is shorter than when it was opened; what was read of it before is right."""


def refuse_shortened(path: Path, mapped: np.memmap) -> None:
    """Refuse a file that is shorter than its memory map, before the map is read: past the file's end a read would kill
    the process with a bus error (SIGBUS). It costs one system call, about a microsecond.

    Raises:
        FileShortened: it was shortened after it was opened, or its disk no longer answers.
    """
    expected = mapped.offset + mapped.nbytes
    try:
        size = mapped.base.size()  # of the file as it is now, which the map keeps open
    except OSError as error:
        raise FileShortened(
            f"{path}: can no longer be read ({error.strerror}); check its disk, then --resume"
        ) from error
    if size < expected:
        raise FileShortened(
            f"{path}: {size:,} bytes found, {expected:,} when it was opened: another program shortened it meanwhile;"
            " restore the file, then --resume"
        )


def _behind_header(path: Path, size: int, header: np.ndarray) -> TokenLayout:
    magic = int(header[0])
    expected, dtype = HEADERS[magic]
    begins = f"{path}: begins as a token file of llm.c does (magic {magic})"
    if size < HEADER_BYTES:
        raise InputError(f"{begins}, but has {size:,} bytes, fewer than the header's {HEADER_BYTES:,}; copy it again")
    version, count = int(header[1]), int(header[2])
    if version != expected:
        raise InputError(f"{begins}, but its version is {version}, expected {expected}")
    if count < 0 or size != HEADER_BYTES + count * dtype.itemsize:
        raise InputError(
            f"{begins}, but has {size:,} bytes where the header's {count:,} tokens of {dtype.itemsize} bytes take"
            f" {HEADER_BYTES + count * dtype.itemsize:,}; copy it again"
        )
    return TokenLayout(dtype, HEADER_BYTES, count, f"llm.c's {dtype.name} behind a header")
