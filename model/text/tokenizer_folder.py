"""Reads tokenizer folders as plain values, and compares two of them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import InputError, first_line, shown
from model.storage.files import read_json
from model.text.encoder import library_errors

MOST_BYTES = {  # limit of each file that we or transformers read
    "tokenizer.json": 512 << 20,  # with 262,144 tokens it has 33 MB
    "tokenizer_config.json": 64 << 20,  # with a thousand added tokens it has 200 kB
    "added_tokens.json": 64 << 20,
    "special_tokens_map.json": 16 << 20,
    "generation_config.json": 1 << 20,  # a few hundred bytes are usual
    "chat_template.jinja": 1 << 20,  # the longest, with tools, have thirty thousand
}


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer and its control tokens, as plain values.

    Attributes:
        tokenizer: `tokenizer.json`, spelled as the installed `tokenizers` library spells it.
        special_ids: ids of those of "bos", "eos", "unk" and "pad" that the folder names; "eos" is always there.
        end_ids: the ids that end a text, the eos first.
        chat_template: None where there is none.
    """

    tokenizer: dict
    special_ids: dict[str, int]
    end_ids: list[int]
    chat_template: str | None


def same_tokenizer(folder: str | Path, other: str | Path) -> bool:
    """Whether two tokenizer folders give the same ids, the same control tokens, ends and chat template.

    Ignores the tokens that a post-processor adds, which this project never asks for.

    Raises:
        InputError: one of them cannot be read.
    """

    def compared(path: str | Path) -> TokenizerFolder:
        found = read_folder(path)
        return replace(found, tokenizer=found.tokenizer | {"post_processor": None}, end_ids=sorted(found.end_ids))

    return compared(folder) == compared(other)


def read_folder(folder: str | Path) -> TokenizerFolder:
    """Read tokenizer.json and tokenizer_config.json, and chat_template.jinja and generation_config.json if present.

    Raises:
        InputError: a file is missing or damaged, two contradict each other, or none names an eos.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: a folder with a tokenizer.json expected")
    check_sizes(folder)
    backend = open_backend(folder)
    check_added(folder, backend)
    config = read_object(folder, "tokenizer_config.json")
    special_ids = _special_ids(backend, config, folder)
    ends = read_ends(folder, special_ids["eos"], max(backend.get_vocab().values()) + 1)
    return TokenizerFolder(json.loads(backend.to_str()), special_ids, ends, _chat_template(config, folder))


def read_ends(folder: Path, eos_id: int, size: int) -> list[int]:
    """Ids that end a text: the eos, then those in the folder's generation_config.json, if it has one.

    Instruct models list several there (`eos_token_id`, a number or a list): the end of an answer, of a document.

    Args:
        size: one more than the largest id.

    Raises:
        InputError: that file is damaged, or names an id that the tokenizer lacks.
    """
    named = read_object(folder, "generation_config.json").get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    for index in named:
        if type(index) is not int or not 0 <= index < size:
            file = folder / "generation_config.json"
            raise InputError(f"{file}: eos_token_id {shown(index)} found, ids from 0 to {size - 1} expected")
    return list(dict.fromkeys([eos_id, *named]))


def read_object(folder: Path, name: str) -> dict:
    """One of the folder's JSON files; an empty dict if there is none.

    Raises:
        InputError: the file is too large, or holds no JSON object.
    """
    return read_json(folder / name, MOST_BYTES[name]) if (folder / name).is_file() else {}


def open_backend(folder: Path):
    """The folder's `tokenizer.json`, as the library `tokenizers` opens it, which takes up to a second.

    Raises:
        InputError: it cannot be loaded.
    """
    from tokenizers import Tokenizer

    with library_errors(f"{folder / 'tokenizer.json'} cannot be loaded"):
        return Tokenizer.from_file(str(folder / "tokenizer.json"))


def check_added(folder: Path, backend=None) -> None:
    """Check that added_tokens.json, which transformers 4 wrote and obeys, only repeats tokens of tokenizer.json: that
    one file gives the ids, and is hashed and exported.

    Args:
        backend: of that tokenizer.json; None: it is opened, where there is an added_tokens.json.

    Raises:
        InputError: it adds a token, or gives one another id.
    """
    if not (added := read_object(folder, "added_tokens.json")):
        return
    backend = backend or open_backend(folder)
    for token, index in added.items():
        if (found := backend.token_to_id(token)) != index:
            has = "no such token" if found is None else f"id {found}"
            raise InputError(
                f"{folder / 'added_tokens.json'}: {shown(token)} has id {shown(index)}, tokenizer.json has {has}; load"
                " the tokenizer with transformers and save it again, which writes one file"
            )


def check_sizes(folder: Path) -> None:
    """Check before a library reads them whole that the folder's files are plain files within MOST_BYTES.

    Raises:
        InputError: one of them is not.
    """
    for name, most in MOST_BYTES.items():
        file = folder / name
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: no plain file; replace or remove it")
        if file.is_file() and (size := file.stat().st_size) > most:
            raise InputError(f"{file} has {size:,} bytes, at most {most:,} expected")


def _special_ids(backend, config: dict, folder: Path) -> dict[str, int]:
    """Ids of the control tokens that a tokenizer_config.json names."""
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        if str(backend.token_to_id(_content(token) or "")) != index:
            raise InputError(
                f"{folder}: the token {shown(_content(token))} has the id {index} in tokenizer_config.json and not in"
                " tokenizer.json; load it with transformers and save it again"
            )
    special_ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = _content(config.get(f"{name}_token"))
        if token is not None:
            if (index := backend.token_to_id(str(token))) is None:
                raise InputError(f"{folder}: {name}_token is {shown(token)}, which is no token of its tokenizer.json")
            special_ids[name] = index
    if "eos" not in special_ids:
        raise InputError(f"{folder} names no eos_token; add one to its tokenizer_config.json")
    return special_ids


def _chat_template(config: dict, folder: Path) -> str | None:
    """A folder's chat template; of several, the one named default."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            template = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)})") from error
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder}: its chat template is {shown(template)}, a text expected")
    return template


def _content(token: Any) -> Any:
    """The text of a token, which configs write as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token
