"""Chats as training reads them: the ids of the tokenizer's chat template, and which of them are learned.

Learned is every answer of the assistant with the token that ends it, and nothing else. What precedes an answer is, id
by id, what inference sends for that history (`chat_template.encode_chat`).

Any template is rendered for each answer up to where it begins, and once as a whole: the ids of the former must begin
those of the latter. The embedded template writes all messages alike, so their ids are made in bulk without it.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from model.errors import InputError
from model.text.chat_template import MESSAGES_TEMPLATE, render, template_sha256
from model.text.encoder import TextEncoder, unknown_id
from model.text.tokenization import BulkTokenizer, control_ids, load_tokenizer, named_template, text_encoder

Chat = Sequence[tuple[str, str]]  # (role, content) of each message
EncodeTexts = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]  # ids of all, uint32; how many each, int64
PROBES: list[Chat] = [
    (("user", "你好"), ("assistant", "你好！"), ("user", "Who are you?"), ("assistant", "A model.")),
    (("system", "答得短些。"), ("user", "</s>1+1=?"), ("assistant", "2。\n\n<s>🤔")),
]


@dataclass(frozen=True)
class EncodedChats:
    """Ids of chats one after another; a chat that cannot be used has none."""

    ids: np.ndarray  # uint32 [N]
    learned: np.ndarray  # bool [N]
    lengths: np.ndarray  # int64 [chats]
    reasons: list[str | None]  # "template_refuses" or "cannot_mask"; None: the chat is there


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer writes chats; can be sent to other processes.

    Args:
        template: its chat template.
        special_tokens: what the template may name, such as `bos_token`.
        control: ids that no text yields; the unknown token is not among them.
        end_ids: those that end an answer, ascending.
        by_message: the ids are those of the messages one by one, as MESSAGES_TEMPLATE writes them.
    """

    template: str
    special_tokens: dict[str, str | list[str]]
    encoder: TextEncoder
    control: frozenset[int]
    end_ids: tuple[int, ...] = ()
    by_message: bool = False

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the template's text."""
        return template_sha256(self.template)

    def encode(self, chats: Sequence[Chat], encode_texts: EncodeTexts | None = None) -> EncodedChats:
        """The ids of chats, whose contents are stripped of white space, and which of them are learned.

        Args:
            encode_texts: encodes texts in bulk, with the same tokenizer; None: with `encoder`.

        Raises:
            InputError: the tokenizer fails on a text.
        """
        if self.by_message and chats:
            return self._encode_by_message(chats, encode_texts or self._encode_texts)
        return _joined([self._placed(*rendered) for rendered in self._encode_rendered(chats)])

    # ------------------------------------------------------------------------------------------- message by message

    def _encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.encoder.encode(texts)
        return np.array(sum(encoded, []), dtype=np.uint32), np.array([*map(len, encoded)], dtype=np.int64)

    def _encode_by_message(self, chats: Sequence[Chat], encode_texts: EncodeTexts) -> EncodedChats:
        """`<s> role⏎content </s> ⏎` of each message."""
        around, around_lengths = encode_texts(["\n", "assistant\n"])
        newline, header = np.split(around, around_lengths[:1])
        ids, lengths = encode_texts([f"{role}\n{content}" for chat in chats for role, content in chat])
        messages = np.array([len(chat) for chat in chats])  # of each chat
        is_answer = np.array([role == "assistant" for chat in chats for role, _ in chat])
        begins_as_sent = lengths > len(header)  # as inference sends it before an answer
        starts = np.cumsum(lengths) - lengths
        for place, expected in enumerate(header.tolist()):
            begins_as_sent &= ids[np.minimum(starts + place, len(ids) - 1)] == expected

        sizes = lengths + 2 + len(newline)
        message_starts = np.cumsum(sizes) - sizes
        tokens = np.empty(int(sizes.sum()), dtype=np.uint32)
        is_text = np.ones(len(tokens), dtype=bool)
        bos, eos = message_starts, message_starts + lengths + 1
        around_text = [(bos, self.encoder.control["<s>"]), (eos, self.encoder.control["</s>"])]
        around_text += [(eos + 1 + place, index) for place, index in enumerate(newline.tolist())]
        for places, index in around_text:
            is_text[places] = False
            tokens[places] = index
        tokens[is_text] = ids

        changes = np.zeros(len(tokens) + 1, dtype=np.int8)  # +1 where learned tokens begin, -1 behind them
        changes[(bos + 1 + len(header))[is_answer]] += 1
        changes[(eos + 1)[is_answer]] -= 1
        learned = np.cumsum(changes[:-1], dtype=np.int8).astype(bool)

        first_messages = np.cumsum(messages) - messages
        usable = np.logical_and.reduceat(begins_as_sent | ~is_answer, first_messages)
        chat_lengths = np.add.reduceat(sizes, first_messages)
        if not usable.all():
            kept = np.repeat(usable, chat_lengths)
            tokens, learned, chat_lengths = tokens[kept], learned[kept], np.where(usable, chat_lengths, 0)
        return EncodedChats(
            tokens, learned, chat_lengths, [None if good else "cannot_mask" for good in usable.tolist()]
        )

    # ------------------------------------------------------------------------------------------------- any template

    def _encode_rendered(self, chats: Sequence[Chat]) -> list[tuple[list[list[int]], list[int]]]:
        """Of each chat the ids up to each answer and those of the whole, and how many control tokens the template
        writes between an answer's start and its content; nothing where the template refuses the chat."""
        rendered = [self._render(chat) for chat in chats]
        texts = [text for texts, _ in rendered for text in texts]
        ids = iter(self.encoder.encode_all_rendered(texts) if texts else [])
        return [([next(ids) for _ in texts], before) for texts, before in rendered]

    def _render(self, chat: Chat) -> tuple[list[str], list[int]]:
        """The texts up to each answer and the whole, and how many control tokens stand between an answer's start and
        its content; nothing where the template refuses the chat or changes a content."""
        messages = [{"role": role, "content": self.encoder.guarded(content)} for role, content in chat]
        answers = [place for place, (role, _) in enumerate(chat) if role == "assistant"]
        begin, end = self.encoder.marks
        about = self.template, self.special_tokens
        try:
            prefixes = [render(*about, messages[:place]) for place in answers]
            whole = render(*about, messages, add_generation_prompt=False)
            before = self._control_before(messages, prefixes, whole)
            if before is None:  # something precedes the content of an answer, such as an empty thought
                marked = [
                    message | {"content": begin + message["content"] + end} if place in answers else message
                    for place, message in enumerate(messages)
                ]
                in_marks = render(*about, marked, add_generation_prompt=False)
                before = self._control_before(marked, prefixes, in_marks, len(begin + end))
        except InputError:
            return [], []
        return ([], []) if before is None else ([*prefixes, whole], before)

    def _control_before(
        self, messages: Sequence[dict[str, str]], prefixes: Sequence[str], whole: str, marks: int = 0
    ) -> list[int] | None:
        """How many control tokens stand between the start of each answer and its content; None if a content is missing.

        Args:
            prefixes: the text up to each answer.
            whole: the text of all messages.
            marks: characters around each answer in `whole`; 0: none, and then each answer must begin with its content.
        """
        at, before = 0, []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                at = len(prefixes[len(before)]) + len(before) * marks
            found = whole.find(content, at)
            if found < 0 or (message["role"] == "assistant" and found > at and not marks):
                return None
            if message["role"] == "assistant":
                before.append(self.encoder.count_control(whole[at:found]))
            at = found + len(content)
        return before

    def _placed(self, ids: list[list[int]], before: list[int]) -> tuple[list[int], list[bool], str | None]:
        """(ids, learned, reason) of a chat, from what `_encode_rendered` returns."""
        if not ids:
            return [], [], "template_refuses"
        *prefixes, whole = ids
        learned = [False] * len(whole)
        for prefix, following, passed in zip(prefixes, [*prefixes[1:], whole], before, strict=True):
            start = len(prefix)
            ends = (place for place in range(start, len(whole)) if whole[place] in self.control)
            end = next(itertools.islice(ends, passed, None), len(whole))
            is_answer = start < end < len(following) and whole[:start] == prefix
            if not is_answer or (self.end_ids and whole[end] not in self.end_ids):
                return [], [], "cannot_mask"
            learned[start : end + 1] = [True] * (end + 1 - start)
        return whole, learned, None


