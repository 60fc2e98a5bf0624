"""The server's side of a stream: read requests, hand each one to the handler, and send what it answers.

Knows streams and messages; knows nothing of what is asked, and nothing of hivemind.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from slowllm.errors import ProtocolError, RefusedError, RemoteError, SlowLLMError
from slowllm.swarm.messages import Meta, Tensors, body_bytes, decode, encode
from slowllm.swarm.progress import RequestProgress
from slowllm.swarm.room import Room
from slowllm.swarm.streams import Limits, Parts, Stream

logger = logging.getLogger(__name__)
REQUEST, ANSWER, ERROR = "request", "answer", "error"
MAX_SENTENCE_LETTERS = 1000
# A message that takes longer than this to decode would hold up the loop.
INLINE_BYTES = 1 << 20


class PeerRequest:
    """One request of a peer, to be answered once, from any thread and at any time.

    Attributes:
        peer: id of who asks.
        meta: what is asked.
        tensors: by name; they take memory until the request is answered and they are let go.
        progress: called on the loop once in a while, to tell the peer how far the work is; None to tell nothing.
    """

    def __init__(self, peer: str, meta: Meta, tensors: Tensors, max_bytes: int) -> None:
        self.peer, self.meta, self.tensors = peer, meta, tensors
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._is_answered = self._is_cancelled = False
        self._on_end: list[Callable[[str, Mapping[str, Any]], object]] = []
        self._on_cancel: list[Callable[[], object]] = []
        self.progress: Callable[[], RequestProgress] | None = None
        self.answer: asyncio.Future[Parts] = self._loop.create_future()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._is_cancelled

    def respond(
        self,
        meta: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        compression: Mapping[str, str] | None = None,
    ) -> None:
        """Answer. The tensors must not be changed before they are sent. If nobody waits any more, nothing happens.

        Raises:
            ProtocolError: the answer cannot be sent; the request can still be answered, with `fail`.
        """
        parts = encode(
            {ANSWER: dict(meta or {})}, tensors, compression=compression, max_bytes=self._max_bytes
        )
        self._settle(parts)
        self._has_ended("answered", meta or {})

    def fail(self, error: BaseException) -> None:
        """Answer with an error, which is raised as a RemoteError at the peer; after an answer, only log it.

        What is not a SlowLLMError is logged here, and its text stays here: it may name files of this machine.
        """
        if self._is_answered:
            logger.error("a request of peer %s failed after its answer", self.peer, exc_info=error)
            return
        if isinstance(error, SlowLLMError):
            said = [type(error).__name__, str(error)[:MAX_SENTENCE_LETTERS]]
        else:
            logger.error("a request of peer %s failed", self.peer, exc_info=error)
            said = [type(error).__name__, "the server failed; its log says more"]
        self._settle(encode({ERROR: said}))
        self._has_ended(said[0], {})

    def add_end_callback(self, callback: Callable[[str, Mapping[str, Any]], object]) -> None:
        """Call this once when the request ends, which it has not yet.

        Args:
            callback: gets the outcome (``answered``, ``cancelled``, or the name of an error) and the meta of the answer.
        """
        self._on_end.append(callback)

    def _has_ended(self, outcome: str, said: Mapping[str, Any]) -> None:
        with self._lock:
            callbacks, self._on_end = self._on_end, []
        for callback in callbacks:
            callback(outcome, said)

    def add_cancel_callback(self, callback: Callable[[], object]) -> None:
        """Call this on the loop's thread when the peer cancels or is lost before the answer; at once if it has."""
        with self._lock:
            if self._is_answered:
                return
            if not self._is_cancelled:
                self._on_cancel.append(callback)
                return
        callback()

    def cancel(self) -> None:
        """Note that nobody waits any more, and tell those who asked to be told. Called on the loop's thread."""
        with self._lock:
            self._is_cancelled = True
            callbacks, self._on_cancel = self._on_cancel, []
        for callback in callbacks:
            callback()
        self._has_ended("cancelled", {})

    def _settle(self, parts: Parts) -> None:
        with self._lock:
            assert not self._is_answered, "a request was answered twice"
            self._is_answered = True
            self._on_cancel.clear()
        # Nobody waits on a loop that is closed, either.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._set, parts)

    def _set(self, parts: Parts) -> None:
        if not self.answer.done():
            self.answer.set_result(parts)


Handler = Callable[[PeerRequest], Awaitable[None] | None]


class StreamServer:
    """Answers the streams that peers open, as many as they may. Used on one loop."""

    def __init__(
        self, handler: Handler, limits: Limits, admits: Callable[[str, Stream], Awaitable[bool]] | None = None
    ) -> None:
        self._handler, self._limits, self._admits = handler, limits, admits
        self._room = Room(limits.held_bytes)
        self._num_streams: Counter[str] = Counter()
        self._asked: set[str] = set()

    def take_asking(self) -> set[str]:
        """Return the peers that have streams, or have had one since the last call."""
        asked, self._asked = self._asked | self._num_streams.keys(), set()
        return asked

    async def serve(self, peer: str, stream: Stream) -> None:
        """Answer the requests of one stream until it ends, and close it."""
        if (
            self._num_streams[peer] >= self._limits.streams_per_peer
            or self._num_streams.total() >= self._limits.num_streams
        ):
            logger.info("peer %s opens more streams than allowed", peer)
            stream.close()
            return
        self._num_streams[peer] += 1
        self._asked.add(peer)
        try:
            if self._admits is None or await self._admits(peer, stream):
                await serve_stream(stream, peer, self._handler, self._room, self._limits)
        finally:
            stream.close()
            self._num_streams[peer] -= 1
            if not self._num_streams[peer]:
                del self._num_streams[peer]


