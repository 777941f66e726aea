"""Finds the files and datasets that paths, folders, globs, `datasets:NAME` and `ms:NAME` stand for."""

import contextlib
import errno
import functools
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from model.command import say
from model.corpus.inspection import PACKINGS, holds_documents
from model.corpus.opening import EXPECTED, Source, WrongEncoding, is_chat_table, recognise
from model.corpus.plain_text import SMALL_BYTES, TXT_DOCUMENTS, SmallFiles, spelled_out
from model.corpus.streams import DATASETS, MODELSCOPE, STREAMED
from model.errors import InputError, counted
from model.token_file.manifest import MOST_SOURCES

READ = (".jsonl", ".ndjson", ".parquet", ".json", ".csv", ".txt")  # in a message; also compressed
_PACKED = ("", *(f".{packing}" for packing in PACKINGS))
# Endings, in lower case, of the files that are read in a folder.
ENDINGS = (*(f".{form}{packed}" for form in ("jsonl", "ndjson") for packed in _PACKED), ".parquet")
TXT_ENDINGS, JSON_ENDINGS, CSV_ENDINGS = (
    tuple(f".{form}{packed}" for packed in _PACKED) for form in ("txt", "json", "csv")
)
COMPANIONS = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|authors|citation|requirements)([._-]|$)", re.IGNORECASE
)
OUR_ENDINGS = (".rejects.jsonl", ".changes.jsonl")  # what data processing itself left there
NAMED = 5  # skipped files that a message names
OTHER_ENCODING = ", not UTF-8"  # how the reason to skip such a file ends
WARNED_SHARE = 0.2  # of the texts; a warning if more are in another encoding
MANY_FILES = 100  # an input of more small .txt is read as few sources: a source takes some 25 ms
TOLD_FILES = 50_000  # to look at more takes over five seconds
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # what a broken link leads to


class _Found(NamedTuple):
    """A file to be read, or a dataset."""

    location: str
    size: int
    form: str
    packing: str = ""

    @property
    def is_small_text(self) -> bool:
        return self.form in TXT_DOCUMENTS and not self.packing and self.size <= SMALL_BYTES


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

    Of an input with more than MANY_FILES small .txt, those that follow one another are one source: those of a folder if
    it has as many, or else of several.

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
    batches: list[tuple[object, float, list[_Found]]] = []  # what tells an input from the next, its weight, its files
    for number, (given, weight) in enumerate(zip(inputs, _checked_weights(weights, len(inputs)), strict=True)):
        key: object = number
        if str(given).startswith(STREAMED):
            files = [_Found(str(given), 0, "dataset")]
        else:
            path = Path(given)
            files = _files(path, leave_out, text_field, txt_documents)
            if path.is_file() and path.resolve() not in leave_out:  # files named one by one are those of a shell's glob
                key = path.anchor  # "" of relative ones: no folder holds those of both kinds, nor of two drives
        if batches and batches[-1][:2] == (key, weight):
            batches[-1][2].extend(files)
        else:
            batches.append((key, weight, files))
    if not batches:
        raise InputError("input_path: nothing was given")
    found = [(files, weight) for _, weight, batch in batches for files in _joined(batch)]
    if len(found) > MOST_SOURCES:
        raise InputError(
            f"input_path: {len(found):,} files found, at most {MOST_SOURCES:,} expected; join them into larger ones"
        )
    if texts := sum(len(files) for files, _ in found if files[0].form in TXT_DOCUMENTS):
        say(
            f"plain text: {texts:,} .txt, a document {'each' if txt_documents == 'file' else f'a {txt_documents}'} "
            "(--txt_documents)"
        )
    names = _short_names([files[0].location if len(files) == 1 else _folder_of(files) for files, _ in found])
    return _as_sources(found, names)


def _joined(batch: list[_Found]) -> Iterator[list[_Found]]:
    """The files of each source of an input, in order; see `find_sources`."""
    is_many = sum(file.is_small_text for file in batch) > MANY_FILES
    for are_joined, files in groupby(batch, key=lambda file: is_many and file.is_small_text):
        if not are_joined:
            yield from ([file] for file in files)
            continue
        held: list[_Found] = []  # of folders that have few
        for _, in_folder in groupby(files, key=lambda file: os.path.dirname(file.location)):
            own = list(in_folder)
            if len(own) <= MANY_FILES:
                held += own
                continue
            if held:
                yield held
                held = []
            yield own
        if held:
            yield held


def _folder_of(files: Sequence[_Found]) -> str:
    """The innermost folder that holds all these files; "" for the current one."""
    return os.path.commonpath({os.path.dirname(file.location) for file in files})


