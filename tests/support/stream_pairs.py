"""A stream's two sides in this process, and a server's side that answers on one of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from slowllm.swarm.messages import Meta, Tensors, decode, encode
from slowllm.swarm.requests import PeerRequest, StreamServer, unpack_answer
from slowllm.swarm.streams import BEAT, Limits, Stream, exchange

QUICK = Limits(
    beat_seconds=0.05, silence_seconds=0.4, message_bytes=1 << 20, held_bytes=2 << 20, idle_seconds=30
)


async def pair() -> tuple[Stream, Stream]:
    """Return the two sides of a stream."""
    sides = socket.socketpair()
    return tuple([Stream(*await asyncio.open_unix_connection(sock=side)) for side in sides])  # type: ignore[return-value]


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a loop, which must be left without tasks."""

    async def whole() -> None:
        async with asyncio.timeout(60):
            await work()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        async with asyncio.timeout(60):
            await asyncio.gather(*left, return_exceptions=True)

    asyncio.run(whole())


async def ask(stream: Stream, meta: Meta, tensors: Tensors | None = None) -> tuple[Meta, Tensors]:
    """Send a request and return the answer."""
    said, found = decode(await exchange(stream, encode({"request": meta}, tensors), "P", QUICK))
    return unpack_answer("P", said), found


async def first_prefix(stream: Stream) -> bytes:
    """Return the first prefix that is no beat."""
    while (prefix := await stream.read_prefix()) == BEAT:
        pass
    return prefix


def with_server(
    handler: Callable[[PeerRequest], Awaitable[None] | None],
    work: Callable[[Stream], Coroutine[Any, Any, None]],
) -> None:
    """Run a client's side against a server's, which must end when the client's has."""

    async def both() -> None:
        ours, theirs = await pair()
        serving = asyncio.create_task(StreamServer(handler, QUICK).serve("C", theirs))
        try:
            await work(ours)
        finally:
            ours.close()
            await serving

    run(both)
