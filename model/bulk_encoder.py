"""Turning very many texts into ids: with fastokens where it gives the same ids, else with tokenizers."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from model.tokenization import EMBEDDED_TOKENIZER, encode_texts

CHECKED_CHARACTERS = 200_000  # of the user's own first texts: encoded both ways before fastokens is trusted
TRAPS = ("a</s>b<s>c<unk>", " </s>", "<s>", "", "\ufffd🤔\x00 \u3000", "2019年  12\t月\r\n\n3日", "  ", "don't 'S")


class BulkEncoder:
    """Encodes lists of texts into one flat array, without a Python object for each token.

    fastokens (optional) does it some thirty times faster than tokenizers on Chinese. It is used if it supports the
    tokenizer and gives the same ids for the first texts and for some that are known to be hard.

    Args:
        tokenizer: as `load_tokenizer` returned it.
        tokenizer_path: its folder; None for the embedded one.
        say: prints one line for the user: which of the two is used, and why.
    """

    def __init__(self, tokenizer, tokenizer_path: str | Path | None, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._folder = Path(tokenizer_path or EMBEDDED_TOKENIZER)
        self._fast = None
        self._chosen = False
        self.name = f"tokenizers {version('tokenizers')}"  # for the manifest; fastokens' once it is trusted

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another, int64, and how many each text has, int64 [len(texts)]; no bos, no eos.

        A control token that a text spells out stays text.
        """
        if not texts:
            return np.array([], dtype=np.int64), np.array([], dtype=np.int64)
        if not self._chosen:  # only now: texts of the user's own are what the choice is checked with
            self._choose(texts)
            self._chosen = True
        return self._encode_fast(texts) if self._fast is not None else self._encode_slowly(texts)

    def _encode_slowly(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = encode_texts(self._tokenizer, texts)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        flat = np.fromiter((index for ids in encoded for index in ids), dtype=np.int64, count=int(lengths.sum()))
        return flat, lengths

    def _encode_fast(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, "<u4").astype(np.int64), np.diff(np.frombuffer(offsets, "<u8")).astype(np.int64)

    def _choose(self, texts: Sequence[str]) -> None:
        try:
            import fastokens
        except ImportError:
            self._say("encoder tokenizers: fastokens, which is some thirty times faster, is not installed")
            return
        try:
            self._fast = fastokens.Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        except ValueError as error:  # its word for a part that it does not support
            self._say(f"encoder tokenizers: fastokens does not support this tokenizer ({error})")
            return
        sample, characters = list(TRAPS), 0
        for text in texts:
            sample.append(text)
            characters += len(text)
            if characters > CHECKED_CHARACTERS:
                break
        if not all(map(np.array_equal, self._encode_fast(sample), self._encode_slowly(sample))):
            self._fast = None
            self._say("encoder tokenizers: fastokens gives other ids for this tokenizer")
            return
        self.name = f"fastokens {version('fastokens')}"
        self._say(f"encoder {self.name}: the same ids as tokenizers on the first {len(sample) - len(TRAPS):,} texts")


def with_bos_and_eos(ids: np.ndarray, lengths: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """`<bos> ids <eos>` of each text, one after another: ids int64 [N], lengths int64 [D] -> int64 [N + 2 D]."""
    ends = np.cumsum(lengths + 2)
    tokens = np.full(len(ids) + 2 * len(lengths), eos, dtype=np.int64)
    inside = np.ones(len(tokens), dtype=bool)
    inside[ends - 1] = False
    starts = ends - (lengths + 2)
    inside[starts] = False
    tokens[starts] = bos
    tokens[inside] = ids
    return tokens
