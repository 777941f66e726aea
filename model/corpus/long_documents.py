"""Documents of more than `max_length` tokens: cut into pieces at the ends of sentences, or cut off."""

import re
from collections.abc import Callable, Sequence

import numpy as np

# A sentence with what ends it: a stop and the closing marks behind it, or a line's end; or a rest without one.
SENTENCE = re.compile(r"""[^。！？!?…\n]*(?:[。！？!?…]+["'”’」』）)】》]*|\n)|[^。！？!?…\n]+""")

CountTokens = Callable[[Sequence[str]], np.ndarray]  # tokens of each text, int64 [len(texts)]


def split_document(text: str, limit: int, count_tokens: CountTokens) -> list[str]:
    """Pieces of at most `limit` tokens, each as long as whole sentences allow; white space around them is cut off.

    A sentence that alone is too long is cut where it must be, between two characters. A character of more tokens than
    `limit` is a piece of its own.
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
        while length > limit and group:  # one sentence; rarely, several with more tokens together than one by one
            piece = cut_document(group, limit, count_tokens)
            group = group[len(piece) :]
            pieces.append(piece)
        pieces += [group] if length <= limit else []
    return [stripped for piece in pieces if (stripped := piece.strip())]


def cut_document(text: str, limit: int, count_tokens: CountTokens) -> str:
    """The longest beginning of a text that has at most `limit` tokens, found by bisection; at least one character."""
    low, high = 1, min(len(text), 64)  # `low` characters fit, as far as is known
    while high < len(text) and count_tokens([text[:high]])[0] <= limit:
        low, high = high, min(len(text), 2 * high)
    if count_tokens([text[:high]])[0] <= limit:
        return text[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens([text[:middle]])[0] <= limit:
            low = middle
        else:
            high = middle
    return text[:low]
