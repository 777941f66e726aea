"""A line that becomes a pair: two documents of the token file, the chosen answer and then the rejected one."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from model.corpus.bulk_encoder import BulkEncoder
from model.corpus.chats import ANSWERS, Chat, as_messages, canonical, contents_of
from model.corpus.cleaning import Cleaner
from model.corpus.documents import ChatDocuments, Encoded
from model.corpus.pairs import CHOSEN, REJECTED, halves, parse_pair
from model.text.chat_ids import ChatFormat

Pair = tuple[Chat, Chat]  # chosen, rejected; alike but for the last message


class PairDocuments:
    """A pair a line. Its ids are those of two chats, in which the last answer alone is learned.

    Args:
        encoder, chat_format, max_length, long_documents: as of `ChatDocuments`; a pair that is too long is kept or
            dropped.
    """

    def __init__(
        self, encoder: BulkEncoder | None, chat_format: ChatFormat | None, max_length: int, long_documents: str
    ) -> None:
        self.chats = ChatDocuments(encoder, chat_format, max_length, long_documents)
        self.forms = self.chats.forms

    def parse(self, lines: Sequence[bytes], escapes: bool) -> tuple[list[Pair | None], dict[int, str]]:
        found, reasons = self.chats.parse(lines, escapes, parse_pair)
        return [messages and halves(messages) for messages in found], reasons

    def clean(self, documents: Sequence[Pair], cleaner: Cleaner):
        cleaned, masks, changed = self.chats.clean([*chain.from_iterable(documents)], cleaner)
        both = [mask | other for mask, other in zip(masks[::2], masks[1::2], strict=True)]
        samples = dict.fromkeys((index // 2, *rest) for index, *rest in changed)  # the question counts once
        return [*zip(cleaned[::2], cleaned[1::2], strict=True)], both, [*samples]

    def empty_reason(self, document: Pair) -> str | None:
        chosen, rejected = document
        if chosen == rejected:
            return "same_answers"
        return self.chats.empty_reason(chosen) or self.chats.empty_reason(rejected)

    def texts(self, documents: Sequence[Pair]) -> list[str]:
        return ["\n".join(contents_of([chosen, rejected[-1:]])) for chosen, rejected in documents]

    def contents(self, documents: Sequence[Pair]) -> list[str]:
        return contents_of([half for chosen, rejected in documents for half in (chosen, rejected[-1:])])

    def keys(self, documents: Sequence[Pair], contents: Sequence[bytes]) -> Sequence[bytes]:
        return [canonical(chosen + rejected) for chosen, rejected in documents]

    def as_jsonl(self, document: Pair) -> dict:
        plain = [[("assistant" if role in ANSWERS else role, text) for role, text in chat] for chat in document]
        return {key: as_messages(chat)["messages"] for key, chat in zip((CHOSEN, REJECTED), plain, strict=True)}

    def turns(self, document: Pair) -> Chat:
        """The questions and answers that statistics count: the last question, once with each answer."""
        chosen, rejected = document
        return chosen[-2:] + rejected[-2:]

    def encode(self, documents: Sequence[Pair]) -> tuple[Sequence[Pair], Encoded]:
        _, each = self.chats.encode([*chain.from_iterable(documents)])
        kept = each.pieces.reshape(-1, 2).all(axis=1)
        written = np.repeat(kept, 2)[each.pieces > 0]  # of the chats that have tokens
        payload = each.payload[np.repeat(written, each.piece_sizes)]
        reasons = [first or second for first, second in zip(each.reasons[::2], each.reasons[1::2], strict=True)]
        is_long, learned = each.is_long.reshape(-1, 2).any(axis=1), each.learned.reshape(-1, 2).sum(axis=1)
        return documents, Encoded(payload, each.piece_sizes[written], 2 * kept, is_long, reasons, learned)
