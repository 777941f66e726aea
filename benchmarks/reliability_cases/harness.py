"""What every group of cases returns."""

from dataclasses import dataclass, field


@dataclass
class Counts:
    """How many cases there were, and how many passed."""

    cases: int = 0
    passed: int = 0
    failures: list[str] = field(default_factory=list)  # one line for each case that did not pass
    figures: str = ""  # what was measured beside that
