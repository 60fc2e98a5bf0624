"""Server-sent events: chunks as they are made, and comments that keep the connection alive in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# Between comments: proxies hang up after half a minute or so of silence.
KEEP_ALIVE_SECONDS = 5.0
# In which a client must take what was sent to it.
SEND_SECONDS = 60.0
LAST = b"data: [DONE]\n\n"


def event(document: Any) -> bytes:
    """Return a document as one event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def comment(text: str) -> bytes:
    """Return a line that clients read over."""
    return f": {text}\n\n".encode()


async def until_gone(receive: Receive) -> None:
    """Wait until the client hangs up, or has got the whole answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of events. Its headers are sent before the first event is there.

    Args:
        events: the bytes of each; closed when the client hangs up or takes nothing for `SEND_SECONDS`.
        on_end: called once when no more is sent, with whether all was.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], on_end: Callable[[bool], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(until_gone(receive))
        sending = asyncio.create_task(self._send_all(send))
        is_complete = False
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                is_complete = await sending
        finally:
            for task in (gone, sending):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task
            await self._events.aclose()
            self._on_end(is_complete)

    async def _send_all(self, send: Send) -> bool:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        try:
            await send(start)
            async for part in self._events:
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):  # it takes nothing, or has hung up
            return False
        return True


async def with_comments(
    items: AsyncGenerator[bytes], text: Callable[[], str], seconds: float = KEEP_ALIVE_SECONDS
) -> AsyncGenerator[bytes]:
    """Yield items as they come; a comment at once, and whenever none has come for so long.

    Args:
        items: bytes of events.
        text: returns that of a comment.
        seconds: of silence.
    """
    yield comment(text())
    coming = asyncio.ensure_future(anext(items, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=seconds)
            if not done:
                yield comment(text())
                continue
            if (item := coming.result()) is None:
                return
            yield item
            coming = asyncio.ensure_future(anext(items, None))
    finally:
        coming.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await coming
        await items.aclose()
