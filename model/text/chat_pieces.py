"""Chats as ids without rendering each one: constant ids of the template, and between them texts with the contents.

A template is rendered once for all chats of the same roles, with placeholders (`template_outline`). The texts between
control tokens are then encoded in bulk.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import add

import numpy as np

from model.errors import InputError
from model.text.chat_template import render_around
from model.text.encoder import TextEncoder

Chat = Sequence[tuple[str, str]]  # (role, content) of each message
EncodeTexts = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]  # ids of all, uint32; how many each, int64
# A control token's id, a text between control tokens, or such a text with the content of a message in it: what
# precedes the content, the message's number, what follows.
Item = int | str | tuple[str, int, str]
EncodedChat = tuple[np.ndarray, np.ndarray, str | None]  # ids, which are learned, why the chat cannot be used
NO_TOKENS = np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=bool)  # of a chat that cannot be used
MOST_MESSAGES = 128  # of a chat with an outline: making one takes time with the square of it


@dataclass(frozen=True)
class EncodedChats:
    """Ids of chats one after another; a chat that cannot be used has none."""

    ids: np.ndarray  # uint32 [N]
    learned: np.ndarray  # bool [N]
    lengths: np.ndarray  # int64 [chats]
    reasons: list[str | None]  # "template_refuses" or "cannot_mask"; None: the chat is there

    def split(self) -> list[EncodedChat]:
        """Each chat alone."""
        if not self.reasons:
            return []  # NumPy would split nothing into one
        ends = np.cumsum(self.lengths)[:-1]
        return [*zip(np.split(self.ids, ends), np.split(self.learned, ends), self.reasons, strict=True)]


def join_chats(chats: Sequence[EncodedChat]) -> EncodedChats:
    """Chats one after another."""
    none: list = [[]]  # so that there is something to concatenate
    return EncodedChats(
        np.concatenate([ids for ids, _, _ in chats] or none).astype(np.uint32),
        np.concatenate([learned for _, learned, _ in chats] or none).astype(bool),
        np.array([len(ids) for ids, _, _ in chats], dtype=np.int64),
        [reason for _, _, reason in chats],
    )


@dataclass(frozen=True, eq=False)
class Outline:
    """What a template writes around the contents of chats with the same roles.

    Its pieces are constants and texts in turn, beginning and ending with a constant, which may be empty.

    Attributes:
        absent: what the template looks for in contents; the outline holds for chats without it.
        before, after: the literal text on both sides of each content, encoded with it.
        constants: uint32 [N], the ids of all constants.
        lengths: int64 [pieces], the ids of each constant; 0 for texts.
        answers: int64 [answers, 5]: the piece and the place in it where an answer begins; the piece and the place in it
            of the token that ends the answer; and the number of its header.
        headers: ids that inference sends before an answer, with which the answer's first piece must begin.
    """

    absent: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    constants: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    headers: tuple[tuple[int, ...], ...]


def contents_of(chats: Iterable[Chat]) -> list[str]:
    """The contents of all messages of all chats."""
    return [content for chat in chats for _, content in chat]


def hold_for(outlines: Iterable[Outline | None], contents: Sequence[str]) -> bool:
    """Whether all of these outlines hold for all of these contents."""
    if None in outlines or not all(contents) or [*map(str.strip, contents)] != contents:
        return False
    absent = {text for outline in outlines for text in outline.absent}
    return not any(text in content for text in absent for content in contents)


def encodes_in_pieces(encoder: TextEncoder) -> bool:
    """Whether each text between control tokens yields the same ids alone, as far as the tokenizer's file tells."""
    tokenizer, own = json.loads(encoder.json), set(encoder.control.values())
    special = [token for token in tokenizer["added_tokens"] if token["special"]]
    # A single character such as CLIP's "!" is a token in a template and text in a content; others take white space
    # beside them; and some tokenizers put a prefix before the first text only.
    return (
        all(token["id"] in own and not token["lstrip"] and not token["rstrip"] for token in special)
        and '"prepend_scheme": "first"' not in encoder.json
    )


# ----------------------------------------------------------------------------------------------------------- outlines


