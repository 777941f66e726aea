"""Documents of more than `max_length` tokens: cut into pieces at the ends of sentences, or cut off."""

import re
from collections.abc import Callable, Sequence

import numpy as np

# A sentence with what ends it: a stop and the closing marks behind it, or a line's end; or a rest without one.
SENTENCE = re.compile(r"""[^。！？!?…\n]*(?:[。！？!?…]+["'”’」』）)】》]*|\n)|[^。！？!?…\n]+""")

NOT_SPACE = re.compile(r"\S|\Z")

CountTokens = Callable[[Sequence[str]], np.ndarray]  # tokens of each text, int64 [len(texts)]


def split_document(text: str, limit: int, count_tokens: CountTokens) -> list[str]:
    """Pieces of at most `limit` tokens, each as long as whole sentences allow; white space around them is cut off.

    A sentence longer than the limit is cut between two characters. A single character of more tokens than `limit` still
    makes a piece.
    """
    sentences = SENTENCE.findall(text)
    groups, start, held = [], 0, 0
    for index, length in enumerate(count_tokens(sentences).tolist()):
        if held and held + length > limit:
            groups.append("".join(sentences[start:index]))
            start, held = index, 0
        held += length
    groups.append("".join(sentences[start:]))
    groups = [stripped for group in groups if (stripped := group.strip())]
    pieces = []
    for group, length in zip(groups, count_tokens(groups).tolist(), strict=True):
        if length <= limit:
            pieces.append(group)
            continue
        start = 0  # in one sentence; rarely, in several with more tokens together than one by one
        while start < len(group):
            pieces.append(cut_document(group, limit, count_tokens, start))
            start = NOT_SPACE.search(group, start + len(pieces[-1])).start()
    return pieces


def cut_document(text: str, limit: int, count_tokens: CountTokens, start: int = 0) -> str:
    """The longest part of a text from `start` on, which is no white space, that has at most `limit` tokens, without the
    white space at its end. Found by bisection; at least one character."""
    left = len(text) - start
    low, high = 1, min(left, 64)  # `low` characters fit, as far as is known

    def fits(size: int) -> bool:
        return count_tokens([text[start : start + size].rstrip()])[0] <= limit

    while fits(high):
        if high == left:
            return text[start:].rstrip()
        low, high = high, min(left, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return text[start : start + low].rstrip()
