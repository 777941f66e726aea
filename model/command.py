"""What every script's command line has: one line for an error, flags that are not guessed, lines that tell choices.

Whatever reaches a terminal passes through here: messages through `print_message` (and so `say` and `print_error`),
generated text through `print_text`. None of it can carry what a terminal obeys.
"""

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import gc
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence

from model.errors import InputError, OneLineError, command_line, elided, fault_text, one_line, printable, shown
from model.options import accepted_types, file_path, from_text
from model.requirements import missing_library


def run_command(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 or what it returns; with one line, what a OneLineError says, 2 for files that
    cannot be read or written, 130 for Ctrl-C."""
    atexit.register(gc.freeze)  # at its end Python would search torch's and transformers' objects for garbage: 0.3 s
    open_missing_streams()
    # Consoles on Windows may not be UTF-8: Chinese and the chat's emoji must not raise.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = main()
    except OneLineError as error:
        print_error(error)
        code = error.exit_code
    except BrokenPipeError:  # what reads our output has ended, as `head` does: nobody is left to tell
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        code = 1
    except OSError as error:  # a full disk, a folder that vanished: the system's own text names the file
        print_error(error)
        code = 2
    except KeyboardInterrupt:
        print_message("interrupted")
        code = 130
    except Exception as error:
        if (missing := missing_library(error)) is not None:
            print_error(missing)
            code = 2
        else:
            print_fault(error)
            code = 1
    sys.exit(code)


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and the like within the block: without searching their new objects for garbage, again and again,
    which takes up to a third of the time. Later searches leave them out."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_missing_streams() -> None:
    """Open whichever of stdin, stdout and stderr the caller closed: the next file would get its number, and with it
    what a library or a child writes there."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == descriptor:  # the lowest one that is free
                os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))


def print_error(error) -> None:
    """One line on stderr, or one for each problem of a OneLineError; with the rank where it is not 0."""
    rank = os.environ.get("RANK", "0")
    first, *others = error.args if isinstance(error, OneLineError) and error.args else [error]
    print_message(elided(f"error: {first}" if rank == "0" else f"[rank {rank}] error: {first}"))
    for problem in others:
        print_message(elided(f"       {problem}"))


def print_fault(error: Exception) -> None:
    """One line on an exception that nobody foresaw, with where it arose; the traceback goes into a temporary file."""
    line = fault_text(error)
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", prefix="mateconv_", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        line += f"; please report this fault with {file.name}"
    print_error(line)


def print_message(message) -> None:
    """One line on stderr, without breaking a progress bar. A log that can't be written any more, as behind a pipe
    whose reader has gone, must not end a training: nothing is raised."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # not loaded: there is no bar
    with contextlib.suppress(OSError), tqdm.external_write_mode(file=sys.stderr) if tqdm else contextlib.nullcontext():
        print(one_line(message), file=sys.stderr, flush=True)


def print_text(text: str, end: str = "\n") -> None:
    """Generated text on stdout, at once: harmless on a terminal, byte for byte in a file or a pipe."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def screen() -> io.TextIOBase:
    """Where a progress bar is drawn: stderr, or nowhere if that is no terminal."""
    return sys.stderr if sys.stderr.isatty() else _Nowhere()


LONG_DASHES = ("—", "–")  # into which chat programs turn two hyphens


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line (an InputError), and that accepts no abbreviated flags.

    Args:
        flag_for_words: the flag that a word without one is likely meant for; an error suggests it.
    """

    def __init__(self, flag_for_words: str | None = None, **arguments) -> None:
        super().__init__(allow_abbrev=False, **arguments)
        self._flag_for_words = flag_for_words

    def parse_args(self, arguments: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """As in argparse; an unknown flag is named with the nearest one there is."""
        known, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            raise InputError("; ".join(self.describe_unknown(unknown)))
        return known

    def describe_unknown(self, unknown: Sequence[str]) -> list[str]:
        """What to say of each argument that is not known: a misspelt flag, or a word without one."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        descriptions = []
        if dashed := [word for word in unknown if word.startswith(LONG_DASHES)]:
            fixed = f"--{dashed[0].lstrip(''.join(LONG_DASHES))}"
            return [f"{dashed[0]}: begins with a long dash, where two hyphens are expected: {fixed}"]
        if self._flag_for_words is not None and not any(word.startswith("-") for word in unknown):
            return [f"{shown(unknown[0])[1:-1]}: a flag is missing; did you mean {self._suggestion(unknown)}?"]
        for word in [word for word in unknown if word.startswith("-")] or unknown:
            name = word.split("=")[0].replace("-", "_").replace("__", "--", 1)
            nearest = [flag for flag in flags if flag.startswith(name)] or difflib.get_close_matches(name, flags, n=1)
            descriptions.append(f"{word}: unknown; " + (f"did you mean {nearest[0]}?" if nearest else "see --help"))
        return descriptions

    def _suggestion(self, words: Sequence[str]) -> str:
        return f"{self._flag_for_words} {command_line(*words)}"

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def true_or_false(text: str) -> bool:
    """The `type` of a flag that takes true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} found, true or false expected")
    return text.lower() == "true"


def path_flag(text: str) -> str:
    """The `type` of a flag that names a file or folder: `~` is the home folder."""
    try:
        return file_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} found, {error} expected") from None


def add_option(
    group, field: dataclasses.Field, metavar: str | None = None, nargs: str | None = None, as_text: bool = False
) -> None:
    """Add the flag of an option: its name, type, default and help are the declaration's.

    Limits are checked later, where the options are made, which names all that is wrong at once.

    Args:
        as_text: keep the flag's text as it is, and None where the flag is not given.
    """

    def typed(text: str):
        try:
            return from_text(field, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)} found, {error} expected") from None

    choices, is_switch = field.metadata["choices"], accepted_types(field)[0] is bool
    help = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
    if field.default not in (None, ()):
        help += f" [{str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
    group.add_argument(
        f"--{field.name}",
        type=str if as_text else typed,
        default=None if as_text else field.default,
        help=help.replace("%", "%%"),
        metavar=metavar or _placeholder(field),
        nargs="?" if is_switch else "+" if field.metadata["several"] else nargs,
        const=("true" if as_text else True) if is_switch else None,
    )


def _placeholder(field: dataclasses.Field) -> str:
    """What stands for an option's value in its help."""
    kind, words, _ = accepted_types(field)
    if field.metadata["choices"]:
        return "NAME"
    if kind is str:
        return "PATH" if field.metadata["path"] else "TEXT"
    return "|".join(("true|false" if kind is bool else "N", *words))


def say(message: str) -> None:
    """Tell the user what was chosen or done, see `print_message`; only from rank 0."""
    if int(os.environ.get("RANK", "0")) == 0:
        print_message(message)
