"""Resolves a path to weights: a file, another program's folder, or the newest results in a run's folder."""

from pathlib import Path

from model.storage.newest_weights import newest_weights, refuse_missing, weights_in_out
from model.weights.formats import FORMATS


def find_weights(path: str | Path | None) -> tuple[Path, str | None]:
    """The file or folder to load, and a line on the choice; None where there was none.

    Args:
        path: a file; a run's folder, whose newest results are taken; another program's folder; None: `out`.

    Raises:
        InputError: there is no such file, or nothing in `out`; the message names the weights in the same folder.
    """
    if path is None:
        return weights_in_out()
    refuse_missing(path)
    path = Path(path).expanduser()
    markers = [known.marker for known in FORMATS.values() if known.marker is not None]
    if path.is_dir() and not any((path / marker).is_file() for marker in markers):
        if (found := newest_weights(path)) is not None:
            return found
    return path, None
