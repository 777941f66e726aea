"""Chats as training reads them: the ids of the tokenizer's chat template, and which of them are learned.

Learned is every answer of the assistant with the token that ends it, and nothing else. What precedes an answer is, id
by id, what inference sends for that history (`chat_template.encode_chat`).

A chat is rendered for each answer up to where it begins, and once as a whole: the ids of the former must begin those
of the latter. Most templates only copy contents; then chats are made of pieces instead (`chat_pieces`), which is many
times as fast.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from model.errors import InputError
from model.text.chat_pieces import (
    NO_TOKENS,
    Chat,
    EncodedChat,
    EncodedChats,
    EncodeTexts,
    Outline,
    contents_of,
    encode_pieces,
    encodes_in_pieces,
    hold_for,
    join_chats,
    make_outline,
)
from model.text.chat_template import MESSAGES_TEMPLATE, render, template_sha256
from model.text.encoder import TextEncoder, unknown_id
from model.text.tokenization import BulkTokenizer, control_ids, load_tokenizer, named_template, text_encoder

PROBES: list[Chat] = [
    (("user", "你好"), ("assistant", "你好！"), ("user", "Who are you?"), ("assistant", "A model.")),
    (("system", "答得短些。"), ("user", "</s>1+1=?"), ("assistant", "2。\n\n<s>🤔")),
]


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer writes chats; can be sent to other processes.

    Args:
        template: its chat template.
        special_tokens: what the template may name, such as `bos_token`.
        control: ids that no text yields; the unknown token is not among them.
        end_ids: those that end an answer, ascending.
        in_pieces: chats are made of pieces where the template allows it.
    """

    template: str
    special_tokens: dict[str, str | list[str]]
    encoder: TextEncoder
    control: frozenset[int]
    end_ids: tuple[int, ...] = ()
    in_pieces: bool = False

    @cached_property
    def _outlines(self) -> dict[tuple[str, ...], Outline | None]:
        """Those made so far, by roles."""
        return {}

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
        if not self.in_pieces:
            return self._render_all(chats)
        outlines = [self._outline(tuple([role for role, _ in chat])) for chat in chats]
        if not hold_for(set(outlines), contents_of(chats)):
            outlines = [
                outline if hold_for({outline}, contents_of([chat])) else None
                for outline, chat in zip(outlines, chats, strict=True)
            ]
        fitting = [place for place, outline in enumerate(outlines) if outline is not None]
        if not fitting:
            return self._render_all(chats)
        contents = contents_of([chats[place] for place in fitting])
        made = encode_pieces(contents, [outlines[place] for place in fitting], encode_texts or self._encode_texts)
        if len(fitting) == len(chats):
            return made
        others = [place for place, outline in enumerate(outlines) if outline is None]
        by_place = dict(zip(fitting, made.split(), strict=True))
        by_place |= zip(others, self._render_all([chats[place] for place in others]).split(), strict=True)
        return join_chats([by_place[place] for place in range(len(chats))])

    # ---------------------------------------------------------------------------------------------------- in pieces

    def _encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.encoder.encode(texts)
        return np.array([*itertools.chain.from_iterable(encoded)], dtype=np.uint32), np.array(
            [*map(len, encoded)], dtype=np.int64
        )

    def _outline(self, roles: tuple[str, ...]) -> Outline | None:
        """The outline of chats with these roles, where there is one."""
        if roles not in self._outlines:
            about = self.template, self.special_tokens, self.encoder, self.control, self.end_ids
            made, chat = make_outline(*about, roles), [(role, f"第 {number} q") for number, role in enumerate(roles)]
            if made is not None:  # rendering is what counts
                pieces = encode_pieces(contents_of([chat]), [made], self._encode_texts)
                made = made if _same(pieces, self._render_all([chat])) else None
            self._outlines[roles] = made
        return self._outlines[roles]

    # ----------------------------------------------------------------------------------------------------- rendered

    def _render_all(self, chats: Sequence[Chat]) -> EncodedChats:
        return join_chats([self._placed(*rendered) for rendered in self._encode_rendered(chats)])

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

    def _placed(self, ids: list[list[int]], before: list[int]) -> EncodedChat:
        """A chat, from what `_encode_rendered` returns."""
        if not ids:
            return *NO_TOKENS, "template_refuses"
        *prefixes, whole = ids
        learned = [False] * len(whole)
        for prefix, following, passed in zip(prefixes, [*prefixes[1:], whole], before, strict=True):
            start = len(prefix)
            ends = (place for place in range(start, len(whole)) if whole[place] in self.control)
            end = next(itertools.islice(ends, passed, None), len(whole))
            is_answer = start < end < len(following) and whole[:start] == prefix
            if not is_answer or (self.end_ids and whole[end] not in self.end_ids):
                return *NO_TOKENS, "cannot_mask"
            learned[start : end + 1] = [True] * (end + 1 - start)
        return np.array(whole, dtype=np.uint32), np.array(learned, dtype=bool), None


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
    ends = whole[np.diff(learned.astype(np.int8), append=0) < 0].tolist()
    found = replace(found, end_ids=tuple(sorted({*ends})))
    if encodes_in_pieces(found.encoder):
        fast = replace(found, in_pieces=True)
        if _same(fast.encode(PROBES), found.encode(PROBES)):
            return fast
    return found


def _same(some: EncodedChats, others: EncodedChats) -> bool:
    return (
        some.reasons == others.reasons
        and np.array_equal(some.ids, others.ids)
        and np.array_equal(some.learned, others.learned)
    )
