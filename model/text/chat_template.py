"""Chats in the tokenizer's template, which is a small program by whoever made the tokenizer."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import jinja2

from model.errors import InputError, first_line, shown
from model.text import template_outline, template_sandbox
from model.text.tokenization import text_encoder

# The embedded tokenizer's, MiniMind v1's form, <s>user\n…</s>\n<s>assistant\n…</s>\n: every message alike, whatever
# its role.
MESSAGES_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def encode_chat(tokenizer, history: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a history of `{"role": ..., "content": ...}` in the tokenizer's template, up to where the answer begins.

    Control tokens in the template are control tokens; those spelled out in a message stay text.

    Raises:
        InputError: as `render_template`.
    """
    encoder = text_encoder(tokenizer)
    ids = encoder.encode_rendered(render_template(tokenizer, encoder.guarded(history)))
    if not ids:
        raise InputError("the tokenizer's chat template makes no text of this history; repair or remove it")
    return ids


def render_template(tokenizer, history: Sequence[dict[str, str]]) -> str:
    """The text of a history of `{"role": ..., "content": ...}`, up to where the answer begins, as in transformers.

    Raises:
        InputError: as `render`.
    """
    return render(tokenizer.get_chat_template(), tokenizer.special_tokens_map, history)


def render(
    template: str, special_tokens: dict, history: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """The text that a template makes of a history; `add_generation_prompt`: up to where the next answer begins.

    Args:
        special_tokens: what the template may name, such as `bos_token`.

    Raises:
        InputError: the template refuses the history, is damaged, or exceeds a limit.
    """
    with _template_errors():
        return template_sandbox.render(template, _values(special_tokens, history, add_generation_prompt))


def render_around(
    template: str, special_tokens: dict, history: Sequence[dict[str, str]], add_generation_prompt: bool, secret: str
) -> tuple[str, frozenset[str]]:
    """`render` of a history whose contents are placeholders, and the texts that the template looked for in them.

    See `template_outline.render_outline`.

    Raises:
        InputError: as `render`, or the template does more with a content than copy it.
    """
    placeholders = frozenset(message["content"] for message in history)
    with _template_errors():
        return template_outline.render_outline(
            template, _values(special_tokens, history, add_generation_prompt), placeholders, secret
        )


def _values(special_tokens: dict, history: Sequence[dict[str, str]], add_generation_prompt: bool) -> dict:
    messages = [{key: value for key, value in message.items() if value is not None} for message in history]
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    return special_tokens | given


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    """Turn what a template raises into an InputError."""
    try:
        yield
    except template_sandbox.TooMuch as error:
        raise InputError(f"the tokenizer's chat template {error}") from error
    except jinja2.TemplateError as error:
        raise InputError(f"the tokenizer's chat template refuses this history: {first_line(error)}") from error
    except Exception as error:  # a program by others: it, and Python as it compiles it, may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the tokenizer's chat template fails ({reason})") from error


def template_sha256(template: str) -> str:
    """SHA-256 (hex) of a template's text."""
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


def check_history(history: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Check a chat's messages and return a copy of the list.

    Raises:
        InputError: the list is empty, or a message is not `{"role": text, "content": text}`.
    """
    if not history:
        raise InputError("the chat history is empty: it needs at least one message")
    for n, message in enumerate(history):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(
                f'message {n} of the chat is {shown(message)}; {{"role": "user", "content": "..."}} expected'
            )
        valid_text(f"message {n} of the chat", message["content"])
    return list(history)


def valid_text(what: str, text: str) -> str:
    """Check a text and return it.

    Raises:
        InputError: it is not a str, or holds half of a surrogate pair (as invalid UTF-8 decodes to).
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{what} is not valid Unicode text: {ascii(text)[:60]}")
    return text
