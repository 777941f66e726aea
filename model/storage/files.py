"""Files that are whole at every instant: a crash leaves the old one or the new one."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

from model.errors import InputError, first_line
from model.storage.system import is_running

TEMPORARY_SUFFIX = ".tmp"
ABANDONED_SECONDS = 24 * 3600  # without a write, after which another machine's temporary file is removed
MAX_JSON_BYTES = 16 << 20  # of a JSON file; the index of thousands of weights has less
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", re.DOTALL)  # as transformers and llama.cpp name parts
TEMPORARY_NAME = re.compile(
    r"(?P<name>.+)\.(?P<host>[0-9a-f]{4})-(?P<pid>\d{1,10})-[0-9a-f]{4}" + re.escape(TEMPORARY_SUFFIX), re.DOTALL
)
NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # full, or over a limit or a quota
# What file systems answer that cannot flush a folder: some of FUSE, and mounts over a network.
NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES}


@contextlib.contextmanager
def replacing(
    path: str | Path, needed: int | None = None, check: Callable[[Path], None] | None = None
) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; at the end, flush it to the disk and rename it to `path`.

    If the block raises, `path` stays as it was and the temporary file is removed.

    Args:
        needed: about how many bytes will be written, for the message if the disk is full.
        check: called with the temporary file once it is on the disk; if it raises, nothing is replaced.

    Raises:
        InputError: the file cannot be written, as on a full disk or without permission.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with open(temporary, "xb") as file:
            yield file
            flush_to_disk(file)
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except OSError as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        if error.errno in NO_SPACE and needed is not None:
            reason += f": {size_text(needed)} needed, {size_text(written)} could be written"
        raise InputError(f"{path}: cannot be written ({reason}); what was there before is untouched") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        _flush_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: written, but its folder cannot be flushed to the disk ({reason})") from error


def _flush_folder(folder: Path) -> None:
    """Return once renames in a folder are on the disk, where the file system can say so.

    Raises:
        OSError: the disk failed.
    """
    if os.name != "posix":  # Windows has no such call
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other writer uses, in this process or another: `X.<host>-<pid>-<random>.tmp`."""
    return path.with_name(f"{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(2)}{TEMPORARY_SUFFIX}")


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders that killed writers of `path` left.

    Those of living processes stay, and those of other machines for ABANDONED_SECONDS.
    """
    with contextlib.suppress(OSError):  # no such folder, or another writer was faster
        for name in os.listdir(path.parent):
            left, match = path.with_name(name), TEMPORARY_NAME.fullmatch(name)
            if match is None or match["name"] != path.name or not is_abandoned(left):
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Whether this is a temporary file or folder of this program whose writer was killed.

    Those of living processes are not, and those of other machines only ABANDONED_SECONDS after the last write.

    Raises:
        OSError: it has vanished.
    """
    match = TEMPORARY_NAME.fullmatch(path.name)
    if match is None:
        return False
    if match["host"] == _host():
        return not is_running(int(match["pid"]))
    return time.time() - path.stat().st_mtime >= ABANDONED_SECONDS


@functools.cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]  # in two containers, a pid means two processes


def drop_from_cache(path: Path) -> None:
    """Let the next reading of a file come from the disk and not from the system's cache; on Linux only."""
    with contextlib.suppress(AttributeError, OSError), open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush_to_disk(file: IO) -> None:
    """Return once everything written to a file is on the disk.

    Raises:
        OSError: the system could not write it.
    """
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `folder` at the end; if the block raises, it is removed.

    Raises:
        InputError: a file or a folder with content has that name, or the folder cannot be written.
    """
    folder = Path(folder)
    temporary = temporary_path(folder)
    check_is_new(folder)
    try:
        remove_abandoned(folder)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cached_folder(folder: Path, whole: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache; a missing one is filled first.

    Several processes may fill it at once: each fills a temporary folder, and the first to finish renames its own.

    Args:
        whole: a file whose presence shows that the folder is filled.
        fill: called with an empty folder; its exceptions are passed on.

    Raises:
        InputError: the folder cannot be written.
    """
    if (folder / whole).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=folder.name + ".", dir=folder.parent, ignore_cleanup_errors=True
        ) as own:
            filled = Path(own) / folder.name
            filled.mkdir()
            fill(filled)
            if folder.exists() and not (folder / whole).is_file():  # files were removed from it
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first
                os.replace(filled, folder)
        if not (folder / whole).is_file():
            raise InputError(f"{folder}: cannot be written; remove it, or set MATECONV_CACHE to another folder")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return folder


