"""Bytes of text behind token ids: they turn a loss in nats into bits per byte, which compares across tokenizers.

For a tokenizer that preserves the text, the bytes are those of the text itself: with byte-level BPE, with byte tokens
like `<0xE4>`, with spaces spelled `▁`, and without the space that many tokenizers prepend to a text. For one that
changes the text (normalizes it, drops white space, lacks a character), they are those of the text that it decodes to;
an unknown token counts 0 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from model.text.encoder import decode, library_errors
from model.text.tokenization import (
    byte_value,
    control_ids,
    encode_texts,
    end_ids,
    is_byte_fallback,
    is_byte_level,
    vocabulary_size,
)

EAST_ASIAN = "\u2e80"  # from here on BERT's tokenizers split a text at each character, without a space in it


@dataclass(frozen=True)
class TokenBytes:
    """UTF-8 bytes of the text behind ids; each array has one item per id.

    Attributes:
        lengths: int64, bytes of the token in the middle of a text.
        is_text: bool, False for control tokens.
        spaced: bool, the token begins with a space.
        opens: bool, a text that begins after this token gets a prepended space.
    """

    lengths: np.ndarray
    is_text: np.ndarray
    spaced: np.ndarray
    opens: np.ndarray

    def count(self, before: np.ndarray, ids: np.ndarray) -> int:
        """Bytes of the tokens `ids`, each of which follows its item in `before`."""
        return int(self.lengths[ids].sum() - (self.opens[before] & self.spaced[ids]).sum())


def token_bytes(tokenizer, rows: int | None = None) -> TokenBytes:
    """The bytes of a tokenizer's tokens.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        rows: of the embedding; ids past the tokenizer's last count 0 bytes.
    """
    rows = rows or vocabulary_size(tokenizer)
    control, added = control_ids(tokenizer), tokenizer.added_tokens_decoder
    delimiting = {tokenizer.bos_token_id, *end_ids(tokenizer)}
    lengths, spaced = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=bool)
    is_text, opens = np.ones(rows, dtype=bool), np.zeros(rows, dtype=bool)
    ordinary = {index: token for token, index in tokenizer.get_vocab().items() if index not in control}
    words = {}  # the first word with a leading space, and the first without
    for index, text in _texts(tokenizer, ordinary, set(added)).items():
        lengths[index], spaced[index] = len(text), text.startswith(b" ")
        if (space := bool(spaced[index])) not in words and (word := text.decode("utf-8", "replace").strip()).isalnum():
            words[space] = word
    word = words.get(True, words.get(False))
    is_text[[index for index in control if index != tokenizer.unk_token_id or index in delimiting]] = False
    if word is not None:

        def puts_space(before: str) -> bool:
            return lengths[encode_texts(tokenizer, [before + word])[0]].sum() > len((before + word).encode())

        opens[list(control)] = puts_space("")
        others = [index for index in added if index not in control]
        opens[others] = bool(others) and puts_space(str(added[others[0]]))
    return TokenBytes(lengths, is_text, spaced, opens)


def _texts(tokenizer, tokens: dict[int, str], added: set[int]) -> dict[int, bytes]:
    """The bytes that each token adds in the middle of a text."""
    if is_byte_level(tokenizer):  # one character per byte, except in added tokens
        spell: Callable[[str], bytes] = lambda token: token.replace("Ġ", " ").encode("latin-1", "replace")  # noqa: E731
        return {index: token.encode() if index in added else spell(token) for index, token in tokens.items()}
    backend = tokenizer.backend_tokenizer
    found = {}
    if is_byte_fallback(tokenizer):
        found = {index: bytes([value]) for index, token in tokens.items() if (value := byte_value(token)) is not None}
        begin = end = backend.token_to_id("<0x61>")
    else:
        begin = end = next((index for index in tokens if decode(backend, [index]).strip().isalnum()), None)
    if begin is None:
        return found
    rest = [index for index in tokens if index not in found]
    with library_errors("the tokenizer cannot turn its tokens into text"):
        decoded = backend.decode_batch([[begin, index, end] for index in rest], skip_special_tokens=False)
    first, both = decode(backend, [begin]), decode(backend, [begin, end])
    is_word_piece = "WordPiece" in repr(backend.decoder)
    for index, text in zip(rest, decoded, strict=True):
        text = text[len(first) : len(text) - (len(both) - len(first))]
        if is_word_piece and text[:1] == " " and text[1:2] >= EAST_ASIAN:
            text = text[1:]
        found[index] = text.encode()
    return found
