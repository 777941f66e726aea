"""The output file of a batch: JSONL, a line for each prompt, from which an interrupted batch resumes."""

import json
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError


def open_results(path: Path, prompts: list[tuple[int, str]], resume: bool) -> tuple[int, int, BinaryIO]:
    """The numbers of results and of failed ones in the output file, and the file, open for appending after the last.

    Raises:
        InputError: the file cannot be written, or holds something else.
    """
    try:
        done, failed, end = finished_results(path, prompts) if resume and path.exists() else (0, 0, 0)
        file = open(path, "ab", buffering=0)  # a full disk is met at the write, and not again at the close
        if resume:
            file.truncate(end)
    except OSError as error:
        raise InputError(f"output_file: {path} cannot be written ({error.strerror})") from error
    return done, failed, file


def finished_results(path: Path, prompts: list[tuple[int, str]]) -> tuple[int, int, int]:
    """How many results an interrupted batch wrote, how many of them are errors, and where the last ends, in bytes.

    Raises:
        InputError: they are no results of these prompts.
    """
    count = failed = end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):  # interrupted within it
            break
        try:
            result = json.loads(line)
            written = result["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"output_file: line {count + 1} of {path} is no result of a batch; give another file"
            ) from error
        if count == len(prompts) or written != prompts[count][1]:
            raise InputError(
                f"output_file: line {count + 1} of {path} is a result of another prompt than line {count + 1} of the"
                " batch; give another --output_file"
            )
        count, failed, end = count + 1, failed + ("error" in result), end + len(line)
    return count, failed, end


def write_result(file: BinaryIO, result: dict) -> None:
    """Append a result as one line; all of it is with the system when this returns.

    Raises:
        InputError: the system could not take it.
    """
    line = json.dumps(result, ensure_ascii=False).encode() + b"\n"
    try:
        while line:
            line = line[file.write(line) :]  # a disk that is nearly full takes a part
    except OSError as error:
        raise InputError(f"output_file: {file.name} cannot be written ({error.strerror})") from error
