"""Which weights lie in a run's folder, and which of them to take. No torch is imported here: a missing path is reported
before torch is loaded, which takes seconds.
"""

from pathlib import Path

from model.errors import InputError
from model.storage.part_names import is_part

OUT_DIR = Path("out")  # where training writes by default
FINAL = ("pretrain_*.pth", "sft_*.pth", "dpo_*.pth")  # of pre-training, of tuning on chats, on pairs of answers
BEST, CHECKPOINTS = "best_model.pth", ("checkpoint_*.pth",)
PREVIOUS = "previous"  # the folder within a run's folder that keeps what earlier runs left
NAMED = 5  # files that a message lists at most


def refuse_missing(path: str | Path | None) -> None:
    """Refuse a path of weights that does not exist; None stands for `out`, which must hold some.

    Raises:
        InputError: naming the weights in the same folder.
    """
    if path is None:
        weights_in_out()
    elif not (path := Path(path).expanduser()).exists():
        raise InputError(f"{path.as_posix()}: no such file{_weights_near(path)}")


def weights_in_out() -> tuple[Path, str]:
    """The `newest_weights` where training writes by default.

    Raises:
        InputError: there are none.
    """
    if (found := newest_weights(OUT_DIR)) is None:
        train = "python train.py --config config_demo.yaml"
        raise InputError(f"no weights under {OUT_DIR}/: train first ({train}), or give --model_path")
    return found


def newest_weights(folder: Path) -> tuple[Path, str] | None:
    """The weights to use in a run's folder, with a line that says why; None: there are none.

    Final weights come first, then the best of an unfinished run, then a checkpoint, then earlier runs' results. Runs in
    folders directly within this one count too, as tuning in `out/chat` beside pre-training in `out`.
    """
    under = f"under {folder.as_posix()}/"
    choices = (
        (_and_within(FINAL), f"the newest final weights {under}"),
        (_and_within((BEST,)), f"no final weights ({' or '.join(FINAL)}) {under} yet"),
        (_and_within(CHECKPOINTS), f"the newest checkpoint; no final or best weights {under} yet"),
        (_of_earlier_runs(FINAL), f"the newest of the earlier runs; no weights of a later one {under}"),
        (_of_earlier_runs((BEST,)), f"the newest of the earlier runs; no weights of a later one {under}"),
    )
    for patterns, reason in choices:
        if found := _newest_first(folder, patterns):
            return found[0], f"weights {found[0].as_posix()}: {reason}"
    return None


def _and_within(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return (*patterns, *(f"*/{pattern}" for pattern in patterns))


def _of_earlier_runs(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{PREVIOUS}/*/{pattern}" for pattern in patterns)


def _newest_first(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = [path for pattern in patterns for path in folder.glob(pattern) if not is_part(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _weights_near(path: Path) -> str:
    """The end of a message on a missing file: the weights in its folder."""
    choices = (FINAL, (BEST,), CHECKPOINTS, _of_earlier_runs(FINAL), _of_earlier_runs((BEST,)))
    found = [weights for patterns in choices for weights in _newest_first(path.parent, patterns)]
    if not found:
        return ""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"; there are {', '.join(weights.as_posix() for weights in found[:NAMED])}{more}"