def _joined(chats: Sequence[tuple[list[int], list[bool], str | None]]) -> EncodedChats:
    return EncodedChats(
        np.array([index for ids, _, _ in chats for index in ids], dtype=np.uint32),
        np.array([flag for _, learned, _ in chats for flag in learned], dtype=bool),
        np.array([len(ids) for ids, _, _ in chats], dtype=np.int64),
        [reason for _, _, reason in chats],
    )


def load_chat_format(path: str | Path | None, tokenizer: BulkTokenizer) -> ChatFormat:
    """How the tokenizer of a folder writes chats.

    Args:
        path: of the folder; None: the embedded tokenizer.
        tokenizer: the same, as `load_bulk_tokenizer` returned it.

    Raises:
        InputError: it has no chat template, or one whose answers cannot be told from the rest.
    """
    control, unknown = tokenizer.encoder.control, {unknown_id(tokenizer.json)}
    if named_template(path) == MESSAGES_TEMPLATE and {"<s>", "</s>"} <= control.keys():
        known = {"bos_token": "<s>", "eos_token": "</s>"}
        made = ChatFormat(MESSAGES_TEMPLATE, known, tokenizer.encoder, frozenset(control.values()) - unknown)
    else:
        loaded = load_tokenizer(path)
        if not loaded.chat_template:
            raise InputError(f"tokenizer_path: {path} has no chat template, which chats need; use another tokenizer")
        special = {
            name: [*map(str, token)] if isinstance(token, list | tuple) else str(token)
            for name, token in loaded.special_tokens_map.items()
        }
        made = ChatFormat(loaded.get_chat_template(), special, text_encoder(loaded), control_ids(loaded) - unknown)
    return _checked(made, path)


