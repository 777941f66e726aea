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
    if resume and path.exists() and not path.is_file():
        raise InputError(f"output_file: {path} is no regular file, which --resume needs")
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
    *lines, rest = path.read_bytes().split(b"\n")
    for line in lines:
        if (result := _result(line)) is None:
            raise _no_result(path, count)
        written = result["prompt"]
        if count == len(prompts) or written != prompts[count][1]:
            raise InputError(
                f"output_file: line {count + 1} of {path} is a result of another prompt than line {count + 1} of the"
                " batch; give another --output_file"
            )
        count, failed, end = count + 1, failed + ("error" in result), end + len(line) + 1
    if rest and not (count < len(prompts) and _begins_result(rest, prompts[count][1])):
        raise _no_result(path, count)
    return count, failed, end


def _result(line: bytes) -> dict | None:
    """A prompt's text or error; None where the line holds neither."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(result, dict) or not isinstance(result.get("prompt"), str):
        return None
    return result if any(isinstance(result.get(key), str) for key in ("text", "error")) else None


def _begins_result(rest: bytes, prompt: str) -> bool:
    """Whether this is a part of the line of a prompt, in which a batch was interrupted."""
    begin = _line({"prompt": prompt}).rstrip(b"}\n")
    return rest.startswith(begin) or begin.startswith(rest)


def _no_result(path: Path, count: int) -> InputError:
    return InputError(f"output_file: line {count + 1} of {path} is no result of a batch; give another file")


def _line(result: dict) -> bytes:
    return json.dumps(result, ensure_ascii=False).encode() + b"\n"


def write_result(file: BinaryIO, result: dict) -> None:
    """Append a result as one line; all of it is with the system when this returns.

    Raises:
        InputError: the system could not take it.
    """
    line = _line(result)
    try:
        while line:
            line = line[file.write(line) :]  # a disk that is nearly full takes a part
    except OSError as error:
        raise InputError(f"output_file: {file.name} cannot be written ({error.strerror})") from error