def check_is_new(path: Path) -> None:
    """Check that writing a file or folder there would replace nothing.

    Raises:
        InputError: a file or a folder with content exists.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists already; give another name, or remove it first")


def refuse_overwriting_inputs(outputs: Mapping[str, str | Path], inputs: Iterable[str | Path]) -> None:
    """Check before anything is written that no output is an input, also by way of links or another spelling.

    Args:
        outputs: files or folders to write, by flag.
        inputs: files or folders to read.

    Raises:
        InputError: one of them is.
    """
    inputs = list(inputs)
    for flag, output in outputs.items():
        for path in inputs:
            if is_same_file(Path(output), Path(path)):
                also = "" if str(output) == str(path) else f", which is {path},"
                raise InputError(f"{flag}: {output}{also} is an input and would be overwritten; give another path")


def refuse_overwriting(flag: str, output: str | Path, instead: str = "give another path, or remove it first") -> None:
    """Check before anything is written that an output would replace nothing; an empty file or a device may exist.

    Args:
        instead: the advice that ends the message.

    Raises:
        InputError: a file with content or a folder exists.
    """
    output = Path(output)
    if output.is_dir():
        raise InputError(f"{flag}: {output} is a folder; give the path of a file")
    if output.is_file() and (size := output.stat().st_size):
        raise InputError(f"{flag}: {output} exists already ({size_text(size)}); {instead}")


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to the same file or folder, which need not exist."""
    with contextlib.suppress(OSError):
        return os.path.samefile(first, second)
    # One of them does not exist.
    return os.path.normcase(os.path.realpath(first)) == os.path.normcase(os.path.realpath(second))


def write_json(path: str | Path, value) -> None:
    """Write a value as indented UTF-8 JSON, replacing the file in one step."""
    with replacing(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8"))


def cache_folder() -> Path:
    """The folder for files that can be rebuilt: $MATECONV_CACHE, or mateconv under the user's cache folder."""
    if os.environ.get("MATECONV_CACHE"):
        return Path(os.environ["MATECONV_CACHE"])
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mateconv"


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict:
    """A JSON file of at most `most` bytes that holds an object.

    Raises:
        InputError: it is missing, too large, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"over {most:,} bytes")
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError(f"{type(values).__name__} found")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: a JSON object expected ({first_line(error)})") from error
    return values


def files_of_set(path: Path) -> list[Path]:
    """All files of the numbered set that a file belongs to, such as `model-00001-of-00003.gguf`; otherwise the file.

    Raises:
        InputError: one of them is missing.
    """
    if not (match := NUMBERED.fullmatch(path.name)):
        return [path]
    stem, number, count, suffix = match.groups()
    if not 1 <= int(number) <= int(count):
        return [path]
    present = {other.name for other in path.parent.iterdir()}
    names = [f"{stem}-{n:05}-of-{count}{suffix}" for n in range(1, int(count) + 1)]
    if missing := [name for name in names if name not in present]:
        raise InputError(f"{path}: one of a set of {int(count):,} files; {missing[0]} is missing beside it")
    return [path.with_name(name) for name in names]


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(size: float) -> str:
    """A number of bytes as people write it: "430 MB"."""
    for unit, bytes_per_unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_per_unit:
            return f"{size / bytes_per_unit:.3g} {unit}"
    return f"{size:.0f} bytes"