def _checked(found: ChatFormat, path: str | Path | None) -> ChatFormat:
    """Try a format on a chat; returns it with the ids that end an answer.

    Raises:
        InputError: its template fails on the chat, or the answers cannot be told from the rest.
    """
    where = f"tokenizer_path: the chat template of {path or 'the embedded tokenizer'}"
    remedy = "use a tokenizer with another template"
    begin = [{"role": "user", "content": "你好"}]
    try:
        prompt, without = (render(found.template, found.special_tokens, begin, flag) for flag in (True, False))
    except InputError as error:
        raise InputError(f"{where} cannot be used: {error}; {remedy}") from error
    [(ids, before)] = found._encode_rendered([PROBES[0]])
    if not ids:
        raise InputError(f"{where} refuses a chat of two questions and answers, or changes their text; {remedy}")
    *prefixes, whole = ids
    if any(whole[: len(prefix)] != prefix for prefix in prefixes):
        raise InputError(
            f"{where} cannot be trained on: what it writes before an answer differs from what inference sends; {remedy}"
        )
    if prompt == without and any(before):
        raise InputError(f"{where} does not begin the answer (add_generation_prompt); {remedy}")
    whole, learned, reason = found._placed(ids, before)
    if reason:
        raise InputError(
            f"{where} cannot be trained on: it ends no answer with a control token that can be found; {remedy}"
        )
    ends = {index for index, flag, after in zip(whole, learned, [*learned[1:], False], strict=True) if flag > after}
    found = replace(found, end_ids=tuple(sorted(ends)))
    if found.template == MESSAGES_TEMPLATE:
        fast = replace(found, by_message=True)
        if _same(fast.encode(PROBES), found.encode(PROBES)):
            return fast
    return found


def _same(some: EncodedChats, others: EncodedChats) -> bool:
    return (
        some.reasons == others.reasons
        and np.array_equal(some.ids, others.ids)
        and np.array_equal(some.learned, others.learned)
    )
