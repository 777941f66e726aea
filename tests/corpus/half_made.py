"""A data processing job that ends half-way, and what its folder holds."""

import os
from pathlib import Path

import pytest

from model.corpus.job_folder import job_path


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.parent.iterdir() if path.name.startswith(output.stem)}


class Killed(BaseException):
    """Stands for the end of the process at one exact place."""


def begin_and_stop(processor, raw: Path, output: Path, monkeypatch, method: str = "process_dataset") -> None:
    """Leave a half-made output with some of its parts."""
    made = [0]

    def stop(path, mode=None, original=os.replace):
        made[0] += str(mode).endswith(".npz")
        if made[0] == 4:
            raise Killed
        original(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(Killed):
            getattr(processor, method)(raw, output)
    assert len(list(job_path(output).glob("*.npz"))) == 3