def make_outline(
    template: str,
    special_tokens: dict,
    encoder: TextEncoder,
    control: frozenset[int],
    end_ids: Sequence[int],
    roles: Sequence[str],
) -> Outline | None:
    """The outline of chats with these roles; None where the template makes no such pieces of them.

    Args:
        template, special_tokens, encoder, control, end_ids: as in `chat_ids.ChatFormat`.
    """
    answers = [number for number, role in enumerate(roles) if role == "assistant"]
    if not answers or len(roles) > MOST_MESSAGES:
        return None
    messages = [{"role": role, "content": encoder.placeholder(number)} for number, role in enumerate(roles)]
    absent: set[str] = set()

    def items(count: int, prompt: bool) -> list[Item]:
        text, looked_for = render_around(template, special_tokens, messages[:count], prompt, encoder.secret)
        absent.update(looked_for)
        return _split(text, encoder)

    try:
        whole, prefixes = items(len(roles), False), [items(number, True) for number in answers]
        contents = [item[1] for item in whole if isinstance(item, tuple)]
        if contents != [*range(len(roles))] or not {item for item in whole if isinstance(item, int)} <= control:
            return None
        pieces = _Pieces(whole, encoder)
        placed = [
            pieces.place(number, prefix, following, end_ids)
            for number, prefix, following in zip(answers, prefixes, [*prefixes[1:], whole], strict=True)
        ]
    except (InputError, _NoPieces):
        return None
    headers = list(dict.fromkeys(header for _, header in placed))
    return Outline(
        absent=tuple(sorted(absent)),
        before=tuple(before for before, _, _ in pieces.texts),
        after=tuple(after for _, _, after in pieces.texts),
        constants=np.array([index for constant in pieces.constants for index in constant], dtype=np.uint32),
        lengths=np.array([*itertools.chain(*([len(ids), 0] for ids in pieces.constants))][:-1], dtype=np.int64),
        answers=np.array([(*places, headers.index(header)) for places, header in placed], dtype=np.int64),
        headers=tuple(headers),
    )


class _NoPieces(Exception):
    """A chat that cannot be made of pieces."""


def _split(text: str, encoder: TextEncoder) -> list[Item]:
    """The items of a text that was rendered from placeholders.

    Raises:
        _NoPieces: a content could complete a control token, or several contents stand between two of those.
    """
    literals, numbers = encoder.split_placeholders(text)
    before, after = set(literals[:-1]), set(literals[1:])
    for name in encoder.control:
        for size in range(1, len(name)):
            if any(literal.endswith(name[:size]) for literal in before):
                raise _NoPieces
            if any(literal.startswith(name[size:]) for literal in after):
                raise _NoPieces
    items: list[Item] = []
    between: list[str | tuple[int]] = []  # what stands since the last control token; a content by its number

    def end_text() -> None:
        holes = [place for place, part in enumerate(between) if isinstance(part, tuple)]
        if len(holes) > 1:
            raise _NoPieces
        if holes:
            [hole] = holes
            items.append(("".join(between[:hole]), between[hole][0], "".join(between[hole + 1 :])))
        elif between:
            items.append("".join(between))
        between.clear()

    for literal, number in itertools.zip_longest(literals, numbers):
        for part in encoder.split_control(literal):
            if isinstance(part, str):
                between.append(part)
            else:
                end_text()
                items.append(part)
        if number is not None:
            between.append((number,))
    end_text()
    return items


