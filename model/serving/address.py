"""Where the server listens, and the key that its clients need: checked before a model is loaded."""

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.errors import InputError, shown

LOOPBACK = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::")  # hosts that mean every address of this machine
ANY_ADDRESS = "any address"  # among the names by which the server may be called; no host has such a name
BACKLOG = 2048  # connections that wait to be accepted
KEY_VARIABLE = "MATECONV_API_KEY"


def read_key(path: str | None) -> str | None:
    """The API key: of a file, or the environment's; None: there is none.

    Raises:
        InputError: the file cannot be read, or holds no key.
    """
    if path is None:
        where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").strip()
        if not key:
            return None
    else:
        where = f"api_key_file: {path}"
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where} cannot be read ({error})") from error
    if not key or not key.isascii() or any(character.isspace() for character in key):
        raise InputError(f"{where} holds no key; one line of ASCII without spaces expected")
    return key


def is_address(host: str) -> bool:
    """Whether this is an IP address, and not a name, which others can let stand for any address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def names_of(host: str, allowed: Sequence[str], has_key: bool) -> tuple[str, ...]:
    """The names by which a server at this host may be called, as `Limits` takes them. At every address of this machine
    without a key, only its own name and addresses: a page of the Internet can give its own name this machine's address.

    Raises:
        InputError: a name has a port or is a URL.
    """
    names = [name.strip("[]") for name in allowed]
    for given, name in zip(allowed, names, strict=True):
        if "/" in name or (":" in name and not is_address(name)):
            raise InputError(
                f"allowed_host: {shown(given)} found, a name alone expected, without scheme and port; or *"
            )
    if host not in WILDCARDS:
        more = (host,)
    else:
        more = ("*",) if has_key else (ANY_ADDRESS, socket.gethostname(), f"{socket.gethostname()}.local")
    return tuple(name.lower() for name in (*LOOPBACK, *more, *names))


def checked_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Sites whose pages may call, as browsers name them: in lower case.

    Raises:
        InputError: one is neither scheme://host, with a port where it is not the scheme's own, nor *.
    """
    for origin in origins:
        scheme, _, rest = origin.lower().partition("://")
        own_port = {"http": ":80", "https": ":443"}.get(scheme)
        is_origin = re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin.lower())
        if origin != "*" and (not is_origin or (own_port is not None and rest.endswith(own_port))):
            raise InputError(
                f"cors_origin: {shown(origin)} found, such as https://chat.example or http://localhost:3000 expected,"
                " without a slash at the end or a scheme's own port; or *"
            )
    return tuple(origin.lower() for origin in origins)


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
