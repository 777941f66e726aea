"""Resolves a path to weights: a file, another program's folder, or the newest results in a run's folder."""

from pathlib import Path

from model.errors import InputError
from model.weights.formats import FORMATS

OUT_DIR = Path("out")  # where training writes by default
FINAL, BEST, CHECKPOINTS = "pretrain_*.pth", "best_model.pth", "checkpoint_*.pth"
PREVIOUS = "previous"  # the folder within a run's folder that keeps what earlier runs left
NAMED = 5  # files that a message lists at most


def find_weights(path: str | Path | None) -> tuple[Path, str | None]:
    """The file or folder to load, and a line on the choice; None where there was none.

    Args:
        path: a file; a run's folder, whose newest results are taken; another program's folder; None: `out`.

    Raises:
        InputError: there is no such file, or nothing in `out`; the message names the weights in the same folder.
    """
    if path is None:
        if (found := newest_weights(OUT_DIR)) is not None:
            return found
        raise InputError(f"no weights under {OUT_DIR}/: train first (python train.py), or give --model_path")
    path = Path(path).expanduser()
    markers = [known.marker for known in FORMATS.values() if known.marker is not None]
    if path.is_dir() and not any((path / marker).is_file() for marker in markers):
        if (found := newest_weights(path)) is not None:
            return found
    if not path.exists():
        raise InputError(f"{path.as_posix()}: no such file{_weights_near(path)}")
    return path, None


def newest_weights(folder: Path) -> tuple[Path, str] | None:
    """The weights to use in a run's folder, with a line that says why; None: there are none.

    Final weights come first, then the best of an unfinished run, then a checkpoint, then earlier runs' results.
    """
    under = f"under {folder.as_posix()}/"
    choices = (
        (FINAL, f"the newest final weights {under}"),
        (BEST, f"no final weights ({FINAL}) {under} yet"),
        (CHECKPOINTS, f"the newest checkpoint; no final or best weights {under} yet"),
        (f"{PREVIOUS}/*/{FINAL}", f"the newest of the earlier runs; no weights of a later one {under}"),
        (f"{PREVIOUS}/*/{BEST}", f"the newest of the earlier runs; no weights of a later one {under}"),
    )
    for pattern, reason in choices:
        if found := _newest_first(folder, pattern):
            return found[0], f"weights {found[0].as_posix()}: {reason}"
    return None


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)


def _weights_near(path: Path) -> str:
    """The end of a message on a missing file: the weights in its folder."""
    patterns = (FINAL, BEST, CHECKPOINTS, f"{PREVIOUS}/*/{FINAL}", f"{PREVIOUS}/*/{BEST}")
    found = [weights for pattern in patterns for weights in _newest_first(path.parent, pattern)]
    if not found:
        return ""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"; there are {', '.join(weights.as_posix() for weights in found[:NAMED])}{more}"
