"""Files that are whole at every instant: a crash leaves the old one or the new one."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; flush it to the disk and rename it over `path` at the end.

    If the block raises, `path` stays as it was and the temporary file is removed.

    Raises:
        InputError: the system refuses the writing: a full disk, a folder that is not there or not ours.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written ({reason}); what was there before is untouched") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk too; Windows has no such call
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: str | Path, value) -> None:
    """Write a value as indented UTF-8 JSON, replacing the file in one step."""
    with replacing(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8"))
