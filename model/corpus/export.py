"""Token files for other trainers: what Megatron and nanotron need beside one to read the same tokens.

Beside every token file `X.bin` lies `X.ends`: little-endian uint64, the exclusive end of each document in tokens. Both
formats are made from it and the token file itself; nothing is encoded again.
"""

import contextlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from model.errors import InputError
from model.storage.files import remove_abandoned, replacing, temporary_path
from model.text.tokenization import tokenizer_folder, tokenizer_sha256
from model.token_file.manifest import Manifest, ends_path, manifest_path, read_manifest

BLOCK = 1 << 20  # documents in memory at a time: 8 MiB an array
COPY_BYTES = 16 << 20
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {"uint16": 8, "uint32": 4}  # 4 is int32: Megatron has no uint32, and below 2^31 the bytes are equal
UNKNOWN_TOKENIZER = "Unknown Tokenizer"  # datatrove's words
REMAKE = "make it again with optimized_data_processing.py"


def export_megatron(token_path: str | Path, say: Callable[[str], None]) -> list[Path]:
    """Write `X.idx` beside `X.bin`: Megatron's indexed dataset, each document one sequence. Its data path is then `X`.

    The format is that of Megatron-LM's megatron/core/datasets/indexed_dataset.py, version 1.

    Args:
        token_path: the token file.
        say: prints one line for the user.

    Returns:
        the file that was written.

    Raises:
        InputError: a file is missing, the files do not belong together, or ids may exceed Megatron's int32.
    """
    token_path = Path(token_path)
    manifest = checked_manifest(token_path)
    if manifest.dtype == "uint32" and manifest.vocab_size > 1 << 31:
        raise InputError(
            f"{token_path}: ids may go up to {manifest.vocab_size - 1:,} (vocab_size), but Megatron reads int32, which"
            " ends below 2,147,483,648; use a tokenizer with fewer ids, or export for nanotron"
        )
    index, item_bytes = token_path.with_suffix(".idx"), np.dtype(manifest.dtype).itemsize
    with replacing(index) as file:
        file.write(MEGATRON_MAGIC)
        file.write(struct.pack("<QB", 1, MEGATRON_DTYPES[manifest.dtype]))  # version, dtype
        file.write(struct.pack("<QQ", manifest.documents, manifest.documents + 1))  # sequences, document starts
        for starts, ends in _documents(token_path):
            file.write((ends - starts).astype("<i4").tobytes())
        for starts, _ in _documents(token_path):
            file.write((starts * item_bytes).astype("<i8").tobytes())
        for start in range(0, manifest.documents + 1, BLOCK):
            file.write(np.arange(start, min(start + BLOCK, manifest.documents + 1), dtype="<i8").tobytes())
    say(
        f"Megatron: wrote {index}, {manifest.documents:,} documents; the data path is {token_path.with_suffix('')}"
        f" (vocab size {manifest.vocab_size:,}, eos {manifest.eos_id})"
    )
    _warn_of_chats(manifest, say)
    return [index]


def export_nanotron(
    token_path: str | Path, say: Callable[[str], None], tokenizer_path: str | Path | None = None
) -> list[Path]:
    """Write `X.ds`, `X.ds.index` and `X.ds.metadata` beside `X.bin`: datatrove's tokenized file, which nanotron reads.

    `X.ds` is a hard link to `X.bin` if the file system supports it, else a copy. The format is that of datatrove's
    src/datatrove/pipeline/tokens/tokenizer.py (`TokenizedFile`).

    Args:
        token_path: the token file.
        say: prints one line for the user.
        tokenizer_path: folder of the tokenizer that made the file; None: the embedded one, if it did. Its absolute path
            goes into the metadata, from which nanotron loads it.

    Returns:
        the files that were written.

    Raises:
        InputError: a file is missing, the files do not belong together, or another tokenizer made them.
    """
    token_path = Path(token_path)
    manifest = checked_manifest(token_path)
    name = _tokenizer_name(token_path, manifest, tokenizer_path)
    tokens, index, metadata = (token_path.with_suffix(suffix) for suffix in (".ds", ".ds.index", ".ds.metadata"))
    with replacing(index) as file, open(ends_path(token_path), "rb") as ends:
        shutil.copyfileobj(ends, file, COPY_BYTES)
        tokens.unlink(missing_ok=True)  # it is made last: a crash leaves no tokens with another file's index
    with replacing(metadata) as file:
        lines = [f"{name}|{np.dtype(manifest.dtype).itemsize}", str(manifest.tokens), _in_words(manifest.tokens)]
        file.write("\n".join(lines).encode("utf-8"))
    kind = _link_or_copy(token_path, tokens)
    say(f"nanotron: wrote {tokens} ({kind} of {token_path.name}), {index.name} and {metadata.name}")
    if name == UNKNOWN_TOKENIZER:
        say(f"nanotron: write the path of the tokenizer's folder into {metadata}, before the |: nanotron loads it")
    _warn_of_chats(manifest, say)
    return [tokens, index, metadata]


