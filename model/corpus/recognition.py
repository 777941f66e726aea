"""Whether an input holds texts, chats or pairs of answers: what its first objects are."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from model.corpus.chats import BAD_ROW, FORMS, KEYS, MESSAGE_KEYS, form_of
from model.corpus.inspection import EXAMPLES
from model.corpus.jsonl import load_json
from model.corpus.opening import Source
from model.corpus.options import ProcessingOptions
from model.corpus.pairs import CHOSEN, PAIR_KEYS, REJECTED, is_pair
from model.corpus.parts import lines_of, stream_parts
from model.corpus.plain_text import TXT_DOCUMENTS
from model.corpus.streams import NoRow
from model.errors import InputError

BLOCK_BYTES = 64 << 10  # read at a time
# Keys that say what an object was meant to be, though it is no chat and no pair: the format that names its fault.
ALIKE = {**dict.fromkeys((CHOSEN, REJECTED), "pairs"), **dict.fromkeys((*MESSAGE_KEYS, BAD_ROW), "chat")}


def recognise_format(
    sources: Sequence[Source], options: ProcessingOptions, say: Callable[[str], None]
) -> tuple[list[Source], ProcessingOptions]:
    """The sources and options with the format decided: text, chat or pairs; says which form of chats the first one has.

    Where the format is auto, the first object decides that has a text or is a chat; without one, the first with a key
    of a chat or a pair; without that too, it is text.

    Raises:
        InputError: a source cannot be read.
    """
    kind, form = options.format, ""
    if kind != "text":
        found, form = _first_kind(sources, options)
        kind = found if kind == "auto" else kind
    if form and kind == "text":
        remedy = f"--format {_format_of(form)} reads those instead"
        say(f"texts: the key {options.text_field}; beside it are {FORMS[form]}: {remedy}")
    elif form:
        say(f"chats: {FORMS[form]}")
    keys = {"text": None, "chat": KEYS, "pairs": PAIR_KEYS}[kind]
    sources = list(sources) if keys is None else [dataclasses.replace(source, keys=keys) for source in sources]
    return sources, dataclasses.replace(options, format=kind)


def _first_kind(sources: Sequence[Source], options: ProcessingOptions) -> tuple[str, str]:
    """The format of the first object that decides it, and its form, a key of chats.FORMS; of a text the form of the
    chat beside it. "" for no form."""
    alike = "text"
    for source in sources:
        if source.form in TXT_DOCUMENTS and not options.is_chat:
            return "text", ""
        for value in _first_objects(source, options):
            form = "pairs" if options.format != "chat" and is_pair(value) else form_of(value) or ""
            if options.format == "auto" and isinstance(value.get(options.text_field), str):
                return "text", form
            if form == "pairs" or (form and options.format != "pairs"):
                return _format_of(form), form
            if alike == "text":
                alike = next((kind for key, kind in ALIKE.items() if key in value), "text")
    return alike, ""


def _format_of(form: str) -> str:
    return "pairs" if form == "pairs" else "chat"


def _first_objects(source: Source, options: ProcessingOptions) -> Iterator[dict]:
    """Those among the first EXAMPLES lines of a source; raises NoRow where a streamed one has none."""
    seen, field = 0, options.text_field
    with_all_keys = dataclasses.replace(source, keys=(field, *PAIR_KEYS))
    try:
        for _, block, _ in stream_parts(with_all_keys, BLOCK_BYTES, field):
            for raw in lines_of(block):
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(value := load_json(bytes(raw)), dict):
                        yield value
                seen += 1
                if seen == EXAMPLES:
                    return
    except NoRow:  # a hub is not asked a second time
        raise
    except InputError:  # a damaged source fails where its parts are made: those before the damage are kept
        pass
