"""Ids to text, one id at a time, in whole characters.

By definition, the text of a generation is the joined pieces of a detokenizer: a stream shows what a call returns.
"""

import codecs
from collections.abc import Sequence

from model.text.encoder import decode
from model.text.tokenization import byte_value, control_ids, is_byte_fallback, is_byte_level

WINDOW = 8  # tokens that a tokenizer without bytes needs to see to place its spaces
LONGEST_PASSAGE = 64  # tokens of a passage whose repeats end a text
LONGEST_CHARACTER = 4  # bytes, and so at most as many tokens


def new_detokenizer(tokenizer, prompt_ids: Sequence[int] = ()) -> "ByteDetokenizer | WindowDetokenizer":
    """The detokenizer for the ids after `prompt_ids`: call `push(id)` for each, then `flush()`.

    Where the prompt ends within a character, the text begins with that character.
    """
    in_bytes = is_byte_level(tokenizer) or is_byte_fallback(tokenizer)
    return (ByteDetokenizer if in_bytes else WindowDetokenizer)(tokenizer, prompt_ids)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for a byte in byte-level tokens -> the byte.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for the characters from U+0100 on
    (`bytes_to_unicode` in openai/gpt-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = byte_alphabet()


class ByteDetokenizer:
    """Tokens -> bytes -> an incremental UTF-8 decoder, which holds back only the bytes of an unfinished character.

    For byte-level BPE and for tokenizers that spell rare characters in byte tokens (SentencePiece). Invalid UTF-8
    becomes U+FFFD at once; a genuine U+FFFD in the text is a character like any other.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._backend, self._silent = tokenizer.backend_tokenizer, control_ids(tokenizer)
        self._byte_level = is_byte_level(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        before = [index for index in prompt_ids if index not in self._silent]
        self._begun = bool(before)
        for index in before[-LONGEST_CHARACTER:]:  # an unfinished character lies in these
            self.push(index)

    def push(self, index: int) -> str:
        """The text that this token completes, often "". Control tokens and unknown ids add none."""
        content = self.content(index)
        if index not in self._silent and self._backend.id_to_token(index) is not None:
            self._begun = True
        return self._decoder.decode(content)

    def content(self, index: int) -> bytes:
        """The bytes that this token adds to the text so far; none for control tokens and unknown ids."""
        token = self._backend.id_to_token(index)
        if token is None or index in self._silent:
            return b""
        return self._in_alphabet(token) if self._byte_level else self._in_context(index, token)

    def flush(self) -> str:
        """The bytes still held back, as U+FFFD; the detokenizer is then ready for a new text."""
        return self._decoder.decode(b"", final=True)

    def _in_alphabet(self, token: str) -> bytes:
        if all(character in BYTE_ALPHABET for character in token):
            return bytes(BYTE_ALPHABET[character] for character in token)
        return token.encode("utf-8")  # an added token is spelled as plain text

    def _in_context(self, index: int, token: str) -> bytes:
        """A token's bytes; the decoder strips the space of one that begins a text."""
        if (byte := byte_value(token)) is not None:
            return bytes([byte])
        if not self._begun:
            return decode(self._backend, [index]).encode("utf-8")
        before = self._backend.token_to_id("<0x61>")
        return decode(self._backend, [before, index])[1:].encode("utf-8")


class WindowDetokenizer:
    """For other tokenizers: tokens are whole characters, and spaces depend on the token before.

    Decodes a short window with and without the new token; the difference is the new text.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._backend, self._silent = tokenizer.backend_tokenizer, control_ids(tokenizer)
        self._window = [index for index in prompt_ids if index not in self._silent][-WINDOW:]

    def push(self, index: int) -> str:
        """The token's text; control tokens have none."""
        text = self.content(index).decode("utf-8", "replace")
        if index not in self._silent:
            self._window = [*self._window, index][-WINDOW:]
        return text

    def content(self, index: int) -> bytes:
        """The bytes of the token's text after those so far."""
        if index in self._silent:
            return b""
        return self._decode([*self._window, index])[len(self._decode(self._window)) :].encode("utf-8", "replace")

    def flush(self) -> str:
        """Always "": nothing is held back."""
        return ""

    def _decode(self, ids: list[int]) -> str:
        return decode(self._backend, ids)


class Text:
    """A text that grows token by token, and ends at a stop string or a repetition if the model does not end it first.

    Args:
        detokenizer: turns its tokens into text.
        stop_strings: the text ends before the first of these; a possible beginning of one is held back.
        max_repeats: the text ends once a passage occurs this often in a row; 0: never.
    """

    def __init__(
        self,
        detokenizer: ByteDetokenizer | WindowDetokenizer,
        stop_strings: Sequence[str] = (),
        max_repeats: int = 0,
    ) -> None:
        self._detokenizer, self._stop_strings, self._max_repeats = detokenizer, tuple(stop_strings), max_repeats
        self._ids: list[int] = []
        self._held = ""

    def push(self, token: int | None, end: str | None = None) -> tuple[str, str | None]:
        """The next piece of text to show, and why the text ends (None: it does not).

        Args:
            token: None if the text ends without another token.
            end: why the model ends the text here; None if it does not.
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
        """Length of the longest tail of the held text that begins this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((count for count in range(longest, 0, -1) if self._held.endswith(stop[:count])), 0)


def repeats(ids: Sequence[int], times: int) -> bool:
    """Whether a list ends with `times` repeats of one passage of at most LONGEST_PASSAGE ids."""
    for length in range(1, min(LONGEST_PASSAGE, len(ids) // times) + 1):
        tail = ids[len(ids) - length * times :]
        if tail[-1] == tail[-1 - length] and tail[length:] == tail[:-length]:
            return True
    return False
