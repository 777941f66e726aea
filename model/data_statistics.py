"""What data processing counts, as JSON and as a picture."""

import base64
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

# Lower ends of the histograms' bins, two to each doubling: 0, 1, 2, 3, 4, 6, 8, 12, 16 … 2^30.
BIN_STARTS = np.array([0, 1, 2, *(size for power in range(1, 30) for size in (3 << (power - 1), 4 << (power - 1)))])


@dataclass
class Statistics:
    """Counts over the lines read so far. Every line is a document or is rejected: lines = documents + rejected."""

    max_length: int  # tokens
    vocab_size: int = 0  # 0 where nothing was tokenised
    lines: int = 0
    documents: int = 0
    rejected: Counter = field(default_factory=Counter)  # lines by reason (jsonl.REASONS)
    characters: int = 0  # of the documents, white space around them cut off
    utf8_bytes: int = 0
    tokens: int = 0  # with bos and eos
    longer_than_max_length: int = 0  # documents of more than max_length tokens, with bos and eos; they are kept whole
    length_in_characters: np.ndarray = field(default_factory=lambda: np.zeros(len(BIN_STARTS), dtype=np.int64))
    length_in_tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(BIN_STARTS), dtype=np.int64))
    ids_used: np.ndarray | None = None  # bool [vocab_size]

    def __post_init__(self) -> None:
        if self.ids_used is None:
            self.ids_used = np.zeros(self.vocab_size, dtype=bool)

    def count_texts(self, texts: list[str]) -> None:
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.documents += len(texts)
        self.characters += int(lengths.sum())
        self.utf8_bytes += sum(len(text.encode("utf-8")) for text in texts)
        self.length_in_characters += _bin(lengths)

    def count_tokens(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Count tokens with bos and eos: `ids` of all documents, one after another, and the documents' lengths."""
        self.tokens += len(ids)
        self.ids_used[ids] = True
        self.length_in_tokens += _bin(lengths)
        self.longer_than_max_length += int((lengths > self.max_length).sum())

    @property
    def characters_per_token(self) -> float | None:
        """Characters a token of text, bos and eos not counted."""
        of_text = self.tokens - 2 * self.documents
        return self.characters / of_text if of_text > 0 else None

    def to_record(self) -> dict:
        """Everything, as JSON values; `from_record` reads it."""
        return asdict(self) | {
            "rejected": dict(sorted(self.rejected.items())),
            "length_in_characters": self.length_in_characters.tolist(),
            "length_in_tokens": self.length_in_tokens.tolist(),
            "ids_used": base64.b64encode(np.packbits(self.ids_used).tobytes()).decode("ascii"),
        }

    @classmethod
    def from_record(cls, record: dict) -> "Statistics":
        bits = np.unpackbits(np.frombuffer(base64.b64decode(record["ids_used"]), dtype=np.uint8))
        return cls(
            **record
            | {
                "rejected": Counter(record["rejected"]),
                "length_in_characters": np.array(record["length_in_characters"], dtype=np.int64),
                "length_in_tokens": np.array(record["length_in_tokens"], dtype=np.int64),
                "ids_used": bits[: record["vocab_size"]].astype(bool),
            }
        )

    def summary(self) -> dict:
        """The counts for a reader: what `data_stats.json` holds. Lengths in tokens are with bos and eos."""
        ratio = self.characters_per_token
        used = int(self.ids_used.sum())
        return {
            "lines": self.lines,
            "documents": self.documents,
            "rejected": sum(self.rejected.values()),
            "rejected_by_reason": dict(sorted(self.rejected.items())),
            "characters": self.characters,
            "utf8_bytes": self.utf8_bytes,
            "tokens": self.tokens,
            "characters_per_token": round(ratio, 4) if ratio else None,
            "max_length": self.max_length,
            "documents_longer_than_max_length": self.longer_than_max_length,
            "vocabulary": {
                "size": self.vocab_size,
                "ids_used": used,
                "share_used": round(used / self.vocab_size, 4) if self.vocab_size else None,
            },
            "length_in_characters": _bins_with_documents(self.length_in_characters),
            "length_in_tokens": _bins_with_documents(self.length_in_tokens),
        }


def _bin(lengths: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(BIN_STARTS, lengths, side="right") - 1, minlength=len(BIN_STARTS))


def _bins_with_documents(counts: np.ndarray) -> list[dict]:
    """[{"from": 8, "below": 12, "documents": 3}, …], empty bins left out."""
    ends = [*BIN_STARTS[1:].tolist(), None]
    return [
        {"from": start, "below": end, "documents": count}
        for start, end, count in zip(BIN_STARTS.tolist(), ends, counts.tolist(), strict=True)
        if count
    ]


def draw_summary(path: Path, summary: dict) -> None:
    """Draw a summary's lengths and outcomes as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, unit in zip(axes, ("characters", "tokens"), strict=False):
        bins = summary[f"length_in_{unit}"]
        axis.bar([str(row["from"]) for row in bins], [row["documents"] for row in bins], width=0.9)
        axis.set(title=f"Document length in {unit}", xlabel=f"{unit}, from", ylabel="documents")
        axis.tick_params(axis="x", rotation=60)
    outcomes = {"documents": summary["documents"], **summary["rejected_by_reason"]}
    bars = axes[2].barh(list(outcomes), list(outcomes.values()))
    axes[2].bar_label(bars, [f"{count:,}" for count in outcomes.values()], padding=3)
    axes[2].set(title=f"What became of {summary['lines']:,} lines", xscale="symlog", xlabel="lines")
    axes[2].margins(x=0.25)
    axes[2].invert_yaxis()
    figure.savefig(path, dpi=110)
