"""Text that a tokenizer has no token for: it becomes the unknown token, or is lost silently."""

import json
import re
from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel

from model.text.encoder import load_backend


class LossCounter:
    """Counts the bytes of texts that vanish when they are encoded.

    Only BPE loses anything: without an unknown token it skips symbols that are missing from its vocabulary, which are
    characters or, in byte-level BPE, bytes. Other models fail, or have an unknown token.

    Args:
        tokenizer_json: of the `tokenizers` library.
    """

    def __init__(self, tokenizer_json: str) -> None:
        tokenizer = json.loads(tokenizer_json)
        model = tokenizer["model"]
        self._vocabulary = model["vocab"]
        self._is_byte_level = "ByteLevel" in json.dumps([tokenizer["pre_tokenizer"], tokenizer["normalizer"]])
        bytes_kept = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in self._vocabulary for byte in range(256))
        self.can_lose = (
            model["type"] == "BPE"
            and model.get("unk_token") is None
            and not bytes_kept
            and not (self._is_byte_level and all(symbol in self._vocabulary for symbol in ByteLevel.alphabet()))
        )
        if not self.can_lose:
            return
        self._keeps_words = model.get("ignore_merges")  # a word that is one token needs no symbols
        around = (model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or "")
        known = {token.removeprefix(around[0]).removesuffix(around[1]) for token in self._vocabulary}
        symbols = "".join(re.escape(token) for token in known if len(token) == 1)
        self._unknown = re.compile(f"[^{symbols}]" if symbols else r"[\s\S]")
        self._added = [token["content"] for token in tokenizer["added_tokens"] if not token["special"]]
        backend = load_backend(tokenizer_json)
        self._normalize = backend.normalizer.normalize_str if backend.normalizer else str
        self._words = backend.pre_tokenizer.pre_tokenize_str if backend.pre_tokenizer else lambda text: [(text, None)]

    def count(self, texts: Sequence[str]) -> int:
        """UTF-8 bytes of the normalized texts that no id stands for."""
        return sum(map(self._count, texts)) if self.can_lose else 0

    def _count(self, text: str) -> int:
        for token in self._added:
            text = text.replace(token, "")
        words = [word for word, _ in self._words(self._normalize(text))]
        if self._keeps_words:
            words = [word for word in words if word not in self._vocabulary]
        lost = self._unknown.findall("".join(words))
        return len(lost) if self._is_byte_level else len("".join(lost).encode())
