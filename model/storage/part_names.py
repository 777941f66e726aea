"""The names of a checkpoint's files where several processes write it: `X.part-00001-of-00004.pth` beside `X.pth`.

`X.pth` is the index, which names the parts; without it they are leftovers of a save that did not end. No torch is
imported here, since the supervisor reads these names too.
"""

import re
from pathlib import Path

PART = re.compile(r"(checkpoint_(?:step|interrupted)_(\d+)(?:_\d+)?)\.part-(\d{5})-of-(\d{5})\.pth")
PARTS = "checkpoint_*.part-*-of-*.pth"  # the same for `glob`


def part_name(stem: str, rank: int, ranks: int) -> str:
    """The file that a rank writes.

    Args:
        stem: `checkpoint_step_{N}`, or what `folder.interrupted_stem` returns.
    """
    return f"{stem}.part-{rank:05}-of-{ranks:05}.pth"


def is_part(path: Path) -> bool:
    """Whether this is the name of a part, not of a checkpoint."""
    return PART.fullmatch(path.name) is not None


def step_of_part(part: Path) -> int:
    """The step of the checkpoint that a part belongs to."""
    return int(PART.fullmatch(part.name)[2])


def index_name(part: Path) -> str:
    """The checkpoint that a part belongs to."""
    stem = PART.fullmatch(part.name)[1]
    return "checkpoint_interrupted.pth" if stem.startswith("checkpoint_interrupted") else f"{stem}.pth"
