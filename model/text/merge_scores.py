"""Converts between the two forms of BPE: SentencePiece's score per token and the `tokenizers` library's list of merges.

With scores, any two neighbours that form a token merge, the best score first (`llama-vocab.cpp`). With a list, the
pairs in it merge, in its order. The two agree if the list has every pair that forms a token and keeps the pairs of one
token together.
"""

import math
from collections.abc import Container, Iterable, Mapping

from model.errors import shown
from model.storage.gguf_header import Refused


def scores_of(merges: Iterable[list[str]], tokens: list[str], words: Iterable[str]) -> list[float]:
    """Scores for `tokens` that are equivalent to a list of merges.

    Args:
        words: the tokens that merging makes, except single characters.

    Raises:
        Refused: no scores are equivalent.
    """
    ranks: dict[str, int] = {}
    pairs = set()
    for left, right in merges:
        pairs.add((left, right))
        if ranks.setdefault(left + right, len(ranks)) != len(ranks) - 1:
            raise Refused(f"its merges that make {shown(left + right)} are not together, as SentencePiece's are")
    known = set(tokens)
    for word in words:
        for left, right in _pairs(word, known):
            if (left, right) not in pairs:
                raise Refused(f"its merges lack {shown(f'{left} {right}')}: SentencePiece merges all that make a token")
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def merges_of(scores: Mapping[str, float], known: Container[str]) -> list[list[str]]:
    """The list of merges that is equivalent to scores.

    Args:
        scores: of the tokens that merging makes, except single characters.
        known: all tokens.

    Raises:
        Refused: no list is equivalent.
    """
    by_score: dict[float, str] = {}
    made: dict[str, list[tuple[str, str]]] = {}
    for word, score in scores.items():
        if not math.isfinite(score):
            raise Refused(f"the token {shown(word)} has the score {score}")
        if pairs := _pairs(word, known):
            if other := [part for pair in pairs for part in pair if part not in known]:
                raise Refused(f"the token {shown(word)} is merged from {shown(other[0])}, which is no token")
            if score in by_score:  # the leftmost merges first: no list can express that
                raise Refused(f"the tokens {shown(by_score[score])} and {shown(word)} have the same score {score:g}")
            by_score[score], made[word] = word, pairs
    return [list(pair) for score in sorted(by_score, reverse=True) for pair in made[by_score[score]]]


def _pairs(word: str, known: Container[str]) -> list[tuple[str, str]]:
    """The pairs that merge into a word; single characters always exist, tokens or not."""
    cuts = [(word[:length], word[length:]) for length in range(1, len(word))]
    return [pair for pair in cuts if all(len(part) == 1 or part in known for part in pair)]