class _Pieces:
    """The pieces that the items of a whole chat make."""

    def __init__(self, items: list[Item], encoder: TextEncoder) -> None:
        self._items, self._encoder = items, encoder
        self._encoded: dict[str, list[int]] = {}  # what was encoded before
        self.texts: list[tuple[str, int, str]] = []
        self.constants: list[list[int]] = [[]]
        self._places: list[tuple[int, int]] = []  # of each item: its piece, its place in it
        for item in items:
            if isinstance(item, tuple):
                self._places.append((2 * len(self.texts) + 1, 0))
                self.texts.append(item)
                self.constants.append([])
            else:
                self._places.append((2 * len(self.texts), len(self.constants[-1])))
                self.constants[-1] += self._encode(item) if isinstance(item, str) else [item]

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._encoder.encode([text])[0] if text else []
        return self._encoded[text]

    def place(
        self, number: int, prefix: list[Item], following: list[Item], end_ids: Sequence[int]
    ) -> tuple[tuple[int, int, int, int], tuple[int, ...]]:
        """Where the answer begins and ends, as in `Outline.answers`, and its header.

        Args:
            number: of the message.
            prefix, following: the items up to this answer, and up to the next one.

        Raises:
            _NoPieces: the answer does not begin where the prefix ends, or no token is known to end it.
        """
        items = self._items
        header = prefix[-1] if prefix and isinstance(prefix[-1], str) else ""
        begin = len(prefix) - bool(header)
        [end] = [place + 1 for place, item in enumerate(items) if isinstance(item, tuple) and item[1] == number]
        if begin >= end or items[:begin] != prefix[:begin] or items[: end + 1] != following[: end + 1]:
            raise _NoPieces
        if end == len(items) or (end_ids and items[end] not in end_ids):
            raise _NoPieces
        piece, place = self._places[begin]
        ids = self._encode(header)
        if header:
            first = items[begin] if isinstance(items[begin], str) else items[begin][0] if piece % 2 else ""
            if not first.startswith(header):
                raise _NoPieces
        if piece % 2 == 0:  # a constant, which begins with the header or not
            if self.constants[piece // 2][place : place + len(ids)] != ids:
                raise _NoPieces
            return (piece, place + len(ids), *self._places[end]), ()
        return (piece, len(ids), *self._places[end]), tuple(ids)


# ----------------------------------------------------------------------------------------------------------- encoding


def encode_pieces(contents: Sequence[str], outlines: Sequence[Outline], encode_texts: EncodeTexts) -> EncodedChats:
    """The ids of chats, and which of them are learned.

    Args:
        contents: of all messages of all chats.
        outlines: of each chat, which holds for it.
    """
    texts: Iterable[str] = map(add, itertools.chain.from_iterable([outline.before for outline in outlines]), contents)
    if any("".join(outline.after) for outline in set(outlines)):
        texts = map(add, texts, itertools.chain.from_iterable([outline.after for outline in outlines]))
    ids, text_lengths = encode_texts([*texts])
    lengths = np.concatenate([outline.lengths for outline in outlines])  # int64 [pieces of all chats]
    pieces = np.array([len(outline.lengths) for outline in outlines])  # of each chat
    first_piece = np.cumsum(pieces) - pieces
    is_text = (np.arange(len(lengths)) - np.repeat(first_piece, pieces)) % 2 == 1
    lengths[is_text] = text_lengths
    starts = np.cumsum(lengths) - lengths
    tokens = np.empty(int(lengths.sum()), dtype=np.uint32)
    from_text = np.repeat(is_text, lengths)
    tokens[from_text] = ids
    tokens[~from_text] = np.concatenate([outline.constants for outline in outlines])

    answers = np.concatenate([outline.answers for outline in outlines])  # int64 [answers of all chats, 5]
    counts = np.array([len(outline.answers) for outline in outlines])
    chat_of_answer = np.repeat(np.arange(len(outlines)), counts)
    begin_piece, end_piece = (answers[:, column] + first_piece[chat_of_answer] for column in (0, 2))
    begins, ends = starts[begin_piece] + answers[:, 1], starts[end_piece] + answers[:, 3]
    usable = begins < ends
    for header, own in _by_header(outlines, answers[:, 4], chat_of_answer):
        for place, expected in enumerate(header):
            found = tokens[np.minimum(starts[begin_piece[own]] + place, len(tokens) - 1)]
            usable[own] &= found == expected

    changes = np.zeros(len(tokens) + 1, dtype=np.int8)  # +1 where learned tokens begin, -1 where they have ended
    changes[begins[usable]] += 1
    changes[ends[usable] + 1] -= 1
    learned = np.cumsum(changes[:-1], dtype=np.int8).astype(bool)

    chat_lengths = np.add.reduceat(lengths, first_piece)
    usable = np.logical_and.reduceat(usable, np.cumsum(counts) - counts)
    if not usable.all():
        kept = np.repeat(usable, chat_lengths)
        tokens, learned, chat_lengths = tokens[kept], learned[kept], np.where(usable, chat_lengths, 0)
    reasons = [None if good else "cannot_mask" for good in usable.tolist()]
    return EncodedChats(tokens, learned, chat_lengths, reasons)


def _by_header(outlines: Sequence[Outline], numbers: np.ndarray, chat_of_answer: np.ndarray):
    """Each header, and the numbers of the answers that must begin with it."""
    headers = {header for outline in set(outlines) for header in outline.headers}
    if len(headers) == 1:
        yield headers.pop(), np.arange(len(numbers))
        return
    of_answer = [outlines[chat].headers[number] for chat, number in zip(chat_of_answer, numbers, strict=True)]
    for header in headers:
        yield header, np.array([place for place, own in enumerate(of_answer) if own == header], dtype=np.int64)
