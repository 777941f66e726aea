"""Loads tokenizers, hashes them, and turns text into ids; no text ever yields a control token."""

import contextlib
import hashlib
import logging
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError
from model.LMConfig import MOST_TOKENS
from model.storage.gguf_header import is_gguf
from model.text.encoder import TextEncoder, check_growth, library_errors
from model.text.gguf_tokenizer import unpacked_tokenizer
from model.text.plain_tokenizer import CONTROL, PlainTokenizer
from model.text.tokenizer_folder import check_added, check_sizes, open_backend, read_ends, read_object

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
EMBEDDED_TOKENIZER = Path(__file__).parents[1] / "tokenizer"
# Files beside tokenizer.json and tokenizer_config.json in which transformers finds parts of a tokenizer.
OTHER_PARTS = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Delimiters:
    """The control tokens around a document: `<bos> ids <eos>`, or `ids <eos>` without a bos, as in Qwen 2 and later."""

    bos_id: int | None
    eos_id: int

    @property
    def count(self) -> int:
        """Control tokens per document."""
        return 1 if self.bos_id is None else 2

    @property
    def opening(self) -> list[int]:
        """Ids before a document's text."""
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def before_text(self) -> int:
        """The id that precedes a document's text in a token file: its bos, else the eos of the previous document."""
        return self.eos_id if self.bos_id is None else self.bos_id


def load_tokenizer(path: str | Path | None = None):
    """Load a tokenizer folder as a `transformers` fast tokenizer; None takes the embedded one.

    Downloads nothing and runs no code from the folder. The ids are those of its `tokenizer.json`, whatever class
    `tokenizer_config.json` names: another version of transformers may not know that class, or may build another
    tokenizer from the same vocabulary (5.0 with DeepSeek's). The folder must name an eos token, which ends each
    document; a bos token is optional.

    Raises:
        InputError: the folder is missing, its `tokenizer.json` is missing or damaged, or it names no eos token.
    """
    folder = tokenizer_file(path).parent
    config = _read_config(folder)
    with _loading(folder):
        check_added(folder)  # in tokenizer.json itself: transformers adds these tokens to what it opens

    from transformers import PreTrainedTokenizerFast  # slow to import: only where a tokenizer is used

    with library_errors(f"tokenizer_path: {folder} cannot be loaded"), _without_warnings():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, **_names_without_type(config)
        )
    _check(folder, tokenizer.backend_tokenizer)
    unnamed = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None and name not in config]
    if unnamed:
        _take_names_of_class(tokenizer, folder, unnamed)
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer_path: {folder} names no eos_token; add one to its tokenizer_config.json")
    # We encode whole books at once, so the library's warning about the model's maximum length is noise.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def open_tokenizer(path: str | Path | None = None):
    """`load_tokenizer` for training and generating; of the embedded tokenizer, and of those that are trained here, a
    `PlainTokenizer`, which gives the same without transformers.

    Raises:
        InputError: as `load_tokenizer`.
    """
    return _plain_tokenizer(tokenizer_file(path).parent) or load_tokenizer(path)


def _plain_tokenizer(folder: Path) -> PlainTokenizer | None:
    """A folder's tokenizer, if it is configured as the embedded one is; the chat template may differ."""
    config, embedded = _read_config(folder), _read_config(EMBEDDED_TOKENIZER)
    template = config.get("chat_template")
    if config | {"chat_template": None} != embedded | {"chat_template": None} or not isinstance(template, str | None):
        return None
    if any((folder / name).exists() for name in OTHER_PARTS):
        return None
    try:
        backend = open_backend(folder)
    except InputError:  # `load_tokenizer` says why
        return None
    _check(folder, backend)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return PlainTokenizer(folder, backend, config) if {config[name] for name in CONTROL} <= special else None


def _read_config(folder: Path) -> dict:
    with _loading(folder):
        check_sizes(folder)
        return read_object(folder, "tokenizer_config.json")


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Name the setting in the errors of what reads a tokenizer's folder."""
    try:
        yield
    except InputError as error:
        raise InputError(f"tokenizer_path: {folder} cannot be loaded ({error})") from error


