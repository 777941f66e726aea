"""The token files that train_data_path names: one, several, or those that globs match."""

import glob
from collections.abc import Collection
from pathlib import Path

from model.errors import InputError
from model.token_file.manifest import Manifest, read_manifest
from model.training.settings import as_list


def is_one_file(train_data_path: str | list[str]) -> bool:
    """Whether it names one token file, which may not exist yet, and no glob."""
    return isinstance(train_data_path, str) and (Path(train_data_path).exists() or not glob.has_magic(train_data_path))


def find_token_files(train_data_path: str | list[str], leave_out: Collection[str | None] = ()) -> list[list[str]]:
    """The token files that each path or glob of train_data_path stands for; those of a glob in the order of their
    names.

    Args:
        leave_out: files that are not what a glob means, as val_data_path.

    Raises:
        InputError: one of several is missing, is named twice, or nothing matches a glob.
    """
    if is_one_file(train_data_path):
        return [[train_data_path]]
    found, other = [], {Path(path).resolve() for path in leave_out if path is not None}
    for given in as_list(train_data_path):
        if Path(given).exists():
            found.append([given])
        elif not glob.has_magic(given):
            raise InputError(f"train_data_path: no file {given}, one of {len(as_list(train_data_path))} token files")
        else:
            matching = sorted(glob.glob(given, recursive=True))
            found.append([path for path in matching if Path(path).is_file() and Path(path).resolve() not in other])
            if not found[-1]:
                raise InputError(f"train_data_path: no token file matches {given}")
    seen = set()
    for path in (path for paths in found for path in paths):
        if (place := Path(path).resolve()) in seen:
            raise InputError(f"train_data_path: {path} is named twice; train_data_weights can give it a larger share")
        seen.add(place)
    return found


def first_manifest(train_data_path: str | list[str]) -> Manifest | None:
    """The manifest of the first token file that train_data_path names; None where it has none, or is missing."""
    return read_manifest(find_token_files(train_data_path)[0][0])


def files_text(paths: list[str]) -> str:
    """The files in a message: the first one, and how many more."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} more"