def _as_sources(found: Sequence[tuple[Sequence[_Found], float]], names: Sequence[str]) -> list[Source]:
    """The sources of these files and weights; `names`: of the file, or of the folder of several."""
    sources, earlier = [], Counter()  # earlier: sources of the same name
    for (files, weight), name in zip(found, names, strict=True):
        location, size, form, packing = files[0]
        about = {"form": form, "packing": packing, "weight": weight}
        if len(files) > 1:
            folder = _folder_of(files)
            prefix = len(os.path.join(folder, ""))
            members = [file.location[prefix:].replace(os.sep, "/") for file in files]
            sizes = [file.size for file in files]
            about["files"] = SmallFiles(folder, name, members, sizes)
            location, size, name = os.path.join(folder, "*.txt"), sum(sizes), f"{name}/*.txt"
            earlier[name] += 1
            name += f" ({earlier[name]})" if earlier[name] > 1 else ""
        sources.append(Source(location, name, size, **about))
    return sources


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


def _files(path: Path, leave_out: Collection[Path], text_field: str, txt_documents: str) -> list[_Found]:
    """The files to be read."""
    if path.is_file():
        if not (size := path.stat().st_size):
            raise InputError(f"input_path: {path} is empty; {EXPECTED}")
        form, packing, head = recognise(path, txt_documents)
        _warn_of_json([path] if form in TXT_DOCUMENTS and holds_documents(head, text_field) else [])
        return [_Found(str(path), size, form, packing)]
    if path.is_dir():
        listed, nothing = list(_listed(path)), f"the folder {path} holds no file that ends in {', '.join(READ)}"
        entered = set()
    elif glob.has_magic(str(path)):
        listed = [str(Path(name)) for name in glob.iglob(str(path), recursive=True)]
        entered, nothing = _folders_of(listed), f"no file matches {path}"
    else:
        raise InputError(f"input_path: no file {path}; {EXPECTED}")
    is_folder, found, skipped = path.is_dir(), [], {}  # skipped: why, by file
    texts, tables = [], []  # .txt, and CSV files of chats: read only where nothing else is
    other_encoding: WrongEncoding | None = None
    with_json = []  # .txt
    in_job, is_left_out = functools.cache(_in_job), _left_out(leave_out)
    listed.sort(key=_in_order)
    if len(listed) > TOLD_FILES:
        say(f"looking at {len(listed):,} files in {path}")
    for file in listed:
        folder, name = os.path.split(file)
        if file in entered or _is_job(file) or in_job(folder):
            continue
        is_hidden = _hides(name) and not _hides(path.name)
        about = None if is_hidden else _stat(file)
        if about is not None and is_left_out(file, about):
            continue
        if why := "hidden" if is_hidden else _why_skipped(file, name, about, is_folder):
            skipped[file] = why
            continue
        name = name.lower()
        if is_folder and name.endswith(CSV_ENDINGS) and not is_chat_table(file):
            skipped[file] = "another ending"
            continue
        try:
            form, packing, head = recognise(file, txt_documents)
        except WrongEncoding as error:
            skipped[file] = f"{error.encoding.upper()}{OTHER_ENCODING}"
            other_encoding = other_encoding or error
            continue
        kept = _Found(file, about.st_size, form, packing)
        if form in TXT_DOCUMENTS and holds_documents(head, text_field):
            with_json.append(file)
        if not head.strip():
            skipped[file] = "empty"
        elif is_folder and name.endswith(TXT_ENDINGS):
            texts.append(kept)
        elif is_folder and form == "csv":
            tables.append(kept)
        elif is_folder and name.endswith(JSON_ENDINGS) and not holds_documents(head, text_field):
            skipped[file] = f"no {text_field} in its first object"
        else:
            found.append(kept)
    for last_resort in (tables, texts):
        if found:
            skipped |= {file.location: "beside other texts" for file in last_resort}
        else:
            found = last_resort
    if not found and other_encoding is not None:
        raise other_encoding  # it tells how to convert the file
    said = _describe_skipped(skipped, path if is_folder else Path())
    if not found:
        raise InputError(f"input_path: {nothing}" + (f"; skipped: {said}" if said else ""))
    if said:
        say(f"skipped in {path}: {said}")
    of_other_encodings = sum(why.endswith(OTHER_ENCODING) for why in skipped.values())
    if of_other_encodings > WARNED_SHARE * len(found):
        others = counted(of_other_encodings, "file")
        say(f"warning: {others} of another encoding, not read, beside {len(found):,} in UTF-8: {other_encoding}")
    _warn_of_json([file for file in with_json if file not in skipped])
    return found


def _warn_of_json(texts: Sequence[str | Path]) -> None:
    """Say that some .txt hold JSONL, of which the keys would be learned too."""
    if texts:
        count = f" ({len(texts):,} files)" if len(texts) > 1 else ""
        say(f"warning: {texts[0]}{count}: JSON in a .txt is read as plain text; name it .jsonl to have its documents")


