"""Bind the socket of an HTTP server before anything heavy is loaded, so that a port in use is said at once."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from slowllm.errors import InputError

_BACKLOG = 128


@contextlib.contextmanager
def listening_at(host: str, port: int) -> Iterator[socket.socket]:
    """Listen at an address for the length of the context, before a model is opened for nothing.

    Raises:
        InputError: the address is none of this machine, or is in use.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: is no address of this machine ({error})") from error
    with bound:
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(_BACKLOG)
        except OSError as error:
            raise InputError(
                f"--host {host} --port {port}: cannot be listened at ({error.strerror or error}); choose another --port, or 0 "
                "for any that is free"
            ) from error
        yield bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of the root of what is served at a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