async def decoded(body: bytearray, max_bytes: int) -> tuple[Meta, Tensors]:
    """Return what `decode` does, without holding up the loop for large messages."""
    if len(body) <= INLINE_BYTES:
        return decode(body, max_bytes=max_bytes)
    return await asyncio.get_running_loop().run_in_executor(None, lambda: decode(body, max_bytes=max_bytes))


def unpack_answer(peer: str, said: Meta) -> Meta:
    """Return the meta of an answer.

    Raises:
        RemoteError: the peer answers with an error.
        ProtocolError: it is no answer.
    """
    if isinstance(meta := said.get(ANSWER), dict):
        return meta
    error = said.get(ERROR)
    if not isinstance(error, list) or [type(word) for word in error] != [str, str]:
        raise ProtocolError(f"peer {peer} sends neither an answer nor an error")
    # Letters that change how a terminal shows what follows are a stranger's way to write on it.
    kind, sentence = ("".join(c if c.isprintable() else " " for c in word) for word in error)
    raise RemoteError(peer, kind[:MAX_SENTENCE_LETTERS], sentence[:MAX_SENTENCE_LETTERS])


def ends_stream(said: Meta) -> bool:
    """Whether the peer that says this reads nothing more on its stream: it was not asked properly, or not by one of its own."""
    error = said.get(ERROR)
    return isinstance(error, list) and error[:1] in ([ProtocolError.__name__], [RefusedError.__name__])


async def serve_stream(stream: Stream, peer: str, handler: Handler, room: Room, limits: Limits) -> None:
    """Answer the requests of one stream, one after the other, until it ends; close it then."""
    prefix: asyncio.Task[bytes] = asyncio.create_task(stream.read_prefix())
    try:
        while True:
            async with asyncio.timeout(limits.idle_seconds):
                length = body_bytes(await prefix, limits.message_bytes)
            under_way: list[PeerRequest] = []
            beats = asyncio.create_task(_beat(stream, limits.beat_seconds, under_way))
            try:
                with room.place(peer, length) as place:
                    async with stream.silence_limit(limits.silence_seconds, limits.least_rate):
                        body = await stream.read_body(length, place.take)
                    # Nothing comes before the answer has gone, except the end of the stream: a cancellation.
                    prefix = asyncio.create_task(stream.read_prefix())
                    said, tensors = await decoded(body, limits.message_bytes)
                    if not isinstance(meta := said.get(REQUEST), dict):
                        raise ProtocolError("a message is no request")
                    del body
                    request = PeerRequest(peer, meta, tensors, limits.message_bytes)
                    under_way.append(request)
                    del tensors
                    answer = await _answer(request, handler, prefix)
                    beats.cancel()
                    if answer is None:
                        return
                    # An answer is about as large as its request, whose room it keeps until it has gone.
                    async with stream.silence_limit(limits.silence_seconds, limits.least_rate):
                        await stream.write(answer)
            finally:
                beats.cancel()
    except ProtocolError as error:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(limits.silence_seconds):
                await stream.write(encode({ERROR: [type(error).__name__, str(error)[:MAX_SENTENCE_LETTERS]]}))
                prefix.cancel()
                # Closing now could overtake the answer; the peer closes when it has read it.
                await asyncio.gather(prefix, return_exceptions=True)
                await stream.discard()
    except (EOFError, OSError, TimeoutError):
        pass  # the peer has left, is silent, or has not asked for long; there is nobody to tell
    finally:
        prefix.cancel()
        await asyncio.gather(prefix, return_exceptions=True)
        stream.close()


async def _beat(stream: Stream, seconds: float, under_way: Sequence[PeerRequest]) -> None:
    """Tell the peer at regular times that its request is being read or worked on."""
    while True:
        await asyncio.sleep(seconds)
        told = under_way[0].progress if under_way else None
        stream.beat(None if told is None else told())


async def _answer(request: PeerRequest, handler: Handler, prefix: asyncio.Task[bytes]) -> Parts | None:
    """Return the parts of the handler's answer, None if the peer has left before."""
    running: asyncio.Future[None] | None = None
    try:
        try:
            result = handler(request)
            if inspect.isawaitable(result):
                running = asyncio.ensure_future(_finish(request, result))
        except Exception as error:  # whatever a handler raises is told to who asked
            request.fail(error)
        first: set[asyncio.Future[Any]] = {request.answer, prefix}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        # A request that comes before the answer to the last one breaks the rules; treat it as a peer that has left.
        return request.answer.result() if request.answer.done() else None
    finally:
        if not request.answer.done():
            request.cancel()
            if running is not None:
                running.cancel()
        # The stream keeps the request until the next one comes, which must not keep a server's model in memory.
        request.tensors, request.progress = {}, None


async def _finish(request: PeerRequest, result: Awaitable[None]) -> None:
    try:
        await result
    except Exception as error:  # as above
        request.fail(error)
