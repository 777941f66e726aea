"""Finds the files and datasets that paths, folders, globs, `datasets:NAME` and `ms:NAME` stand for."""

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from model.command import say
from model.corpus.inspection import PACKINGS, holds_documents
from model.corpus.opening import EXPECTED, TXT_DOCUMENTS, Source, WrongEncoding, is_chat_table, recognise
from model.corpus.streams import DATASETS, MODELSCOPE, STREAMED
from model.errors import InputError
from model.token_file.manifest import MOST_SOURCES

_PACKED = ("", *(f".{packing}" for packing in PACKINGS))
# Endings, in lower case, of the files that are read in a folder.
ENDINGS = (*(f".{form}{packed}" for form in ("jsonl", "ndjson") for packed in _PACKED), ".parquet")
TXT_ENDINGS, JSON_ENDINGS, CSV_ENDINGS = (
    tuple(f".{form}{packed}" for packed in _PACKED) for form in ("txt", "json", "csv")
)
COMPANIONS = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|authors|citation|requirements)\b", re.IGNORECASE)
OUR_ENDINGS = (".rejects.jsonl", ".changes.jsonl")  # what data processing itself left there
NAMED = 5  # skipped files that a message names


def find_sources(
    inputs: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
    leave_out: Collection[Path] = (),
    text_field: str = "text",
    txt_documents: str = "file",
) -> list[Source]:
    """The files and datasets that paths, folders, globs, `datasets:…` and `ms:…` stand for, in the order given.

    The files of a folder or a glob come in the order of their names. In a folder JSONL and Parquet are read, .json that
    holds documents, and where there is nothing else CSV of chats or else .txt. Skipped, with one line that says so:
    hidden and empty files, those that accompany a corpus, text in another encoding than UTF-8, links to folders,
    broken links, and files named as data processing names its own. Files that this job is about to write (`leave_out`,
    resolved paths) and half-made outputs are skipped silently.

    Args:
        text_field: the key that a .json file must have to be read: others only describe a corpus.
        txt_documents: what becomes a document of a .txt, one of TXT_DOCUMENTS.

    Raises:
        InputError: something is missing or cannot be read; a file that is named is empty; a wrong number of weights.
    """
    inputs = list(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes) else [inputs]
    if bad := [given for given in inputs if not isinstance(given, str | Path) or not str(given).strip()]:
        raise InputError(f"input_path: {bad[0]!r} found, expected a file, a folder, a glob, datasets:NAME or ms:NAME")
    if all(any(str(given).startswith(prefix) for given in inputs) for prefix in (DATASETS, MODELSCOPE)):
        raise InputError(  # modelscope redirects `datasets` to its hub: the other dataset would be read from there
            f"input_path: {DATASETS} and {MODELSCOPE} cannot be read by one command; make a file of each, with"
            " --clean_only, and give the files"
        )
    found = []  # what Source takes besides a name
    for given, weight in zip(inputs, _checked_weights(weights, len(inputs)), strict=True):
        if str(given).startswith(STREAMED):
            found.append({"location": str(given), "size": 0, "weight": weight, "form": "dataset"})
            continue
        for path, form, packing in _files(Path(given), leave_out, text_field, txt_documents):
            about = {"form": form, "packing": packing, "weight": weight}
            found.append({"location": str(path), "size": path.stat().st_size, **about})
    if not found:
        raise InputError("input_path: nothing was given")
    if len(found) > MOST_SOURCES:
        raise InputError(
            f"input_path: {len(found):,} files found, at most {MOST_SOURCES:,} expected; join them into larger ones"
        )
    if texts := sum(about["form"] in TXT_DOCUMENTS for about in found):
        say(
            f"plain text: {texts:,} .txt, a document {'each' if txt_documents == 'file' else f'a {txt_documents}'} "
            "(--txt_documents)"
        )
    names = _short_names([about["location"] for about in found])
    return [Source(name=name, **about) for name, about in zip(names, found, strict=True)]


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    weights = list(weights) if isinstance(weights, Sequence) else [weights]
    if len(weights) != count:
        raise InputError(f"weights: {len(weights)} found for {count} inputs; give one for each")
    for weight in weights:
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= 1000:
            raise InputError(f"weights: {weight!r} found, expected numbers above 0 and up to 1000")
    return weights


