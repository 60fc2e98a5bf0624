"""Refuse requests of HTTP whose bodies are larger than anything that the page sends, before they are read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# The longest text that the page takes has fewer bytes as JSON, and so has an upload with what is around it.
MAX_BODY_BYTES = 4 << 20

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class BoundedBodies:
    """An ASGI application that hands requests on to another one, unless their bodies are too large.

    Args:
        app: that answers the others.
        max_bytes: of a body. A request that does not say how long its body is is refused, too; browsers say so.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit():
            await _refuse(send, 411, "say how long the body is")
        elif int(length) > self._max_bytes:
            await _refuse(send, 413, f"a body has at most {self._max_bytes} bytes")
        else:
            await self._app(scope, receive, send)


async def _refuse(send: Send, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})
