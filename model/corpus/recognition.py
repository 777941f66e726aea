"""Whether an input holds texts, chats or pairs of answers: what its first objects are."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence

from model.corpus.chats import FORMS, KEYS, form_of
from model.corpus.inspection import EXAMPLES
from model.corpus.opening import TXT_DOCUMENTS, Source
from model.corpus.options import ProcessingOptions
from model.corpus.pairs import PAIR_KEYS, is_pair
from model.corpus.parts import lines_of, stream_parts
from model.errors import InputError

BLOCK_BYTES = 64 << 10  # read at a time


def recognise_format(
    sources: Sequence[Source], options: ProcessingOptions, say: Callable[[str], None]
) -> tuple[list[Source], ProcessingOptions]:
    """The sources and options with the format decided: text, chat or pairs; says which form of chats the first one has.

    Where the format is auto, the first object decides that has a text or is a chat; without one, it is text.

    Raises:
        InputError: a source cannot be read.
    """
    found = None
    if options.format != "text":
        found = next(filter(None, (_first_kind(source, options) for source in sources)), None)
    kind = options.format
    if kind == "auto":
        kind = "pairs" if found == "pairs" else "chat" if found in FORMS else "text"
    if found in FORMS:
        say(f"chats: {FORMS[found]}")
    keys = {"text": None, "chat": KEYS, "pairs": PAIR_KEYS}[kind]
    sources = list(sources) if keys is None else [dataclasses.replace(source, keys=keys) for source in sources]
    return sources, dataclasses.replace(options, format=kind)


def _first_kind(source: Source, options: ProcessingOptions) -> str | None:
    """A key of chats.FORMS, or "text"; None if no object says."""
    if source.form in TXT_DOCUMENTS:
        return None if options.is_chat else "text"
    seen, field = 0, options.text_field
    with_all_keys = dataclasses.replace(source, keys=(field, *PAIR_KEYS))
    # A damaged source fails where its parts are made: those before the damage are kept.
    with contextlib.suppress(InputError):
        for _, block, _ in stream_parts(with_all_keys, BLOCK_BYTES, field):
            for raw in lines_of(block):
                seen += 1
                if kind := _kind(raw, field, options.format):
                    return kind
                if seen == EXAMPLES:
                    return None
    return None


def _kind(raw: memoryview, text_field: str, format: str) -> str | None:
    try:
        value = json.loads(bytes(raw))
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if format == "auto" and isinstance(value.get(text_field), str):
        return "text"
    if format != "chat" and is_pair(value):
        return "pairs"
    return None if format == "pairs" else form_of(value)
