"""Turning many texts into ids: with fastokens where it gives the same ids, else with tokenizers."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from model.errors import counted
from model.text.encoder import can_panic, encode_batch, load_backend
from model.text.tokenization import BulkTokenizer, Delimiters

CHECKED_CHARACTERS = 100_000  # of the user's first texts, encoded by both packages before fastokens is trusted
TRAPS = ("a</s>b<s>c<unk>", " </s>", "<s>", "", "\ufffd🤔\x00 \u3000", "2019年  12\t月\r\n\n3日", "  ", "don't 'S")


@dataclass(frozen=True)
class EncoderChoice:
    """Which package encodes, and the tokenizer it reads; small enough to be sent to each worker process."""

    package: str  # "fastokens" or "tokenizers"
    tokenizer_json: str

    @property
    def name(self) -> str:
        """For the manifest: the package and its version."""
        return f"{self.package} {version(self.package)}"


class BulkEncoder:
    """Encodes lists of texts into one flat array. A control token that a text spells out stays text."""

    def __init__(self, choice: EncoderChoice) -> None:
        self.name, self._json, self._slow = choice.name, choice.tokenizer_json, None
        self._encode = self._encode_slowly
        if choice.package == "fastokens":
            self._fast = _load_fast(choice.tokenizer_json)
            self._encode = self._encode_fast

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another, uint32, and how many each has, int64 [len(texts)]; no bos, no eos."""
        if not texts:
            return np.array([], dtype=np.uint32), np.array([], dtype=np.int64)
        return self._encode(list(texts))

    def _encode_slowly(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self._slow = self._slow or load_backend(self._json)
        encoded = encode_batch(self._slow, texts, can_panic(self._json))
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return np.fromiter((index for ids in encoded for index in ids), np.uint32, count=int(lengths.sum())), lengths

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self._fast.encode_batch_flat(texts, split_special_tokens=True)
        except ValueError:  # it refuses symbols without a token; tokenizers skips them, and LossCounter counts them
            if len(texts) == 1:
                return self._encode_slowly(texts)
            half = len(texts) // 2
            parts = self._encode_fast(texts[:half]), self._encode_fast(texts[half:])
            return tuple(map(np.concatenate, zip(*parts, strict=True)))
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))


@functools.lru_cache(maxsize=1)
def _load_fast(tokenizer_json: str):
    """A tokenizer of fastokens; kept, since the process that chose it encodes with it where the input is small."""
    import fastokens

    return fastokens.Tokenizer.from_json_str(tokenizer_json)


def choose_encoder(tokenizer: BulkTokenizer, texts: Sequence[str], say: Callable[[str], None]) -> EncoderChoice:
    """Choose fastokens, some thirty times faster than tokenizers on Chinese, if it is installed, supports the tokenizer
    and gives the same ids for `texts` and for some hard cases.

    Args:
        tokenizer: as `load_bulk_tokenizer` returned it.
        texts: the user's first texts; CHECKED_CHARACTERS of them are compared.
        say: prints a line for the user: the choice and its reason.
    """
    slow = EncoderChoice("tokenizers", tokenizer.json)
    try:
        import fastokens  # noqa: F401 (whether it is there)
    except ImportError:
        say("encoder tokenizers; fastokens, some thirty times faster, is not installed: pip install fastokens")
        return slow
    fast = EncoderChoice("fastokens", tokenizer.json)
    try:
        fast_encoder = BulkEncoder(fast)
    except ValueError as error:  # an unsupported part
        say(f"encoder tokenizers: fastokens does not support this tokenizer ({error})")
        return slow
    sample, characters = list(TRAPS), 0
    for text in texts:
        sample.append(text[:CHECKED_CHARACTERS])
        characters += len(text)
        if characters > CHECKED_CHARACTERS:
            break
    if not all(map(np.array_equal, fast_encoder.encode(sample), BulkEncoder(slow).encode(sample))):
        say("encoder tokenizers: fastokens gives other ids for this tokenizer")
        return slow
    if checked := len(sample) - len(TRAPS):
        say(f"encoder {fast.name}: the same ids as tokenizers on the first {counted(checked, 'text')}")
    return fast


def with_bos_and_eos(ids: np.ndarray, lengths: np.ndarray, bos: int | None, eos: int, dtype: np.dtype) -> np.ndarray:
    """`<bos> ids <eos>` of each text, one after another, as `dtype`: ids [N], lengths int64 [D] -> [N + 2 D].

    Without a bos `ids <eos>`: -> [N + D].
    """
    added = Delimiters(bos, eos).count
    ends = np.cumsum(lengths + added)
    tokens = np.empty(len(ids) + added * len(lengths), dtype=dtype)
    inside = np.ones(len(tokens), dtype=bool)
    inside[ends - 1] = False
    starts = ends - (lengths + added)
    if bos is not None:
        inside[starts] = False
        tokens[starts] = bos
    tokens[inside] = ids
    tokens[ends - 1] = eos
    return tokens
