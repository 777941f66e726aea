"""A chat in the words of the tokenizer's template, which is a small program from whoever made the tokenizer.

transformers runs it in Jinja's sandbox: it reaches no file and no function of Python. What a sandbox leaves to do is to
take time and memory, so that is limited here.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from model.errors import InputError
from model.text.tokenization import text_encoder

SECONDS = 3  # for one rendering; a template takes under a millisecond
MAX_CHARACTERS = 16 << 20  # of a rendered chat


def encode_chat(tokenizer, history: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a history of `{"role": ..., "content": ...}` in the tokenizer's template, up to where the answer begins.

    The template's control tokens are control tokens; one that a message spells out stays text.

    Raises:
        InputError: as `render_template`.
    """
    encoder = text_encoder(tokenizer)
    return encoder.encode_rendered(render_template(tokenizer, encoder.guarded(history)))


class _TooLong(Exception):
    """A template was still running after `SECONDS`."""


def render_template(tokenizer, history: Sequence[dict[str, str]]) -> str:
    """The text of a history of `{"role": ..., "content": ...}`, up to where the answer begins.

    Raises:
        InputError: the template refuses the history, is damaged, or takes too long or too much.
    """
    import jinja2  # transformers needs it for templates only

    try:
        # A power of two numbers can take for ever within one operation, which no limit interrupts.
        if any(kind == "operator" and value == "**" for _, kind, value in _tokens(jinja2, tokenizer.chat_template)):
            raise InputError("the tokenizer's chat template computes a power (**), which none needs; it is not run")
        with _time_limit(SECONDS):
            text = tokenizer.apply_chat_template(list(history), tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer's chat template refuses this history: {reason}") from error
    except _TooLong as error:
        raise InputError(f"the tokenizer's chat template was still running after {SECONDS} s") from error
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise InputError(f"the tokenizer's chat template fails: {reason}") from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"the tokenizer's chat template makes {len(text):,} characters, at most {MAX_CHARACTERS:,}")
    return text


def _tokens(jinja2, template) -> Iterator[tuple[int, str, str]]:
    templates = template.values() if isinstance(template, dict) else [template]  # a tokenizer can have several
    for text in templates:
        yield from jinja2.Environment().lex(text)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooLong in Python code that still runs after so long: each line looks at the clock."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def look(frame, event, argument):
        if time.monotonic() > end:
            raise _TooLong
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


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
