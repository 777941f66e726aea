"""Samples of the changes that cleaning made, before and after, for the user to inspect."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

from model.corpus.cleaning import CHANGES, Cleaner, CleaningOptions
from model.corpus.opening import Source

SAMPLES = 20  # of each kind of change
EXCERPT = 60  # characters shown on either side of the first difference
SWITCHED_OFF = {
    "html": {"html": "none"},
    "control": {"remove_control_characters": False},
    "full_width": {"full_width": "none"},
    "unicode": {"normalization": "none"},
    "whitespace": {"tidy_whitespace": False},
}


class ChangeSamples:
    """Keeps, for each kind of change, the texts with the smallest hashes.

    So they are spread over the whole input, and do not depend on how the work is divided.
    """

    def __init__(self, options: CleaningOptions) -> None:
        self._rows: dict[str, list[dict]] = {name: [] for name in CHANGES}
        self._cleaners = {}  # each makes one kind of change only
        for name in CHANGES:
            others = {key: value for other, off in SWITCHED_OFF.items() if other != name for key, value in off.items()}
            self._cleaners[name] = Cleaner(dataclasses.replace(options, **others))

    def add(self, mask: int, line: int, before: str, after: str) -> None:
        """Add a line's text and what cleaning made of it; `mask`: bit k for CHANGES[k]."""
        key = hashlib.sha256(before.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        for number, name in enumerate(CHANGES):
            if mask >> number & 1 and self._has_room(name, key):
                alone, _ = self._cleaners[name].clean(before)
                if alone == before.strip():  # another change made this one possible
                    alone = after
                self._insert(name, {"key": key, "line": line, **_excerpts(before, alone)})

    def add_all(self, packed: str, lines_before: int, source: Source) -> None:
        """Add the samples of a part; `lines_before`: lines of its source before it."""
        for name, rows in json.loads(packed).items():
            for row in rows:
                if self._has_room(name, row["key"]):
                    line = lines_before + row["line"]
                    self._insert(name, {**row, "line": line + 1, "source": source.name, **source.place_of(line)})

    def _has_room(self, name: str, key: str) -> bool:
        rows = self._rows[name]
        return (len(rows) < SAMPLES or key < rows[-1]["key"]) and all(row["key"] != key for row in rows)

    def _insert(self, name: str, row: dict) -> None:
        self._rows[name].append(row)
        self._rows[name].sort(key=lambda row: row["key"])
        del self._rows[name][SAMPLES:]

    def packed(self) -> str:
        """All samples as JSON, for `add_all`."""
        return json.dumps(self._rows)

    def lines(self) -> Iterator[str]:
        """The lines of the changes file, by kind and then in the input's order."""
        for name, rows in self._rows.items():
            for row in sorted(rows, key=lambda row: (row["source"], row["line"])):
                keys = ("source", "file", "line", "before", "after")
                shown = {"change": name} | {key: row[key] for key in keys if key in row}
                yield json.dumps(shown, ensure_ascii=False) + "\n"


def _excerpts(before: str, after: str) -> dict[str, str]:
    """The two texts around their first difference."""
    first = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    around = slice(max(0, first - EXCERPT), first + EXCERPT)
    return {"before": before[around], "after": after[around]}
