"""What a model reads before it writes: the ids of a prompt or of a chat, within its context."""

import bisect
from collections.abc import Callable, Sequence

from model.errors import InputError
from model.text.chat_template import check_history, encode_chat, valid_text
from model.text.tokenization import Delimiters, delimiters, encode_texts

Message = dict[str, str]  # {"role": ..., "content": ...}


class TooLong(InputError):
    """A prompt leaves no room for a token in the model's context."""


class PromptEncoder:
    """Turns prompts and chats into ids. A control token that a user's text spells out stays text.

    Args:
        tokenizer: a `transformers` fast tokenizer with an eos token, or what `open_tokenizer` gives.
        context: tokens that the model takes, answer included.
        begins_with_bos: a text begins behind the tokenizer's bos, as the documents that the model was trained on.
        say: takes a line on what was left out or assumed.
    """

    def __init__(
        self, tokenizer, context: int, begins_with_bos: bool = True, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.tokenizer, self.context, self._say = tokenizer, context, say
        self.delimiters = delimiters(tokenizer) if begins_with_bos else Delimiters(None, tokenizer.eos_token_id)
        self._said: set[str] = set()  # what is said once

    def encode_prompt(self, prompt: str) -> list[int]:
        """`<bos> ids`, as documents begin in training; without a bos `ids`, and where there are none, the eos.

        Raises:
            InputError: the prompt is no valid text.
            TooLong: it leaves no room for a token in the context.
        """
        return self.fitting("prompt", self._encode_start(valid_text("the prompt", prompt)))

    def encode_chat(self, history: Sequence[Message]) -> list[int]:
        """A history's ids, up to where the answer begins, in the tokenizer's chat template.

        Without a template, the contents as one plain text.

        Raises:
            InputError: the history is empty or malformed, or the template refuses it.
            TooLong: it leaves no room for a token.
        """
        return self.fitting("chat", self._encode(check_history(history)))

    def fit_history(self, history: Sequence[Message], room: int) -> list[Message]:
        """The history without its oldest turns, as far as it would leave less than `room` tokens for the answer.

        A turn is a user's message with what follows it. System messages at the start and the last turn stay, even if
        that turn alone leaves less room.

        Raises:
            InputError: as `encode_chat`; the last turn alone does not fit.
        """
        history = check_history(history)
        system = next((n for n, message in enumerate(history[:-1]) if message["role"] != "system"), len(history) - 1)
        later = [n for n in range(system + 1, len(history)) if history[n]["role"] == "user"]
        begins = [system, *later]  # where the kept part can begin: with each turn

        def kept_from(begin: int) -> list[Message]:
            return [*history[:system], *history[begin:]]

        def fits(begin: int) -> bool:
            return len(self._encode(kept_from(begin))) <= self.context - room

        if fits(system):  # the usual case, with one encoding
            return history
        # A shorter history has fewer tokens: a binary search instead of an encoding for each turn.
        begin = begins[min(1 + bisect.bisect_left(begins[1:], True, key=fits), len(begins) - 1)]
        kept = kept_from(begin)
        if begin == begins[-1]:
            self.encode_chat(kept)  # refuses a last turn that leaves no room at all
        if begin > system:
            self._say_once(
                "left out",
                f"context of {self.context} tokens: the {begin - system} oldest messages of the chat are left out, and"
                " more as it goes on",
            )
        return kept

    def fitting(self, what: str, ids: list[int]) -> list[int]:
        """The ids, if they leave room for a token in the context.

        Args:
            what: they are of, for the message.

        Raises:
            TooLong: they do not.
        """
        if len(ids) >= self.context:
            most = f"the model's context of {self.context} takes at most {self.context - 1}"
            raise TooLong(f"the {what} has {len(ids)} tokens, {most}; shorten it")
        return ids

    def _say_once(self, what: str, line: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(line)

    def _encode(self, history: Sequence[Message]) -> list[int]:
        contents = [message["content"] for message in history]
        if not self.tokenizer.chat_template:
            self._say_once("plain", "this tokenizer has no chat template: the chat is continued as plain text")
            return self._encode_start("\n".join(contents))
        return encode_chat(self.tokenizer, history)

    def _encode_start(self, text: str) -> list[int]:
        """Ids of a document that begins with this text."""
        ids = [*self.delimiters.opening, *encode_texts(self.tokenizer, [text])[0]]
        return ids or [self.delimiters.before_text]
