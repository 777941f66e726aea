"""SentencePiece's BPE has a score for each token, the `tokenizers` library's has a list of merges: one from the other.

With scores, any two neighbours are merged that form a token, those with the best score first (`llama-vocab.cpp`). A
list says which two are merged, the first in it first. They are the same where the list has every pair that forms a
token, and has those that form the same one together.
"""

import math
from collections.abc import Container, Iterable, Mapping

from model.errors import shown
from model.storage.gguf_header import Refused


def scores_of(merges: Iterable[list[str]], tokens: list[str], words: Iterable[str]) -> list[float]:
    """Scores of `tokens` that merge as a list of merges does.

    Args:
        words: those of the tokens that come from merging, if they have more than one character.

    Raises:
        Refused: there are none.
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
    """The list of merges that does what scores do.

    Args:
        scores: of the tokens that come from merging, if they have more than one character.
        known: all tokens.

    Raises:
        Refused: there is none.
    """
    by_score: dict[float, str] = {}
    made: dict[str, list[tuple[str, str]]] = {}
    for word, score in scores.items():
        if not math.isfinite(score):
            raise Refused(f"the token {shown(word)} has the score {score}")
        if pairs := _pairs(word, known):
            if other := [part for pair in pairs for part in pair if part not in known]:
                raise Refused(f"the token {shown(word)} is merged from {shown(other[0])}, which is no token")
            if score in by_score:  # the one further left is made first: no list can say so
                raise Refused(f"the tokens {shown(by_score[score])} and {shown(word)} have the same score {score:g}")
            by_score[score], made[word] = word, pairs
    return [list(pair) for score in sorted(by_score, reverse=True) for pair in made[by_score[score]]]


def _pairs(word: str, known: Container[str]) -> list[tuple[str, str]]:
    """What can be merged to a word; a character is there even if it is no token."""
    cuts = [(word[:length], word[length:]) for length in range(1, len(word))]
    return [pair for pair in cuts if all(len(part) == 1 or part in known for part in pair)]
