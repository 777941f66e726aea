"""Loading a tokenizer, telling two of them apart, and turning text into ids without ever making a control token."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import InputError

EMBEDDED_TOKENIZER = Path(__file__).parent / "tokenizer"
MOST_TOKENS = 2**24  # rows of an embedding; the largest tokenizers have a quarter of a million


def load_tokenizer(path: str | Path | None = None):
    """Load a tokenizer folder as a `transformers` fast tokenizer; None takes the embedded one.

    Nothing is downloaded and no code from the folder is run. The tokenizer must name a bos and an eos token:
    documents are stored as `<bos> ids <eos>`.

    Raises:
        InputError: the folder is missing, holds no `tokenizer.json`, or names no bos or eos token.
    """
    folder = _tokenizer_file(path).parent

    from transformers import AutoTokenizer  # takes seconds to import: only where a tokenizer is used

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise plain Exception, KeyError, OSError … for a damaged file
        reason = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {reason[0][:200] if reason else 'no reason'}"
        raise InputError(f"tokenizer_path: {folder} cannot be loaded ({why})") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        kind = type(tokenizer).__name__
        raise InputError(f"tokenizer_path: {folder} is a {kind}, a fast tokenizer expected (tokenizer.json)")
    if (tokens := vocabulary_size(tokenizer)) > MOST_TOKENS:
        raise InputError(f"tokenizer_path: {folder} holds the id {tokens - 1:,}, at most {MOST_TOKENS - 1:,} expected")
    for name in ("bos", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise InputError(f"tokenizer_path: {folder} names no {name}_token; add one to its tokenizer_config.json")
    # Whole books are encoded at once; the library's warning about the model's maximum length says nothing here.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


@dataclass(frozen=True)
class BulkTokenizer:
    """What data processing needs of a tokenizer."""

    json: str  # of the `tokenizers` library
    bos_id: int
    eos_id: int
    vocab_size: int  # the largest id plus one


def load_bulk_tokenizer(path: str | Path | None = None) -> BulkTokenizer:
    """Load a tokenizer folder for data processing.

    Where transformers would add nothing to tokenizer.json but the names of the control tokens, it is not imported,
    which takes seconds.

    Raises:
        InputError: as `load_tokenizer`.
    """
    file = _tokenizer_file(path)
    try:
        config = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
        plain = config["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")
        names = [config["bos_token"], config["eos_token"]]
    except (OSError, ValueError, KeyError, TypeError):
        plain, names = False, []
    if plain and all(isinstance(name, str) for name in names):
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise InputError(f"tokenizer_path: {file.parent} cannot be loaded ({str(error).strip()})") from error
        bos_id, eos_id = map(backend.token_to_id, names)
        if bos_id is not None and eos_id is not None:
            return BulkTokenizer(backend.to_str(), bos_id, eos_id, max(backend.get_vocab().values()) + 1)
    tokenizer = load_tokenizer(path)
    return BulkTokenizer(
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        vocabulary_size(tokenizer),
    )


def tokenizer_sha256(path: str | Path | None = None) -> str:
    """SHA-256 (hex) of the folder's `tokenizer.json`: equal for two tokenizers that give the same ids.

    Raises:
        InputError: the folder is missing or holds no `tokenizer.json`.
    """
    return hashlib.sha256(_tokenizer_file(path).read_bytes()).hexdigest()


def tokenizer_folder(path: str | Path | None = None) -> Path:
    """The folder of a tokenizer: None is the embedded one; that inside a GGUF file is unpacked into the cache.

    Raises:
        InputError: the file is damaged, or its tokenizer is of a kind that is not known.
    """
    folder = Path(path or EMBEDDED_TOKENIZER)
    if folder.suffix == ".gguf" and folder.is_file():
        from model.formats.gguf_file import unpacked_tokenizer  # which needs the library gguf

        return unpacked_tokenizer(folder)
    return folder


def _tokenizer_file(path: str | Path | None) -> Path:
    folder = tokenizer_folder(path)
    if not folder.is_dir():
        raise InputError(
            f"tokenizer_path: no folder {folder}; give a folder with a tokenizer.json, or null for the embedded one"
        )
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer_path: {folder} holds no tokenizer.json, which a fast tokenizer's folder must have")
    return folder / "tokenizer.json"


def vocabulary_size(tokenizer) -> int:
    """Number of rows that the embedding needs: the largest id plus one (added tokens can lie past `vocab_size`)."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without bos and eos. A control token that a text spells out literally stays text.

    All texts go to the tokenizer's Rust threads in one call, without offsets (`encode_batch_fast`).
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True  # "</s>" in a text becomes ordinary bytes
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def token_byte_lengths(tokenizer) -> np.ndarray:
    """UTF-8 bytes that each id stands for, int32 [vocabulary_size]; 0 for control tokens.

    With them a loss in nats a token becomes bits per byte, which compares across tokenizers. Exact for byte-level
    BPE, where a token is written with one character a byte; for other kinds, the length of the token's own text.
    """
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    byte_level = is_byte_level(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            text = token if byte_level else tokenizer.decode([index])
            lengths[index] = len(text) if byte_level else len(text.encode("utf-8", "replace"))
    return lengths


def is_byte_level(tokenizer) -> bool:
    """Whether the tokens are spelled in GPT-2's byte alphabet (byte-level BPE)."""
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and "ByteLevel" in repr(decoder)