def _names_without_type(config: dict) -> dict[str, str]:
    """The control tokens written as `{"content": "</s>", …}`, which transformers reads only with a "__type"."""
    given = {f"{name}_token": config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    bare = {name: token for name, token in given.items() if isinstance(token, dict) and "__type" not in token}
    return {name: token["content"] for name, token in bare.items() if isinstance(token.get("content"), str)}


def _check(folder: Path, backend) -> None:
    last = max(backend.get_vocab().values(), default=-1)
    if last >= MOST_TOKENS:
        raise InputError(f"tokenizer_path: {folder} holds the id {last:,}, at most {MOST_TOKENS - 1:,} expected")
    try:
        check_growth(backend.normalizer, backend.decoder)
    except InputError as error:
        raise InputError(f"tokenizer_path: {folder} cannot be used: {error}") from error


def _take_names_of_class(tokenizer, folder: Path, names: Sequence[str]) -> None:
    """Take over control tokens that only the tokenizer's class names: GPT-2's folder names neither bos nor eos."""
    from transformers import AutoTokenizer

    try:
        with library_errors("no such class"), _without_warnings():
            named = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except InputError:  # transformers does not know the class
        return
    for name in names:
        token = getattr(named, name)
        if tokenizer.backend_tokenizer.token_to_id(str(token)) is not None:
            setattr(tokenizer, name, token)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' warning that a folder names another class than the one loaded."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def delimiters(tokenizer) -> Delimiters:
    """The control tokens around documents in the token files of a `transformers` tokenizer."""
    return Delimiters(tokenizer.bos_token_id, tokenizer.eos_token_id)


def end_ids(tokenizer) -> list[int]:
    """Ids that end a text: the eos, and those that `generation_config.json` beside the tokenizer names.

    Raises:
        InputError: that file is damaged, or names an id that the tokenizer lacks.
    """
    if not tokenizer.name_or_path:  # built in memory
        return [tokenizer.eos_token_id]
    return read_ends(Path(tokenizer.name_or_path), tokenizer.eos_token_id, vocabulary_size(tokenizer))


@dataclass(frozen=True)
class BulkTokenizer:
    """The parts of a tokenizer that data processing needs."""

    encoder: TextEncoder
    bos_id: int | None
    eos_id: int
    vocab_size: int  # the largest id plus one
    end_ids: tuple[int, ...]  # that end a text, the eos first; a text that spells out their tokens yields none

    @property
    def json(self) -> str:
        """The tokenizer.json of the encoder, in which control tokens have secret names."""
        return self.encoder.json

    @property
    def delimiters(self) -> Delimiters:
        return Delimiters(self.bos_id, self.eos_id)


def named_template(path: str | Path | None = None) -> str | None:
    """The chat template in a folder's `tokenizer_config.json`; None where none is there, or another file may beat it.

    Imports no transformers, unlike `load_tokenizer(path).chat_template`.
    """
    folder = tokenizer_file(path).parent
    if (folder / "chat_template.jinja").exists() or (folder / "additional_chat_templates").exists():
        return None
    template = _read_config(folder).get("chat_template")
    return template if isinstance(template, str) else None


def load_bulk_tokenizer(path: str | Path | None = None) -> BulkTokenizer:
    """Load a tokenizer folder for data processing.

    Does not import transformers, which takes seconds, where tokenizer.json and the names of bos and eos are enough.

    Raises:
        InputError: as `load_tokenizer`.
    """
    file = tokenizer_file(path)
    config = _read_config(file.parent)
    plain = config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    names = [config.get("bos_token"), config.get("eos_token")]
    if plain and all(isinstance(name, str) for name in names):
        with _loading(file.parent):
            backend = open_backend(file.parent)
            check_added(file.parent, backend)
        _check(file.parent, backend)
        bos_id, eos_id = map(backend.token_to_id, names)
        if bos_id is not None and eos_id is not None:
            size = max(backend.get_vocab().values()) + 1
            ends = read_ends(file.parent, eos_id, size)
            encoder = TextEncoder(backend.to_str(), {*names, *filter(None, map(backend.id_to_token, ends))})
            return BulkTokenizer(encoder, bos_id, eos_id, size, tuple(ends))
    tokenizer = load_tokenizer(path)
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id
    return BulkTokenizer(text_encoder(tokenizer), *ids, vocabulary_size(tokenizer), tuple(end_ids(tokenizer)))


def tokenizer_sha256(path: str | Path | None = None) -> str:
    """SHA-256 (hex) of the folder's `tokenizer.json`.

    Raises:
        InputError: the folder is missing or holds no `tokenizer.json`.
    """
    return hashlib.sha256(tokenizer_file(path).read_bytes()).hexdigest()


def tokenizer_folder(path: str | Path | None = None) -> Path:
    """The folder of a tokenizer: None is the embedded one; a GGUF file's is unpacked into the cache.

    Raises:
        InputError: the file is damaged, or its kind of tokenizer is unsupported.
    """
    folder = Path(path or EMBEDDED_TOKENIZER)
    return unpacked_tokenizer(folder) if folder.is_file() and is_gguf(folder) else folder


def tokenizer_file(path: str | Path | None) -> Path:
    """The `tokenizer.json` of a tokenizer, as `tokenizer_folder` finds it.

    Raises:
        InputError: the folder is missing or holds none; or as `tokenizer_folder`.
    """
    folder = tokenizer_folder(path)
    if not folder.is_dir():
        raise InputError(f"tokenizer_path: no folder {folder}; give the folder where its tokenizer.json is now")
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer_path: {folder} holds no tokenizer.json, which a fast tokenizer's folder must have")
    return folder / "tokenizer.json"


def vocabulary_size(tokenizer) -> int:
    """Rows that the embedding needs: the largest id plus one (added tokens can lie past `vocab_size`)."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without bos and eos. A control token that a text spells out stays text.

    Raises:
        InputError: the tokenizer fails on a text, or takes too long.
    """
    return text_encoder(tokenizer).encode(texts)


def text_encoder(tokenizer) -> TextEncoder:
    """The encoder of a `transformers` fast tokenizer, built on first use."""
    return _parts(tokenizer)[0]


def control_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that are no text, such as `<s>` and `</s>`."""
    return _parts(tokenizer)[1]


def _parts(tokenizer) -> tuple[TextEncoder, frozenset[int]]:
    """A tokenizer's encoder and control ids; rebuilt once the tokenizer has more tokens."""
    made_of = (len(tokenizer), tokenizer.bos_token, tokenizer.eos_token)
    known_of, parts = _PARTS.get(tokenizer, (None, None))
    if known_of != made_of:
        ends = end_ids(tokenizer)
        names = [tokenizer.bos_token, *tokenizer.convert_ids_to_tokens(ends)]
        encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), list(filter(None, names)))
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        parts = encoder, frozenset({*special, *tokenizer.all_special_ids, *ends})
        _PARTS[tokenizer] = made_of, parts
    return parts


_PARTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer -> (its state then, its parts)


def is_byte_level(tokenizer) -> bool:
    """Whether the tokens are spelled in GPT-2's byte alphabet (byte-level BPE)."""
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and "ByteLevel" in repr(decoder)


def is_byte_fallback(tokenizer) -> bool:
    """Whether characters without a token are spelled in tokens like `<0xE4>`, one a byte, as SentencePiece does."""
    backend = tokenizer.backend_tokenizer
    return "ByteFallback" in repr(backend.decoder) and backend.token_to_id("<0x61>") is not None


def byte_value(token: str) -> int | None:
    """The byte that a token like `<0xE4>` stands for; None for other tokens."""
    return int(token[3:5], 16) if BYTE_TOKEN.fullmatch(token) else None
