"""How requests and answers go over one stream of bytes, on the asyncio loop that owns it.

A stream carries one request at a time, and its answer; whoever asks keeps several streams to a peer. So a long message
does not hold up a short one, each request has the flow control of its own stream, and closing the stream is how a
request is cancelled: the other side sees the end of the stream, also if the process or the machine has died.
Request ids on one shared stream would save file descriptors, and bring all of that back as work of our own.

Until a server has the answer it sends a **beat** every second: a message's length of zero, or what it is at (`progress`).
So silence means that the peer, or the way to it, is gone, however long a sweep over its disk takes.

Knows asyncio's streams and messages as bytes; knows neither hivemind nor what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from slowllm.errors import PeerLostError, PeerTimeoutError
from slowllm.swarm.messages import MAX_MESSAGE_BYTES, PREFIX_BYTES, body_bytes
from slowllm.swarm.progress import RequestProgress

BEAT = bytes(PREFIX_BYTES)
# Far fewer than come at the least rate before a peer counts as silent.
CHUNK_BYTES = 64 << 10
# Of a message, in each direction: an uplink of 2 Mbit/s that carries 16 requests at once. Who is slower holds what it has
# sent in the memory of others for too long.
LEAST_BYTES_PER_SECOND = 16 << 10
Parts = Sequence[bytes | memoryview]


@dataclass(frozen=True)
class Limits:
    """What peers may take, and how long they are waited for.

    Attributes:
        message_bytes: of one message, at most; larger ones are refused before they are read.
        held_bytes: of all requests together, as far as they were read, until their answers have gone. Others wait,
            unread; those of at most `SMALL_BYTES` of `slowllm.swarm.room` neither wait nor count.
        streams_per_peer: that one peer may open to this one; and how many this one opens to a peer.
        num_streams: that all peers together may open.
        connect_seconds: for opening a stream to a peer, if `silence_seconds` are not fewer.
        beat_seconds: between the beats of a server that has no answer yet.
        silence_seconds: without a byte, after which a peer is lost; some multiple of its beats.
        least_rate: bytes a second of a request and of an answer, below which a client counts as silent, too.
        idle_seconds: after which a stream without requests is closed by its server.
        left_seconds: without a stream and a connection, after which a peer that has asked has left. Within these it may
            find another way here, as after a change of its network.
    """

    message_bytes: int = MAX_MESSAGE_BYTES
    held_bytes: int = 4 * MAX_MESSAGE_BYTES
    streams_per_peer: int = 64
    num_streams: int = 1024
    connect_seconds: float = 15.0
    beat_seconds: float = 1.0
    silence_seconds: float = 20.0
    least_rate: float = LEAST_BYTES_PER_SECOND
    idle_seconds: float = 600.0
    left_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Check that a message that is allowed fits what may be held."""
        assert self.message_bytes <= self.held_bytes, "a message that is allowed could never be held"


