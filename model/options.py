"""Options, declared once: settings of training, the shape of a model, data processing, sampling.

An option is a dataclass field that `setting` makes. Its name, type, default, help and limits stand only there: flags,
keys of the config file, checks and error messages are made from it.
"""

import contextlib
import dataclasses
import math
import os
import re
import typing
from collections.abc import Callable, Collection, Mapping

from model.errors import shown

MOST = 10**12  # of a whole number without a limit: their products stay within 64 bits
LONGEST_TEXT = 4096  # characters: Linux takes no longer path
NULLS = ("null", "none", "~")  # mean None in a flag
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def setting(
    default,
    help: str,
    *,
    choices: Collection[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: bool = False,
    several: bool = False,
    accepts: tuple[Callable[[typing.Any], bool], str] | None = None,
):
    """A dataclass field with what the flag's help says and what values are accepted.

    Args:
        choices: the texts that are accepted, where not all are; a registry may grow later.
        at_least, above, at_most, below: limits of a number.
        path: the text names a file or folder, where `~` is the home folder.
        several: a list of such values is accepted too, and the flag takes several words.
        accepts: in place of the limits, whether a value can be used, and in words which can.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    more = {"choices": choices, "path": path, "several": several, "accepts": accepts}
    return dataclasses.field(default=default, metadata={"help": help, **limits, **more})


def options_of(cls) -> dict[str, dataclasses.Field]:
    """The options that a dataclass declares, by name; its other fields are left out."""
    return {field.name: field for field in dataclasses.fields(cls) if "help" in field.metadata}


def check_options(values) -> list[str]:
    """Check a dataclass's options in place, as `checked_value` does; one line for each that is refused."""
    problems = []
    for name, field in options_of(values).items():
        try:
            object.__setattr__(values, name, checked_value(field, getattr(values, name)))
        except ValueError as error:
            problems.append(f"{name}: {shown(getattr(values, name))} found, {error} expected")
    return problems


def accepted_types(field: dataclasses.Field) -> tuple[type, tuple[str, ...], bool]:
    """What an option's type hint accepts: the kind of its values, words beside them, and whether null."""
    parts = typing.get_args(field.type) or (field.type,)
    kind = next(part for part in parts if isinstance(part, type) and part is not type(None))
    words = tuple(word for part in parts if typing.get_origin(part) is typing.Literal for word in typing.get_args(part))
    return kind, words, type(None) in parts


def parse_value(field: dataclasses.Field, value):
    """Turn a YAML value or a flag's text into the option's type; a list of one into that one.

    Raises:
        ValueError: its text says what would be accepted.
    """
    if not (isinstance(value, list | tuple) and field.metadata["several"]):
        return checked_value(field, from_text(field, value) if isinstance(value, str) else value)
    if not value or any(isinstance(one, list | tuple) for one in value):
        raise ValueError(expected(field))
    values = [parse_value(field, one) for one in value]
    if len(values) > 1 and None in values:
        raise ValueError(expected(field))
    return values if len(values) > 1 else values[0]


def from_text(field: dataclasses.Field, text: str):
    """Turn a flag's text into the option's type, whatever its limits.

    Raises:
        ValueError: its text says what would be accepted.
    """
    kind, words, optional = accepted_types(field)
    word = text.strip().lower()
    if optional and word in NULLS:
        return None
    if word in words:
        return word
    if kind is str:
        return file_path(text) if field.metadata["path"] else text_flag(text)
    try:
        return _FROM_TEXT[kind](word)
    except (ValueError, KeyError):
        raise ValueError(expected(field)) from None


def text_flag(text: str) -> str:
    """A flag's text, decoded as UTF-8 where Python took the locale for ASCII and kept the bytes as lone surrogates."""
    with contextlib.suppress(UnicodeDecodeError):
        if any("\udc80" <= character <= "\udcff" for character in text):
            return os.fsencode(text).decode("utf-8")
    return text


def checked_value(field: dataclasses.Field, value):
    """A value as Python or JSON gives it, of the option's type: a float may be given as 1, but no number as text.

    Raises:
        ValueError: its text says what would be accepted.
    """
    limits = field.metadata
    if limits["accepts"]:
        if not limits["accepts"][0](value):
            raise ValueError(expected(field))
        return value
    kind, words, optional = accepted_types(field)
    if (value is None and optional) or (isinstance(value, str) and value in words):
        return value
    if limits["path"] and isinstance(value, str | os.PathLike):
        value = file_path(value)
    if not _IS[kind](value) or (limits["choices"] and value not in limits["choices"]) or not _within(value, limits):
        raise ValueError(expected(field))
    if kind is int and limits["at_most"] is None and value > MOST:
        raise ValueError(f"{expected(field)} and at most {MOST:,}")
    return kind(value)


def file_path(given: str | os.PathLike) -> str:
    """A path as the user means it: `~` at its beginning is the home folder.

    Raises:
        ValueError: it is empty, or there is no such home; its text says what would be accepted.
    """
    text = os.fspath(given)
    if not text:
        raise ValueError("a path")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = re.split(r"[\\/]", expanded)[0]
        raise ValueError(f"a path of a known home folder ({user} has none; ./{user} is a file of that name)")
    return expanded


def expected(field: dataclasses.Field) -> str:
    """What an option accepts, in words."""
    limits = field.metadata
    if limits["accepts"]:
        return limits["accepts"][1]
    kind, words, optional = accepted_types(field)
    text = f"one of {', '.join(limits['choices'])}" if limits["choices"] else _NAMES[kind]
    if limits["at_least"] is not None:
        text += f" of at least {limits['at_least']:g}"
    if limits["above"] is not None:
        text += f" above {limits['above']:g}"
    if limits["at_most"] is not None:
        text += f" and at most {limits['at_most']:,}"
    if limits["below"] is not None:
        text += f" and below {limits['below']:,}"
    if limits["several"]:
        text += ", or a list of them"
    return " or ".join([text, *words, *(["null"] if optional else [])])


def _within(value, limits: Mapping) -> bool:
    return (
        (limits["at_least"] is None or value >= limits["at_least"])
        and (limits["above"] is None or value > limits["above"])
        and (limits["at_most"] is None or value <= limits["at_most"])
        and (limits["below"] is None or value < limits["below"])
    )


def is_whole(value) -> bool:
    """Whether a value is a whole number; True and 1.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether a value is a finite number; True is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value and len(value) <= LONGEST_TEXT


_IS = {bool: lambda value: isinstance(value, bool), int: is_whole, float: is_number, str: _is_text}
_FROM_TEXT = {bool: _BOOLEANS.__getitem__, int: int, float: float}  # YAML reads 3e-4, without a point, as text