def _warn_of_chats(manifest: Manifest, say: Callable[[str], None]) -> None:
    if manifest.chat:
        say("warning: the format cannot say which tokens are learned: whoever reads it learns the questions too")


def checked_manifest(token_path: Path) -> Manifest:
    """Check that a token file is whole and that its document ends belong to it; returns its manifest.

    Raises:
        InputError: they do not.
    """
    if token_path.suffix != ".bin":
        is_ours = manifest_path(token_path).is_file()
        remedy = "rename it, its .json stays" if is_ours else "optimized_data_processing.py makes one"
        raise InputError(f"{token_path}: expected a token file named .bin, as Megatron does; {remedy}")
    ends = ends_path(token_path)
    for path in (token_path, manifest_path(token_path), ends):
        if not path.is_file():
            raise InputError(f"{path}: no such file; a token file needs its .json and its .ends; {REMAKE}")
    manifest = read_manifest(token_path)
    if manifest.dtype not in MEGATRON_DTYPES:
        raise InputError(f"{manifest_path(token_path)}: dtype is {manifest.dtype!r}, expected uint16 or uint32")
    size, expected = token_path.stat().st_size, manifest.tokens * np.dtype(manifest.dtype).itemsize
    if size != expected:
        raise InputError(f"{token_path}: {size:,} bytes, but its manifest's tokens take {expected:,}; {REMAKE}")
    size, expected = ends.stat().st_size, manifest.documents * 8
    if size != expected:
        raise InputError(f"{ends}: {size:,} bytes, but its manifest's documents take {expected:,}; {REMAKE}")
    if not expected:
        raise InputError(f"{token_path}: holds no document, so there is nothing to export")
    last, seen = 0, 0
    for block_starts, block_ends in _documents(token_path):
        lengths = block_ends - block_starts
        wrong = np.flatnonzero((lengths <= 0) | (lengths >= 1 << 31))  # Megatron's lengths are int32
        if len(wrong):
            at = int(wrong[0])
            found = f"document {seen + at + 1:,} goes from token {block_starts[at]:,} to {block_ends[at]:,}"
            raise InputError(f"{ends}: {found}; expected increasing ends, less than 2^31 apart; {REMAKE}")
        last, seen = int(block_ends[-1]), seen + len(block_ends)
    if last != manifest.tokens:
        raise InputError(f"{ends}: the last document ends at token {last:,} of {manifest.tokens:,}; {REMAKE}")
    return manifest


def _documents(token_path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Starts and ends of the documents in tokens, int64 [≤ BLOCK] each, block after block."""
    with open(ends_path(token_path), "rb") as file:
        before = np.zeros(1, dtype=np.int64)
        while block := file.read(BLOCK * 8):
            ends = np.frombuffer(block, dtype="<i8")  # an end of 2^63 or more is negative, and refused as such
            yield np.concatenate([before, ends[:-1]]), ends
            before = ends[-1:]


def _tokenizer_name(token_path: Path, manifest: Manifest, tokenizer_path: str | Path | None) -> str:
    """The absolute path of the tokenizer's folder; UNKNOWN_TOKENIZER if none is given and it is not the embedded one.

    Raises:
        InputError: the given tokenizer did not make the token file.
    """
    folder = tokenizer_folder(tokenizer_path).resolve()
    if (found := tokenizer_sha256(folder)) == manifest.tokenizer_sha256:
        return str(folder)
    if tokenizer_path is None:
        return UNKNOWN_TOKENIZER
    raise InputError(
        f"tokenizer_path: {folder} (sha256 {found[:12]}…) did not make {token_path}, whose tokenizer has"
        f" {manifest.tokenizer_sha256[:12]}…; give that one"
    )


def _link_or_copy(source: Path, target: Path) -> str:
    """Give `source` a second name, or copy it if the file system cannot; returns which of the two."""
    remove_abandoned(target)
    temporary = temporary_path(target)
    with contextlib.suppress(OSError):
        os.link(os.path.realpath(source), temporary)  # of a link, its target
        os.replace(temporary, target)
        return "a hard link"
    temporary.unlink(missing_ok=True)
    with replacing(target) as file, open(source, "rb") as tokens:
        shutil.copyfileobj(tokens, file, COPY_BYTES)
    return "a copy"


def _in_words(count: int) -> str:
    """Three digits with an SI prefix, "24.9 MT", as `humanize.metric(count, unit="T")`, which datatrove writes."""
    exponent = len(str(count)) - 1
    for _ in range(2):  # again if rounding adds a digit: 999,999 is 1.00 M
        scaled, digits = count / 1000 ** (exponent // 3), 2 - exponent % 3
        if round(scaled, digits) < 10 ** (exponent % 3 + 1):
            break
        exponent += 1
    return f"{scaled:.{digits}f} {' kMGTPE'[exponent // 3].strip()}T"
