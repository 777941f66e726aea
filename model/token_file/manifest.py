"""The manifest of a token file: `X.json` describes the `X.bin` beside it."""

import hashlib
import json
import os
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from model.errors import InputError, shown
from model.storage.files import write_json

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20  # a source takes some 400 of them
MOST_SOURCES = 500_000  # files of a corpus that a manifest has room for
MOST_TOKENS = 2**63 - 1


@dataclass
class Manifest:
    """What a token file holds; stored beside `X.bin` as `X.json`."""

    dtype: str  # "uint16" or "uint32", little-endian
    vocab_size: int  # ids are below this
    bos_id: int | None  # None: documents are `ids <eos>`
    eos_id: int
    tokens: int
    documents: int
    tokenizer_sha256: str
    encoder: str  # library and version that encoded the texts
    sha256: str  # of the token file itself
    sources: list[dict] = field(default_factory=list)  # [{"name": "corpus.jsonl", "size": bytes}, …]
    processing: dict = field(default_factory=dict)  # options and statistics of optimized_data_processing.py
    format_version: int = FORMAT_VERSION
    # Of chats: learn_sha256 and ends_sha256 (hex, of X.learn and X.ends; the first files lack the latter), learned
    # (tokens), turns (answers), template_sha256 (hex), and end_ids (that end an answer, ascending); and pairs, true
    # where every two documents are a pair of answers to one question, the chosen and the rejected one. Empty: texts.
    chat: dict = field(default_factory=dict)


def manifest_path(token_path: str | Path) -> Path:
    """`X.bin` -> `X.json`."""
    return Path(token_path).with_suffix(".json")


def ends_path(token_path: str | Path) -> Path:
    """`X.bin` -> `X.ends`: where each document ends, in tokens."""
    return Path(token_path).with_suffix(".ends")


def learn_path(token_path: str | Path) -> Path:
    """`X.bin` -> `X.learn`: which tokens of chats are learned, one byte a token, 1 or 0."""
    return Path(token_path).with_suffix(".learn")


def write_manifest(token_path: str | Path, manifest: Manifest) -> None:
    """Write the manifest beside the token file, replacing an older one in one step."""
    write_json(manifest_path(token_path), asdict(manifest))


def read_manifest(token_path: str | Path) -> Manifest | None:
    """Read the manifest beside a token file; None where there is none.

    Raises:
        InputError: the file is not JSON, lacks a field, holds an impossible value, or was written by a newer version.
    """
    path = manifest_path(token_path)
    if not os.path.lexists(path):
        return None
    again = "make it again with the .bin"
    if not os.path.isfile(path):  # without a manifest the tokens could be read as the wrong dtype
        raise InputError(f"{path}: the manifest of a token file expected, found no plain file; {again}")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
        if len(content) > MAX_MANIFEST_BYTES:
            raise InputError(f"{path}: over {MAX_MANIFEST_BYTES:,} bytes, too long for a manifest; {again}")
        values = json.loads(content)
        if not isinstance(values, dict):
            raise InputError(f"{path}: the manifest of a token file expected, found other JSON; {again}")
        version = values.get("format_version")
        if version != FORMAT_VERSION or version is True:
            raise InputError(f"{path}: format_version is {shown(version)}, this program reads {FORMAT_VERSION}")
        for added_later in ("processing", "chat"):
            values.setdefault(added_later, {})
        problems = manifest_problems(values)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not the manifest of a token file ({shown(str(error))}); {again}") from error
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}; {again}")
    return Manifest(**{f.name: values[f.name] for f in fields(Manifest)})


def manifest_problems(values: dict) -> list[str]:
    """Every field that is missing or has an impossible value."""
    problems = []
    for name, hint in typing.get_type_hints(Manifest).items():
        kind = typing.get_origin(hint) or hint
        if kind is types.UnionType:
            kind = typing.get_args(hint)[0]
            if values.get(name, "") is None:
                continue
        if name not in values:
            problems.append(f"{name} is missing")
        elif type(values[name]) is not kind:
            problems.append(f"{name} is {shown(values[name])}, expected {kind.__name__}")
        elif kind is int and not 0 <= values[name] <= MOST_TOKENS:
            problems.append(f"{name} is {shown(values[name])}, expected 0 to {MOST_TOKENS}")
    if not problems and values["dtype"] not in ("uint16", "uint32"):
        problems.append(f"dtype is {shown(values['dtype'])}, expected uint16 or uint32")
    for name in ("bos_id", "eos_id"):
        if not problems and values[name] is not None and values[name] >= values["vocab_size"]:
            problems.append(f"{name} is {values[name]}, expected an id below vocab_size {values['vocab_size']}")
    if not problems and values["chat"]:
        problems += _chat_problems(values["chat"], values["vocab_size"])
        if values["chat"].get("pairs") and values["documents"] % 2:
            problems.append(f"documents is {values['documents']}, expected an even number, since they are pairs")
    return problems


def _chat_problems(chat: dict, vocab_size: int) -> list[str]:
    """Every field of a manifest's `chat` that is missing or has an impossible value."""
    kinds = {"learn_sha256": str, "learned": int, "turns": int, "template_sha256": str, "end_ids": list}
    kinds |= {"ends_sha256": str} if "ends_sha256" in chat else {}
    problems = [
        f"chat.{name} is {shown(chat.get(name))}, expected {kind.__name__}"
        for name, kind in kinds.items()
        if type(chat.get(name)) is not kind or (kind is int and not 0 <= chat[name] <= MOST_TOKENS)
    ]
    ends = chat.get("end_ids")
    if not problems and not all(type(index) is int and 0 <= index < vocab_size for index in ends):
        problems.append(f"chat.end_ids is {shown(ends)}, expected ids below vocab_size {vocab_size}")
    if chat.get("pairs", True) is not True:
        problems.append(f"chat.pairs is {shown(chat['pairs'])}, expected true, or none")
    return problems


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
