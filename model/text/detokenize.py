"""From ids to text, one id at a time, without ever showing half a character.

The text of a generation is, by definition, the pieces that a detokenizer gives joined together: what a stream shows
and what a call returns cannot differ.
"""

import codecs
from collections.abc import Sequence

from model.text.tokenization import control_ids, is_byte_level

WINDOW = 8  # tokens of the prompt that a tokenizer other than byte-level BPE needs to see to place its spaces
LONGEST_PASSAGE = 64  # tokens that are looked for again and again
LONGEST_TAIL = 3  # bytes of a UTF-8 character that is not complete yet


def new_detokenizer(tokenizer, prompt_ids: Sequence[int] = ()) -> "ByteLevelDetokenizer | WindowDetokenizer":
    """The detokenizer for what follows `prompt_ids`: feed it with `push(id)`, end with `flush()`."""
    return ByteLevelDetokenizer(tokenizer) if is_byte_level(tokenizer) else WindowDetokenizer(tokenizer, prompt_ids)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte in a byte-level token -> the byte.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for the characters from U+0100 on
    (`bytes_to_unicode` in openai/gpt-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = byte_alphabet()


class ByteLevelDetokenizer:
    """Tokens -> bytes -> an incremental UTF-8 decoder, which holds back only the bytes of an unfinished character.

    Bytes that can't be UTF-8 become U+FFFD at once; a U+FFFD that the text really holds is a character like others.
    """

    def __init__(self, tokenizer) -> None:
        self._token = tokenizer.backend_tokenizer.id_to_token
        self._silent = control_ids(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """Text that this token completes, often "". Control tokens and ids without a token give none."""
        token = self._token(index)
        if token is None or index in self._silent:
            return ""
        if all(character in BYTE_ALPHABET for character in token):
            return self._decoder.decode(bytes(BYTE_ALPHABET[character] for character in token))
        return self._decoder.decode(token.encode("utf-8"))  # an added token is spelled as plain text

    def flush(self) -> str:
        """What is still held back, as U+FFFD; afterwards a new text can begin."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For other tokenizers: decode a short window with and without the new tokens; the difference is the new text.

    The method is that of Hugging Face's text-generation-inference; but a U+FFFD at the end is held back for at most
    LONGEST_TAIL tokens, since a byte token beyond these can't belong to the same unfinished character.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._silent = control_ids(tokenizer)
        self._shown = list(prompt_ids[-WINDOW:])  # the window's tokens whose text is out
        self._pending: list[int] = []  # those whose text is held back

    def push(self, index: int) -> str:
        """Text that this token completes, often "". Control tokens give none."""
        if index in self._silent:
            return ""
        self._pending.append(index)
        text = self._pending_text()
        if text.endswith("\ufffd") and len(self._pending) <= LONGEST_TAIL:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is still held back."""
        return self._show(self._pending_text())

    def _show(self, text: str) -> str:
        self._shown, self._pending = self._pending or self._shown, []
        return text

    def _pending_text(self) -> str:
        before = self._decode(self._shown)
        return self._decode(self._shown + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Text:
    """A text that grows by tokens, and may have to end before its model ends it.

    Args:
        detokenizer: for its tokens.
        stop_strings: it ends before the first of them; what could be the beginning of one is held back.
        max_repeats: it ends after a passage that came so many times in a row; 0: never.
    """

    def __init__(
        self,
        detokenizer: "ByteLevelDetokenizer | WindowDetokenizer",
        stop_strings: Sequence[str] = (),
        max_repeats: int = 0,
    ) -> None:
        self._detokenizer, self._stop_strings, self._max_repeats = detokenizer, tuple(stop_strings), max_repeats
        self._ids: list[int] = []
        self._held = ""

    def add(self, token: int | None, end: str | None = None) -> tuple[str, str | None]:
        """The piece of text that may now be shown, and why the text ends.

        Args:
            token: None: there is no more.
            end: the model ends the text with this token, for this reason.
        """
        if token is not None:
            self._ids.append(token)
            self._held += self._detokenizer.push(token)
        if end is not None:
            self._held += self._detokenizer.flush()
        found = [place for stop in self._stop_strings if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], "stop_string"
        if end is None and self._max_repeats and repeats(self._ids, self._max_repeats):
            return self._held + self._detokenizer.flush(), "repeats"
        keep = 0 if end is not None else max((self._beginning(stop) for stop in self._stop_strings), default=0)
        shown = len(self._held) - keep
        piece, self._held = self._held[:shown], self._held[shown:]
        return piece, end

    def _beginning(self, stop: str) -> int:
        """How many of the last characters are the beginning of this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((count for count in range(longest, 0, -1) if self._held.endswith(stop[:count])), 0)


def repeats(ids: Sequence[int], times: int) -> bool:
    """Whether a list ends with one passage of at most LONGEST_PASSAGE ids so many times."""
    for length in range(1, min(LONGEST_PASSAGE, len(ids) // times) + 1):
        tail = ids[len(ids) - length * times :]
        if tail[-1] == tail[-1 - length] and tail[length:] == tail[:-length]:
            return True
    return False
