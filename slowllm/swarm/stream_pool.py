"""The client's side of streams: those to one peer, opened on demand, used again, and opened anew where they have ended.

Knows streams; knows nothing of messages, and nothing of hivemind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from slowllm.swarm.streams import Stream


class StreamPool:
    """Streams to one peer. Owns them: `close` it. Used on one loop."""

    def __init__(self, open_stream: Callable[[], Awaitable[Stream]], num_streams: int) -> None:
        self._open_stream = open_stream
        self._turns = asyncio.Semaphore(num_streams)
        self._idle: list[Stream] = []
        self._used: set[Stream] = set()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        """Yield a stream for one exchange; wait for one where as many as allowed are used.

        A request that was begun is never sent again on another stream: the peer may have done what it asks.
        """
        async with self._turns:
            while self._idle and self._idle[-1].has_ended:
                self._idle.pop().close()
            # The last one that was used: the others may then end for lack of use.
            stream = self._idle.pop() if self._idle else await self._open_stream()
            self._used.add(stream)
            try:
                yield stream
            except BaseException:
                stream.close()  # the answer to a request that nobody waits for must not meet the next one
                raise
            finally:
                self._used.discard(stream)
            if stream.has_ended:
                stream.close()
            else:
                self._idle.append(stream)

    def close(self) -> None:
        """Close all streams."""
        for stream in (*self._idle, *self._used):
            stream.close()
        self._idle.clear()
