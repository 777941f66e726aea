"""Values of a GGUF file's metadata, of the type that they must have."""

from collections.abc import Mapping

from model.errors import first_line
from model.storage.gguf_header import Value

TYPES = {  # GGUF's names of them, for each of Python's
    int: {f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    float: {"FLOAT32", "FLOAT64"},
    bool: {"BOOL"},
    str: {"STRING"},
}


class Refused(Exception):
    """Why what a file holds is not used; the message is the reason."""


def single_value(fields: Mapping[str, Value], key: str, kind: type):
    """A value of a type; None where there is no such key.

    Raises:
        Refused: it has another type, or is no UTF-8.
    """
    field = fields.get(key)
    if field is None:
        return None
    if len(field.types) != 1 or field.types[0].name not in TYPES[kind]:
        raise Refused(f"{key} is {_named(field)}, {_expected(kind)} expected")
    return _contents(field, key)


def list_of_values(fields: Mapping[str, Value], key: str, kind: type, most: int) -> list:
    """An array's values, of which there are `most` at most; empty where there is no such key.

    Raises:
        Refused: it is no array, has another type or more values, or is no UTF-8.
    """
    field = fields.get(key)
    if field is None or field.count == 0:
        return []
    if len(field.types) != 2 or field.types[0].name != "ARRAY" or field.types[1].name not in TYPES[kind]:
        raise Refused(f"{key} is {_named(field)}, ARRAY of {_expected(kind)} expected")
    if field.count > most:
        raise Refused(f"{key} has {field.count:,} values, at most {most:,} expected")
    return _contents(field, key)


def _named(field: Value) -> str:
    return " of ".join(found.name for found in field.types) or "nothing"


def _expected(kind: type) -> str:
    return " or ".join(sorted(TYPES[kind]))


def _contents(field: Value, key: str):
    try:
        return field.contents()
    except UnicodeDecodeError as error:
        raise Refused(f"{key} is not UTF-8 ({first_line(error)})") from error
