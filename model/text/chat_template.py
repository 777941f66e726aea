"""A chat in the words of the tokenizer's template, which is a small program from whoever made the tokenizer."""

from collections.abc import Sequence

import jinja2

from model.errors import InputError, first_line
from model.text import template_sandbox
from model.text.tokenization import text_encoder


def encode_chat(tokenizer, history: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a history of `{"role": ..., "content": ...}` in the tokenizer's template, up to where the answer begins.

    The template's control tokens are control tokens; one that a message spells out stays text.

    Raises:
        InputError: as `render_template`.
    """
    encoder = text_encoder(tokenizer)
    ids = encoder.encode_rendered(render_template(tokenizer, encoder.guarded(history)))
    if not ids:
        raise InputError("the tokenizer's chat template makes no text of this history; repair or remove it")
    return ids


def render_template(tokenizer, history: Sequence[dict[str, str]]) -> str:
    """The text of a history of `{"role": ..., "content": ...}`, up to where the answer begins; that of transformers.

    Raises:
        InputError: the template refuses the history, is damaged, or takes too long or too much.
    """
    messages = [{key: value for key, value in message.items() if value is not None} for message in history]
    values = tokenizer.special_tokens_map | {"messages": messages, "tools": None, "documents": None}
    try:
        return template_sandbox.render(tokenizer.get_chat_template(), **values, add_generation_prompt=True)
    except template_sandbox.TooMuch as error:
        raise InputError(f"the tokenizer's chat template {error}") from error
    except jinja2.TemplateError as error:
        raise InputError(f"the tokenizer's chat template refuses this history: {first_line(error)}") from error
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the tokenizer's chat template fails ({reason})") from error


def check_history(history: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A copy of a chat's messages.

    Raises:
        InputError: there is none, or one is not `{"role": text, "content": text}`.
    """
    if not history:
        raise InputError("the chat history is empty: it needs at least one message")
    for n, message in enumerate(history):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f'message {n} of the chat is {message!r}; expected {{"role": "user", "content": "..."}}')
        valid_text(f"message {n} of the chat", message["content"])
    return list(history)


def valid_text(what: str, text: str) -> str:
    """The text itself.

    Raises:
        InputError: it is no text, or holds half of a surrogate pair (what bytes that are not UTF-8 turn into).
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{what} is not valid Unicode text: {ascii(text)[:60]}")
    return text
