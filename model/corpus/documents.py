"""What a line becomes: a text, or a chat. `part_maker` treats both alike."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol

import numpy as np

from model.corpus.bulk_encoder import BulkEncoder, with_bos_and_eos
from model.corpus.chats import ANSWERS, UNLEARNED, Chat, as_messages, canonical, contents_of, empty_reason, parse_chat
from model.corpus.cleaning import Cleaner
from model.corpus.jsonl import parse_lines
from model.corpus.long_documents import cut_document, split_document
from model.corpus.part_file import CHAT
from model.text.chat_ids import ChatFormat
from model.text.chat_pieces import NO_TOKENS, EncodedChats, join_chats
from model.text.tokenization import Delimiters

LEARNED = 1 << 31  # the bit of a chat's ids in a part that marks those that are learned


@dataclass
class Encoded:
    """What documents became in the payload."""

    payload: np.ndarray  # tokens or bytes of all pieces
    piece_sizes: np.ndarray  # int64 [pieces]
    pieces: np.ndarray  # int64 [documents]; 0: rejected
    is_long: np.ndarray  # bool [documents]
    reasons: list[str | None]  # why a document was rejected
    learned: np.ndarray | None = None  # int64 [documents]: learned tokens of each chat


class Documents(Protocol):
    """How lines become documents of one kind, and documents tokens."""

    def parse(self, lines: Sequence[bytes], escapes: bool) -> tuple[list, dict[int, str]]:
        """The lines' documents, None for a bad line, and the reasons, keys of REASONS, by the bad lines' indices."""

    def clean(self, documents: Sequence, cleaner: Cleaner) -> tuple[list, list[int], list[tuple[int, int, str, str]]]:
        """The cleaned documents, the mask of what changed each, and (document, mask, before, after) of what changed."""

    def empty_reason(self, document) -> str | None:
        """Why to reject a document of which cleaning left too little; None if it left enough."""

    def texts(self, documents: Sequence) -> list[str]:
        """Each as one text, as the filters and the statistics take it."""

    def contents(self, documents: Sequence) -> list[str]:
        """The texts that are encoded."""

    def keys(self, documents: Sequence, contents: Sequence[bytes]) -> Sequence[bytes]:
        """Bytes that are equal for equal documents only; `contents`: `texts` in UTF-8."""

    def as_jsonl(self, document) -> dict:
        """The object of its line in cleaned JSONL."""

    def encode(self, documents: Sequence) -> tuple[Sequence, Encoded]:
        """The documents, which may have been cut off, and their tokens."""


class TextDocuments:
    """A text a line, in the field `text_field`; its ids stand between bos and eos.

    Args:
        encoder: None: nothing is encoded.
        max_length, long_documents, dtype: see `PartOptions`.
    """

    def __init__(
        self,
        text_field: str,
        encoder: BulkEncoder | None,
        delimiters: Delimiters | None,
        dtype: str,
        max_length: int,
        long_documents: str,
    ) -> None:
        self.text_field, self.encoder, self.delimiters, self.dtype = text_field, encoder, delimiters, np.dtype(dtype)
        self.max_length, self.long_documents = max_length, long_documents

    def parse(self, lines: Sequence[bytes], escapes: bool) -> tuple[list[str | None], dict[int, str]]:
        return parse_lines(lines, self.text_field, escapes)

    def clean(self, documents: Sequence[str], cleaner: Cleaner):
        cleaned, masks = cleaner.clean_all(documents)
        changed = [(index, mask, documents[index], cleaned[index]) for index, mask in enumerate(masks) if mask]
        return cleaned, masks, changed

    def empty_reason(self, document: str) -> str | None:
        return None if document else "empty"

    def texts(self, documents: Sequence[str]) -> Sequence[str]:
        return documents

    contents = texts

    def keys(self, documents: Sequence[str], contents: Sequence[bytes]) -> Sequence[bytes]:
        return contents

    def as_jsonl(self, document: str) -> dict:
        return {self.text_field: document}

    def encode(self, documents: Sequence[str]) -> tuple[Sequence[str], Encoded]:
        delimiters = self.delimiters
        ids, lengths = self.encoder.encode(documents)
        is_long = lengths + delimiters.count > self.max_length
        pieces = np.ones(len(documents), dtype=np.int64)
        if self.long_documents != "keep" and is_long.any():
            documents, ids, lengths, pieces = self._shorten(documents, ids, lengths, is_long)
        check_ids(ids, np.iinfo(self.dtype).max)
        tokens = with_bos_and_eos(ids, lengths, delimiters.bos_id, delimiters.eos_id, self.dtype)
        reasons = [None if count else "over_max_length" for count in pieces.tolist()]
        return documents, Encoded(tokens, lengths + delimiters.count, pieces, is_long, reasons)

    def _shorten(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, is_long: np.ndarray):
        """Replace each long document by its pieces: (texts, ids and lengths of all pieces, pieces of each document)."""
        limit = self.max_length - self.delimiters.count
        texts = list(texts)
        starts = np.cumsum(lengths) - lengths
        all_ids, all_lengths, pieces = [], [], np.ones(len(texts), dtype=np.int64)
        for index, text in enumerate(texts):
            own_ids, own_lengths = ids[starts[index] : starts[index] + lengths[index]], lengths[index : index + 1]
            if is_long[index]:
                parts = []
                if self.long_documents == "split":
                    parts = split_document(text, limit, self._count_tokens)
                elif self.long_documents == "truncate":
                    texts[index] = cut_document(text, limit, self._count_tokens).rstrip()
                    parts = [texts[index]]
                own_ids, own_lengths = self.encoder.encode(parts)
                pieces[index] = len(parts)
            all_ids.append(own_ids)
            all_lengths.append(own_lengths)
        return texts, np.concatenate(all_ids), np.concatenate(all_lengths), pieces

    def _count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        return self.encoder.encode(texts)[1]


class ChatDocuments:
    """A chat a line, in any of the forms of `model.corpus.chats`; its ids are those of the chat template.

    In the payload, ids that are learned have the bit LEARNED.

    Args:
        encoder: None: nothing is encoded.
        chat_format: how the tokenizer writes chats; needed where something is encoded.
    """

    def __init__(
        self, encoder: BulkEncoder | None, chat_format: ChatFormat | None, max_length: int, long_documents: str
    ) -> None:
        self.encoder, self.chat_format = encoder, chat_format
        self.max_length, self.long_documents = max_length, long_documents
        self.forms: Counter = Counter()  # chats by their form (chats.FORMS), repeated ones too

    def parse(
        self, lines: Sequence[bytes], escapes: bool, parse_one: Callable = parse_chat
    ) -> tuple[list[Chat | None], dict[int, str]]:
        chats, reasons = [], {}
        for index, raw in enumerate(lines):
            chat, form_or_reason = parse_one(raw, escapes)
            if chat is None:
                reasons[index] = form_or_reason
            else:
                self.forms[form_or_reason] += 1
            chats.append(chat)
        return chats, reasons

    def clean(self, documents: Sequence[Chat], cleaner: Cleaner):
        before = contents_of(documents)
        after, masks = cleaner.clean_all(before)
        if not any(masks):
            return list(documents), [0] * len(documents), []
        place, cleaned, chat_masks, changed = 0, [], [], []
        for index, chat in enumerate(documents):
            own = slice(place, place + len(chat))
            place = own.stop
            if mask := reduce(or_, masks[own]):
                rows = zip(masks[own], before[own], after[own], strict=True)
                changed += [(index, *row) for row in rows if row[0]]
                chat = tuple((role, text) for (role, _), text in zip(chat, after[own], strict=True))
                chat = chat[1:] if chat[0] == ("system", "") else chat
            cleaned.append(chat)
            chat_masks.append(mask)
        return cleaned, chat_masks, changed

    def empty_reason(self, document: Chat) -> str | None:
        return empty_reason(document)

    def texts(self, documents: Sequence[Chat]) -> list[str]:
        return ["\n".join([content for _, content in chat]) for chat in documents]

    def contents(self, documents: Sequence[Chat]) -> list[str]:
        return contents_of(documents)

    def keys(self, documents: Sequence[Chat], contents: Sequence[bytes]) -> Sequence[bytes]:
        return [canonical(chat) for chat in documents]

    def as_jsonl(self, document: Chat) -> dict:
        return as_messages(document)

    def turns(self, document: Chat) -> Chat:
        """The questions and answers that statistics count."""
        return document

    def encode(self, documents: Sequence[Chat]) -> tuple[Sequence[Chat], Encoded]:
        encoded = self._encode(documents)
        is_long = encoded.lengths > self.max_length
        if self.long_documents != "keep" and is_long.any():
            documents, encoded = self._shorten(documents, encoded, np.flatnonzero(is_long).tolist())
        check_ids(encoded.ids, LEARNED - 1)
        payload = encoded.ids.astype("<u4") | (encoded.learned.astype("<u4") << np.uint32(31))
        pieces = np.array([reason is None for reason in encoded.reasons], dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(encoded.lengths)])
        learned = np.diff(np.concatenate([[0], np.cumsum(encoded.learned)])[ends])
        return documents, Encoded(payload, encoded.lengths[pieces > 0], pieces, is_long, encoded.reasons, learned)

    def _encode(self, chats: Sequence[Chat]) -> EncodedChats:
        """The ids of chats, of which answers of the weight 0 are not learned."""
        weighted = [place for place, chat in enumerate(chats) if any(role == UNLEARNED for role, _ in chat)]
        if not weighted:
            return self.chat_format.encode(chats, self.encoder.encode)
        written = list(chats)
        for place in weighted:
            written[place] = [("assistant" if role in ANSWERS else role, content) for role, content in chats[place]]
        encoded = self.chat_format.encode(written, self.encoder.encode)
        parts = encoded.split()
        for place in weighted:
            _, learned, reason = parts[place]
            answers = np.flatnonzero(np.diff(learned.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
            roles = [role for role, _ in chats[place] if role in ANSWERS]
            for (begin, end), role in zip(answers.tolist(), roles, strict=reason is None):
                learned[begin:end] = role != UNLEARNED  # a view
        return encoded

    def _shorten(
        self, chats: Sequence[Chat], encoded: EncodedChats, places: Sequence[int]
    ) -> tuple[list[Chat], EncodedChats]:
        """Shorten or reject the chats at these places, which are too long."""
        chats, parts = list(chats), encoded.split()
        for place in places:
            parts[place] = (*NO_TOKENS, "over_max_length")
        if self.long_documents == "truncate":
            shortened = self._without_oldest_turns([chats[place] for place in places])
            fitting = [place for place, chat in zip(places, shortened, strict=True) if chat]
            kept = [chat for chat in shortened if chat]
            for place, chat, part in zip(fitting, kept, self._encode(kept).split(), strict=True):
                chats[place], parts[place] = chat, part
        return chats, join_chats(parts)

    def _without_oldest_turns(self, chats: Sequence[Chat]) -> list[Chat | None]:
        """Each chat without as many of its first turns as it takes to fit; None where its last turn alone is too long.

        The system message stays. Nothing is learned in a chat whose only answer left has the weight 0: None too.
        """
        fewest = [1] * len(chats)  # turns to drop: at least these suffice, if any do
        most = [len(chat) // 2 for chat in chats]  # all: none that is left fits
        while open_chats := [place for place in range(len(chats)) if fewest[place] < most[place]]:
            middle = [(fewest[place] + most[place]) // 2 for place in open_chats]
            tried = [_drop_turns(chats[place], turns) for place, turns in zip(open_chats, middle, strict=True)]
            lengths = self._encode(tried).lengths.tolist()
            for place, turns, length in zip(open_chats, middle, lengths, strict=True):
                if length <= self.max_length:
                    most[place] = turns
                else:
                    fewest[place] = turns + 1
        left = [_drop_turns(chat, turns) for chat, turns in zip(chats, most, strict=True)]
        return [chat if any(role == "assistant" for role, _ in chat) else None for chat in left]


def _drop_turns(chat: Chat, turns: int) -> Chat:
    """A chat without its first turns; a system message stays."""
    system = len(chat) % 2
    return (*chat[:system], *chat[system + 2 * turns :])


def chat_table(chats: Sequence[Chat], learned: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The chats' rows, CHAT [len(chats)], and the characters of each question and its answer, uint32 [turns, 2].

    Args:
        learned: int64 [len(chats)]; None: nothing was encoded.
    """
    table = np.zeros(len(chats), dtype=CHAT)
    table["turns"] = [len(chat) // 2 for chat in chats]
    if learned is not None:
        table["learned"] = learned
    lengths = [len(content) for chat in chats for role, content in chat if role != "system"]
    return table, np.array(lengths, dtype="<u4").reshape(-1, 2)


def check_ids(ids: np.ndarray, most: int) -> None:
    """Raises RuntimeError if an id is above `most`: wrapped, it would be silent damage."""
    if len(ids) and int(ids.max()) > most:
        raise RuntimeError(f"the tokenizer gave id {ids.max()}, at most {most} expected")