class Stream:
    """The two ends of one stream's bytes. Owns the connection: `close` it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._limit: asyncio.Timeout | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the other side has closed it, as far as is known here."""
        return self._reader.at_eof() or self._writer.is_closing()

    def close(self) -> None:
        """Close it at once. What was not yet sent is lost, and the other side sees the end of the stream."""
        self._writer.transport.abort()

    def beat(self, progress: RequestProgress | None = None) -> None:
        """Tell the other side that an answer is being made, and how far it is."""
        if not self._writer.is_closing():
            self._writer.write(BEAT if progress is None else progress.to_prefix())

    @asynccontextmanager
    async def silence_limit(self, seconds: float, least_rate: float | None = None) -> AsyncIterator[None]:
        """Raise TimeoutError in the block when no byte has come or gone for this long.

        Args:
            seconds: of silence.
            least_rate: bytes a second that must come or go, on the average over any such time; None for any.
        """
        async with asyncio.timeout(seconds) as limit:
            self._limit, self._seconds, self._least_rate = limit, seconds, least_rate
            try:
                yield
            finally:
                self._limit = None

    def _is_alive(self, num_bytes: int) -> None:
        if self._limit is None or self._limit.expired() or (when := self._limit.when()) is None:
            return
        latest = asyncio.get_running_loop().time() + self._seconds
        if self._least_rate is not None:  # each byte earns its time, and what is earned lasts for one silence
            latest = min(latest, when + num_bytes / self._least_rate)
        self._limit.reschedule(latest)

    @asynccontextmanager
    async def _unlimited(self) -> AsyncIterator[None]:
        """Stop the clock of a silence limit for the block: what it waits for is not the other side."""
        limit, loop = self._limit, asyncio.get_running_loop()
        if limit is None or limit.expired() or (when := limit.when()) is None:
            yield
            return
        left = when - loop.time()
        limit.reschedule(None)
        yield
        limit.reschedule(loop.time() + left)

    async def write(self, parts: Parts) -> None:
        """Write a message's parts.

        Raises:
            OSError: the connection is lost.
        """
        for part in parts:
            whole = memoryview(part)
            for begin in range(0, len(whole), CHUNK_BYTES):
                self._writer.write(whole[begin : begin + CHUNK_BYTES])
                await self._writer.drain()
                self._is_alive(min(CHUNK_BYTES, len(whole) - begin))

    async def read_prefix(self) -> bytes:
        """Return the first bytes of a message.

        Raises:
            EOFError: the stream ended.
            OSError: the connection is lost.
        """
        prefix = await self._reader.readexactly(PREFIX_BYTES)
        self._is_alive(PREFIX_BYTES)
        return prefix

    async def read_body(self, length: int, take: Callable[[int], Awaitable[None]] | None = None) -> bytearray:
        """Return what follows the prefix. The memory grows with what has come, not with what was claimed.

        Args:
            length: in bytes.
            take: waits until so many bytes more may be held; that time is not the other side's.
        Raises:
            EOFError: the stream ended.
            OSError: the connection is lost.
        """
        body = bytearray()
        while len(body) < length:
            chunk = await self._reader.read(min(CHUNK_BYTES, length - len(body)))
            if not chunk:
                raise EOFError(f"the stream ended after {len(body):,} of {length:,} bytes")
            self._is_alive(len(chunk))
            if take is not None:
                async with self._unlimited():
                    await take(len(chunk))
            body += chunk
        return body

    async def discard(self) -> None:
        """Read to the end of the stream and forget it."""
        while await self._reader.read(CHUNK_BYTES):
            pass


async def exchange(
    stream: Stream,
    parts: Parts,
    peer: str,
    limits: Limits,
    on_progress: Callable[[RequestProgress], None] | None = None,
) -> bytearray:
    """Send a request and return the answer's body. After any error, and after a cancellation, close the stream.

    Args:
        stream: on which nothing else is under way.
        parts: of the request.
        peer: its id, for errors.
        limits: of the answer.
        on_progress: called with what the peer says before it answers.
    Raises:
        PeerLostError: the stream ended.
        PeerTimeoutError: the peer was silent.
        ProtocolError: the answer is larger than allowed.
    """
    writing = asyncio.ensure_future(stream.write(parts))
    try:
        async with stream.silence_limit(limits.silence_seconds):
            # An answer may come before all was sent: that the message is too large.
            length = 0
            while not length:
                prefix = await stream.read_prefix()
                if (progress := RequestProgress.from_prefix(prefix)) is None:
                    length = body_bytes(prefix, limits.message_bytes)
                elif on_progress is not None:
                    on_progress(progress)
            return await stream.read_body(length)
    except TimeoutError:
        raise PeerTimeoutError(peer, f"has been silent for {limits.silence_seconds:g} s") from None
    except (EOFError, OSError) as error:
        raise PeerLostError(peer, "the connection ended before it had answered") from error
    finally:
        if not writing.done():
            writing.cancel()
            stream.close()
        # Whoever reads has seen that the connection is lost.
        await asyncio.gather(writing, return_exceptions=True)
