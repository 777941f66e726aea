"""What a tokenizer folder says, and whether two of them say the same."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import InputError, first_line, shown

MAX_CONFIG_BYTES = 64 << 20  # of a tokenizer_config.json; with a thousand added tokens it has 200 kB


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer and its control tokens, as plain values.

    Attributes:
        tokenizer: `tokenizer.json`, spelled as the installed `tokenizers` library spells it.
        special_ids: of "bos", "eos", "unk" and "pad", those that are named; the eos always is.
        end_ids: what ends a text; the eos is the first.
        chat_template: None where there is none.
    """

    tokenizer: dict
    special_ids: dict[str, int]
    end_ids: list[int]
    chat_template: str | None


def same_tokenizer(folder: str | Path, other: str | Path) -> bool:
    """Whether two tokenizer folders give the same ids, the same control tokens, ends and chat template.

    What they add by themselves (the post-processor) is not compared: this project never asks for it.

    Raises:
        InputError: one of them cannot be read.
    """

    def compared(path: str | Path) -> TokenizerFolder:
        found = read_folder(path)
        return replace(found, tokenizer=found.tokenizer | {"post_processor": None}, end_ids=sorted(found.end_ids))

    return compared(folder) == compared(other)


def read_folder(folder: str | Path) -> TokenizerFolder:
    """Read tokenizer.json, tokenizer_config.json and, where there are, chat_template.jinja and generation_config.json.

    Raises:
        InputError: one of them is missing or damaged, they contradict each other, or no eos is named.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: a folder with a tokenizer.json expected")
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise InputError(f"{folder / 'tokenizer.json'} cannot be loaded ({first_line(error)})") from error
    config = _read_object(folder / "tokenizer_config.json")
    special_ids = _special_ids(backend, config, folder)
    ends = _read_object(folder / "generation_config.json").get("eos_token_id")
    ends = [special_ids["eos"], *(ends if isinstance(ends, list) else [] if ends is None else [ends])]
    if not all(type(index) is int and index >= 0 and backend.id_to_token(index) is not None for index in ends):
        raise InputError(f"{folder / 'generation_config.json'}: eos_token_id {shown(ends[1:])}, ids of tokens expected")
    template = _chat_template(config, folder)
    return TokenizerFolder(json.loads(backend.to_str()), special_ids, list(dict.fromkeys(ends)), template)


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
    """A folder's chat template; of several by name, the one that is called default."""
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
    """The text of a token, which configs give as it is or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _read_object(file: Path) -> dict:
    """A JSON file's object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        with open(file, "rb") as content:
            value = json.loads(content.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds {shown(value)}, settings by name expected")
    return value