def _files(path: Path, leave_out: Collection[Path], text_field: str, txt_documents: str) -> list[tuple[Path, str, str]]:
    """(file, form, packing) of each file to be read."""
    if path.is_file():
        if not path.stat().st_size:
            raise InputError(f"input_path: {path} is empty; {EXPECTED}")
        return [(path, *recognise(path, txt_documents)[:2])]
    if path.is_dir():
        listed, nothing = list(_listed(path)), f"the folder {path} holds no file that ends in {', '.join(ENDINGS)}"
    elif glob.has_magic(str(path)):
        listed = [Path(name) for name in glob.glob(str(path), recursive=True)]
        nothing = f"no file matches {path}"
    else:
        raise InputError(f"input_path: no file {path}; {EXPECTED}")
    is_folder, found, skipped = path.is_dir(), [], {}  # skipped: why, by file
    texts, tables = {}, {}  # .txt, and CSV files of chats: read only where nothing else is
    other_encoding: WrongEncoding | None = None
    entered = {folder for file in listed for folder in file.parents}
    for file in sorted(listed, key=lambda file: file.as_posix()):
        if file in entered or any(map(_is_job, [file, *file.parents])):
            continue
        if not _is_hidden(file, path) and file.is_file() and file.resolve() in leave_out:
            continue
        if why := _why_skipped(file, path, is_folder):
            skipped[file] = why
            continue
        name = file.name.lower()
        if is_folder and name.endswith(CSV_ENDINGS) and not is_chat_table(file):
            skipped[file] = "another ending"
            continue
        try:
            form, packing, head = recognise(file, txt_documents)
        except WrongEncoding as error:
            skipped[file] = f"{error.encoding.upper()}, not UTF-8"
            other_encoding = other_encoding or error
            continue
        if not head.strip():
            skipped[file] = "empty"
        elif is_folder and name.endswith(TXT_ENDINGS):
            texts[file] = (form, packing)
        elif is_folder and form == "csv":
            tables[file] = (form, packing)
        elif is_folder and name.endswith(JSON_ENDINGS) and not holds_documents(head, text_field):
            skipped[file] = f"no {text_field} in its first object"
        else:
            found.append((file, form, packing))
    for last_resort in (tables, texts):
        if found:
            skipped |= dict.fromkeys(last_resort, "beside other texts")
        else:
            found = [(file, *about) for file, about in last_resort.items()]
    if not found and other_encoding is not None:
        raise other_encoding  # it tells how to convert the file
    said = _describe_skipped(skipped, path if is_folder else Path())
    if not found:
        raise InputError(f"input_path: {nothing}" + (f"; skipped: {said}" if said else ""))
    if said:
        say(f"skipped in {path}: {said}")
    return found


def _listed(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders; hidden folders and links to folders are listed but not entered.

    Raises:
        InputError: one of the folders cannot be listed.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse_closed):
        closed = [name for name in folders if _hides(name) or os.path.islink(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in [*files, *closed])
        folders[:] = [name for name in folders if not _hides(name) and not _is_job(Path(parent, name))]


def _refuse_closed(error: OSError) -> None:
    raise InputError(f"input_path: the folder {error.filename} cannot be listed ({error.strerror})") from error


def _is_job(folder: Path) -> bool:
    """Whether this is the folder of a half-made output."""
    return folder.name.endswith(".parts") and (folder / "plan.json").exists()


def _hides(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_hidden(file: Path, given: Path) -> bool:
    """Whether a file, or a folder that it is in, is hidden, and was not asked for by name."""
    below = file.parts[len(given.parts) :] if given.is_dir() else file.parts[-1:]
    return any(map(_hides, below)) and not _hides(given.name)


def _why_skipped(file: Path, given: Path, is_folder: bool) -> str | None:
    """Why a file of a folder or glob is skipped, judged by its name and size."""
    name = file.name.lower()
    if _is_hidden(file, given):
        return "hidden"
    if file.is_dir():
        return "a link to a folder" if file.is_symlink() else "a folder"
    if not file.is_file():
        return "a broken link" if file.is_symlink() else "not a file"
    if file.name.endswith(OUR_ENDINGS):
        return "named as data processing names its own"
    if is_folder and COMPANIONS.match(name) and not name.endswith(ENDINGS):
        return "about the corpus"
    if is_folder and not name.endswith((*ENDINGS, *TXT_ENDINGS, *JSON_ENDINGS, *CSV_ENDINGS)):
        return "another ending"
    return "empty" if not file.stat().st_size else None


def _describe_skipped(skipped: dict[Path, str], folder: Path) -> str:
    """'b.jsonl (empty), README.md (another ending) and 3 more', the surprising ones first."""
    ranked = sorted(skipped.items(), key=lambda item: (item[1] == "another ending", "UTF-8" not in item[1]))
    names = [f"{os.path.relpath(file, folder)} ({why})" for file, why in ranked[:NAMED]]
    return ", ".join(names) + (f" and {len(ranked) - NAMED:,} more" if len(ranked) > NAMED else "")


def _short_names(locations: Sequence[str]) -> list[str]:
    """The files' names with as many of their folders as make them unique; datasets unchanged. What is not UTF-8 in a
    name is spelled out, since the name goes into JSON."""
    paths = {location: Path(os.path.abspath(_spelled_out(location))).parts for location in locations}
    names, depth = {}, 0
    while len(set(names.values())) < len(set(paths.values())):
        depth += 1
        for location, parts in paths.items():
            names[location] = location if location.startswith(STREAMED) else "/".join(parts[-depth:])
    return [names[location] for location in locations]


def _spelled_out(name: str) -> str:
    """A file's name as text: bytes of it that are not UTF-8 as \\xd6."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
