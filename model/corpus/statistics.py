"""What data processing counts."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from model.corpus.chats import FORMS
from model.corpus.cleaning import CHANGES
from model.corpus.reasons import OTHER_KIND, REASONS

# Lower ends of the bins. Lengths: eight bins to each doubling from 8 on: 0, 1, 2 … 15, 16, 18, 20 … 2^30.
LENGTHS = np.array([*range(8), *(eighth << power for power in range(27) for eighth in range(8, 16)), 1 << 30])
RATIOS = np.arange(0, 500) / 50  # characters per token
SHARES = np.arange(0, 50) / 50  # of Han characters


class Statistics:
    """Counts over all lines. Every line is a document or is rejected: lines = documents + rejected.

    Lengths and shares are those of the documents as they were kept, whichever file they went to, each counted once. The
    share of Han characters is that of each document's first 512 characters.

    Args:
        vocab_size: 0 where nothing is tokenised.
        delimiters: how many of bos and eos a document has.
        unknown_id: of the token that stands for what has none.

    Attributes:
        lost_bytes: of UTF-8, of all documents, repeated ones too, for which the tokenizer has no token at all.
    """

    def __init__(
        self, source_names: Sequence[str], vocab_size: int = 0, delimiters: int = 0, unknown_id: int | None = None
    ) -> None:
        self.vocab_size, self._delimiters, self._unknown_id = vocab_size, delimiters, unknown_id
        self.lost_bytes = 0
        self.rejected: Counter = Counter()
        self.documents = 0  # lines that became one
        self.documents_written = self.tokens = 0  # in the token file; more documents than lines where some were split
        self.validation_documents = self.validation_tokens = 0
        self.characters = self.utf8_bytes = self.han = self.longer_than_max_length = 0
        self.changed = Counter()
        self._text_tokens = 0  # of the documents, each once, without bos and eos
        self._lengths_in_characters, self._lengths_in_tokens = Bins(LENGTHS), Bins(LENGTHS)
        self._ratios, self._shares = Bins(RATIOS), Bins(SHARES)
        self._id_counts = np.zeros(vocab_size, dtype=np.int64)
        self.turns = 0  # answers of the chats, each chat once
        self.learned = 0  # tokens of answers and their ends in the token file
        self.forms: Counter = Counter()  # chats by form, repeated ones too
        self._turns, self._questions, self._answers = Bins(LENGTHS), Bins(LENGTHS), Bins(LENGTHS)
        self._learned_shares = Bins(SHARES)
        self._other_kind: Counter = Counter()  # lines by source that are of another kind than what is read
        self.sources = [
            {"name": name, "lines": 0, "documents": 0, "rejected": 0, "tokens": 0, "characters": 0}
            for name in source_names
        ]

    @property
    def sources_of_another_kind(self) -> list[str]:
        """The names of sources all of whose lines are, such as texts where chats are read."""
        rows = enumerate(self.sources)
        return [row["name"] for source, row in rows if 0 < row["lines"] == self._other_kind[source]]

    @property
    def lines(self) -> int:
        return self.documents + sum(self.rejected.values())

    def add_documents(self, source: int, table: np.ndarray, piece_sizes: np.ndarray) -> None:
        """Count a part's documents that were kept: DOCUMENT rows, and the sizes of their pieces."""
        self.documents += len(table)
        characters = int(table["characters"].sum())
        self.characters += characters
        self.utf8_bytes += int(table["utf8_bytes"].sum())
        self.han += float(table["han_share"].astype(np.float64) @ table["characters"])
        self.longer_than_max_length += int(table["is_long"].sum())
        masks = np.bincount(table["changes"], minlength=1 << len(CHANGES))  # documents by which changes they had
        self.changed["documents"] += int(masks[1:].sum())
        for number, name in enumerate(CHANGES):
            self.changed[name] += int(masks[np.arange(len(masks)) >> number & 1 > 0].sum())
        self._lengths_in_characters.add(table["characters"])
        self._shares.add(table["han_share"])
        if self.vocab_size:
            text_tokens = table["size"].astype(np.int64) - self._delimiters * table["pieces"]
            self._text_tokens += int(text_tokens.sum())
            self._ratios.add(table["characters"] / np.maximum(text_tokens, 1))
            self._lengths_in_tokens.add(piece_sizes)
        row = self.sources[source]
        for name, count in (("lines", len(table)), ("documents", len(table)), ("characters", characters)):
            row[name] += count

    def add_chats(self, chats: np.ndarray, sizes: np.ndarray, turn_characters: np.ndarray) -> None:
        """Count a part's chats that were kept: CHAT rows, their sizes in tokens, and the characters of each question
        and its answer, [turns, 2]."""
        self.turns += int(chats["turns"].sum())
        self._turns.add(chats["turns"])
        self._questions.add(turn_characters[:, 0])
        self._answers.add(turn_characters[:, 1])
        if self.vocab_size:
            self._learned_shares.add(chats["learned"] / np.maximum(sizes, 1))

    def add_rejected(self, source: int, reasons: Sequence[str]) -> None:
        """Count rejected lines."""
        self.rejected.update(reasons)
        self.sources[source]["lines"] += len(reasons)
        self.sources[source]["rejected"] += len(reasons)
        self._other_kind[source] += sum(reason in OTHER_KIND for reason in reasons)

    def add_written(self, source: int, documents: int, tokens: int, validation: bool, learned: int = 0) -> None:
        """Count what went into a file; `learned`: tokens of chats."""
        if validation:
            self.validation_documents += documents
            self.validation_tokens += tokens
            return
        self.documents_written += documents
        self.tokens += tokens
        self.learned += learned
        self.sources[source]["tokens"] += tokens

    def add_ids(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Count how often each of these ids stands in the token file."""
        self._id_counts[ids] += counts

    @property
    def unknown_tokens(self) -> int:
        """How often the unknown token stands in the token file."""
        return 0 if self._unknown_id is None else int(self._id_counts[self._unknown_id])

    @property
    def characters_per_token(self) -> float | None:
        """Characters per token of text, bos and eos not counted."""
        return self.characters / self._text_tokens if self._text_tokens else None

    def summary(self, max_length: int, long_documents: str) -> dict:
        """The counts for a reader: what `data_stats.json` holds. Lengths in tokens are with bos and eos."""
        ratio, used = self.characters_per_token, int((self._id_counts > 0).sum())
        return {
            "lines": self.lines,
            "documents": self.documents,
            "rejected": sum(self.rejected.values()),
            "rejected_by_reason": {reason: self.rejected[reason] for reason in REASONS if self.rejected[reason]},
            "documents_written": self.documents_written,
            "characters": self.characters,
            "utf8_bytes": self.utf8_bytes,
            "tokens": self.tokens,
            "characters_per_token": round(ratio, 4) if ratio else None,
            "han_share": round(self.han / self.characters, 4) if self.characters else None,
            "max_length": max_length,
            "long_documents": long_documents,
            "documents_longer_than_max_length": self.longer_than_max_length + self.rejected["over_max_length"],
            "changed_by_cleaning": {name: self.changed[name] for name in ("documents", *CHANGES)},
            "validation": {"documents": self.validation_documents, "tokens": self.validation_tokens}
            if self.validation_documents
            else None,
            "vocabulary": {
                "size": self.vocab_size,
                "ids_used": used,
                "unknown_tokens": self.unknown_tokens,
                "lost_bytes": self.lost_bytes,
                "share_used": round(used / self.vocab_size, 4) if self.vocab_size else None,
                "most_frequent": self._most_frequent(),
            },
            "length_in_characters": self._lengths_in_characters.rows(),
            "length_in_tokens": self._lengths_in_tokens.rows(),
            "characters_per_token_of_documents": self._ratios.rows(),
            "han_share_of_documents": self._shares.rows(),
            "sources": self.sources,
        } | ({"chats": self._chats()} if self.turns else {})

    def _chats(self) -> dict:
        """What is counted of chats only."""
        share = self.learned / self.tokens if self.tokens else None
        return {
            "forms": {FORMS[form]: count for form, count in self.forms.most_common()},
            "turns": self.turns,
            "learned_tokens": self.learned,
            "learned_share": share and round(share, 4),
            "turns_of_documents": self._turns.rows(),
            "learned_share_of_documents": self._learned_shares.rows(),
            "question_in_characters": self._questions.rows("turns"),
            "answer_in_characters": self._answers.rows("turns"),
        }

    def _most_frequent(self) -> list[dict]:
        """Which share of all tokens the 1, 2, 4, 8 … most frequent ids make up."""
        if not self.tokens:
            return []
        shares = np.cumsum(np.sort(self._id_counts)[::-1]) / self.tokens
        counts = [1 << power for power in range(self.vocab_size.bit_length()) if 1 << power < self.vocab_size]
        return [
            {"ids": count, "share_of_tokens": round(float(shares[count - 1]), 4)}
            for count in [*counts, self.vocab_size]
        ]


class Bins:
    """A histogram: documents by the bin that their value falls into."""

    def __init__(self, starts: np.ndarray) -> None:
        self.starts = starts
        self.counts = np.zeros(len(starts), dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        bins = np.searchsorted(self.starts, values, side="right") - 1
        self.counts += np.bincount(bins, minlength=len(self.starts))

    def rows(self, counted: str = "documents") -> list[dict]:
        """[{"from": 8, "below": 12, "documents": 3}, …], without empty bins; the last bin has no end."""
        ends = [*self.starts[1:].tolist(), None]
        return [
            {"from": start, "below": end, counted: count}
            for start, end, count in zip(self.starts.tolist(), ends, self.counts.tolist(), strict=True)
            if count
        ]
