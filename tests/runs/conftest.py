"""What tests of a run's files share."""

import pytest


class Said(list):
    """What the user is told, but for a matplotlib that is not installed."""

    def append(self, text):
        if "matplotlib is not installed" not in text:
            super().append(text)


@pytest.fixture
def said():
    return Said()
