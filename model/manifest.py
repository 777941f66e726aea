"""The manifest of a token file: `X.json` beside `X.bin` says what is inside."""

import hashlib
import json
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from model.errors import InputError
from model.files import write_json

FORMAT_VERSION = 1


@dataclass
class Manifest:
    """What lies in a token file; stored beside `X.bin` as `X.json`."""

    dtype: str  # "uint16" or "uint32", little-endian
    vocab_size: int  # ids are below this
    bos_id: int
    eos_id: int
    tokens: int
    documents: int
    tokenizer_sha256: str
    encoder: str  # the library and version that made the ids
    sha256: str  # of the token file itself
    sources: list[dict] = field(default_factory=list)  # [{"name": "corpus.jsonl", "size": bytes}, …]
    processing: dict = field(default_factory=dict)  # options and statistics of optimized_data_processing.py
    format_version: int = FORMAT_VERSION


def manifest_path(token_path: str | Path) -> Path:
    """`X.bin` -> `X.json`."""
    return Path(token_path).with_suffix(".json")


def ends_path(token_path: str | Path) -> Path:
    """`X.bin` -> `X.ends`: where each document ends, in tokens."""
    return Path(token_path).with_suffix(".ends")


def write_manifest(token_path: str | Path, manifest: Manifest) -> None:
    """Write the manifest beside the token file, replacing an older one in one step."""
    write_json(manifest_path(token_path), asdict(manifest))


def read_manifest(token_path: str | Path) -> Manifest | None:
    """Read the manifest beside a token file; None where there is none.

    Raises:
        InputError: the file is not JSON, lacks a field, or was written by a newer version.
    """
    path = manifest_path(token_path)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version")
            raise InputError(f"{path}: format_version is {found!r}, this program reads {FORMAT_VERSION}")
        values.setdefault("processing", {})  # not in the first manifests
        for name, kind in typing.get_type_hints(Manifest).items():
            if not isinstance(values[name], typing.get_origin(kind) or kind):
                raise TypeError(f"{name} is {values[name]!r}")
        return Manifest(**{f.name: values[f.name] for f in fields(Manifest)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest of a token file ({error!r}); make it again with the .bin") from error


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