def _in_order(file: str) -> str:
    """What files are sorted by, alike on all systems."""
    return file.replace(os.sep, "/")


def _listed(folder: Path) -> Iterator[str]:
    """The files of a folder and its subfolders; hidden folders and links to folders are listed but not entered.

    Raises:
        InputError: one of the folders cannot be listed.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse_closed):
        closed = [name for name in folders if _hides(name) or os.path.islink(os.path.join(parent, name))]
        within = str(Path(parent, "_"))[:-1]  # as Path writes it: no ./ before it
        yield from (within + name for name in [*files, *closed])
        folders[:] = [name for name in folders if not _hides(name) and not _is_job(os.path.join(parent, name))]


def _refuse_closed(error: OSError) -> None:
    raise InputError(f"input_path: the folder {error.filename} cannot be listed ({error.strerror})") from error


def _folders_of(files: Sequence[str]) -> set[str]:
    """Every folder that one of these files, or its folder, is in."""
    folders: set[str] = set()
    for folder in {os.path.dirname(file) for file in files}:
        while folder not in folders:
            folders.add(folder)
            folder = os.path.dirname(folder)
    return folders


def _is_job(folder: str) -> bool:
    """Whether this is the folder of a half-made output."""
    return folder.endswith(".parts") and os.path.exists(os.path.join(folder, "plan.json"))


def _in_job(folder: str) -> bool:
    """Whether this, or one that it is in, is the folder of a half-made output."""
    above = os.path.dirname(folder)
    return _is_job(folder) or (above != folder and _in_job(above))


def _hides(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _stat(file: str) -> os.stat_result | None:
    """What the system says of a file; None of a broken link, or one that is gone.

    Raises:
        OSError: it may not be looked at, or the disk fails.
    """
    try:
        return os.stat(file)
    except OSError as error:
        if error.errno in NO_FILE:
            return None
        raise


def _left_out(leave_out: Collection[Path]) -> Callable[[str, os.stat_result], bool]:
    """A function that says whether a file is one of these. Few files have the number of one, and only theirs are
    resolved: that takes longer than all else that is asked of a file."""
    known = set()
    for path in leave_out:
        with contextlib.suppress(OSError):  # it need not exist
            about = os.stat(path)
            known.add((about.st_dev, about.st_ino))
    return lambda file, about: (about.st_dev, about.st_ino) in known and Path(file).resolve() in leave_out


def _why_skipped(file: str, name: str, about: os.stat_result | None, is_folder: bool) -> str | None:
    """Why a file of a folder or glob is skipped, judged by its name, kind and size."""
    if about is not None and stat.S_ISDIR(about.st_mode):
        return "a link to a folder" if os.path.islink(file) else "a folder"
    if about is None or not stat.S_ISREG(about.st_mode):
        return "a broken link" if os.path.islink(file) else "not a file"
    if name.endswith(OUR_ENDINGS):
        return "named as data processing names its own"
    name = name.lower()
    if is_folder and COMPANIONS.match(name) and not name.endswith(ENDINGS):
        return "about the corpus"
    if is_folder and not name.endswith((*ENDINGS, *TXT_ENDINGS, *JSON_ENDINGS, *CSV_ENDINGS)):
        return "another ending"
    return None if about.st_size else "empty"


def _describe_skipped(skipped: dict[str, str], folder: Path) -> str:
    """'b.jsonl (empty), README.md (another ending) and 3 more: 3 empty', the surprising ones first; each reason has a
    file that is named."""
    ranked = sorted(
        skipped.items(), key=lambda item: (item[1] == "another ending", not item[1].endswith(OTHER_ENCODING))
    )
    firsts = {why: file for file, why in reversed(ranked)}
    shown = sorted(ranked, key=lambda item: firsts[item[1]] != item[0])[:NAMED]
    rest = Counter(skipped.values()) - Counter(why for _, why in shown)
    names = ", ".join(f"{os.path.relpath(file, folder)} ({why})" for file, why in ranked if (file, why) in shown)
    counts = ", ".join(f"{count:,} {why}" for why, count in rest.most_common())
    return names + (f" and {rest.total():,} more: {counts}" if rest else "")


def _short_names(locations: Sequence[str]) -> list[str]:
    """The files' names with as many of their folders as make them unique; datasets unchanged. What is not UTF-8 in a
    name is spelled out, since the name goes into JSON."""
    paths = {location: Path(os.path.abspath(spelled_out(location))).parts for location in locations}
    names, depth = {}, 0
    while len(set(names.values())) < len(set(paths.values())):
        depth += 1
        for location, parts in paths.items():
            names[location] = location if location.startswith(STREAMED) else "/".join(parts[-depth:])
    return [names[location] for location in locations]
