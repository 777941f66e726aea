"""Where the server listens, and the key that its clients need: checked before a model is loaded."""

import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from model.errors import InputError, shown

LOOPBACK = ("localhost", "127.0.0.1", "::1")
BACKLOG = 2048  # connections that wait to be accepted
KEY_VARIABLE = "MATECONV_API_KEY"


def read_key(path: str | None) -> str | None:
    """The API key: of a file, or the environment's; None: there is none.

    Raises:
        InputError: the file cannot be read, or holds no key.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"api_key_file: {path} cannot be read ({error})") from error
    if not key or not key.isascii() or any(character.isspace() for character in key):
        raise InputError(f"api_key_file: {path} holds no key; one line of ASCII without spaces expected")
    return key


def checked_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Sites whose pages may call, as browsers name them.

    Raises:
        InputError: one is neither scheme://host, with a port where it is not the scheme's own, nor *.
    """
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
            raise InputError(
                f"cors_origin: {shown(origin)} found, such as https://chat.example or http://localhost:3000 expected,"
                " without a slash at the end; or *"
            )
    return tuple(origins)


def bound_socket(host: str, port: int, api_key: str | None, no_key: bool = False) -> socket.socket:
    """A socket that has the address, and does not listen yet.

    Raises:
        InputError: the address is taken or none of this machine's; or others can reach it, and there is no key.
    """
    if host not in LOOPBACK and api_key is None and not no_key:
        raise InputError(
            f"host {host}: others can reach it, so a key is needed: --api_key_file FILE or {KEY_VARIABLE}; or --no_key"
        )
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name != "nt":  # where it would let two servers have the same port
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise _refused(host, port, error) from error
    return bound


def listen(bound: socket.socket) -> None:
    """Let a socket listen.

    Raises:
        InputError: another one that has the same address listens already.
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _refused(*bound.getsockname()[:2], error) from error


def _refused(host: str, port: int, error: Exception) -> InputError:
    return InputError(f"{host}:{port} cannot be listened at ({error}); give another --host or --port")
