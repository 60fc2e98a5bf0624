"""From one HTTP request to its answer: read it, let its prompts ride, and write what came of them.

A client that hangs up has its rides cancelled, so that their room is free at the next stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from slowllm.entrypoints.openai.chunks import ChunkWriter
from slowllm.entrypoints.openai.refusals import RequestError
from slowllm.entrypoints.openai.requests import TextRequest, read_text_request
from slowllm.entrypoints.openai.responses import ResponseOrigin, error_body, response_body
from slowllm.entrypoints.server.limits import BodyReader, ClientLimits, HTTPError, check_key
from slowllm.entrypoints.server.metrics import Metrics
from slowllm.entrypoints.server.streaming import LAST, EventStream, event, until_gone, with_comments
from slowllm.errors import BusyError, InputError, RideError, SlowLLMError, first_line
from slowllm.inference.service import Service
from slowllm.inference.service_types import Answer, PartialContinuation
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.ride import Ride

log = logging.getLogger(__name__)

# Which nobody reads: nginx's word for a client that hung up.
_GONE = 499
_SHORTEST_RETRY, _LONGEST_RETRY = 1, 600


@dataclass(frozen=True)
class Served:
    """What a server has.

    Attributes:
        lm: the model.
        service: which answers prompts; closed by the caller.
        fingerprint: of the model, its dtype and the versions it runs with.
        limits: of one request.
        max_prompts: that one request may have.
        key: that every request must bear; None for none.
    """

    lm: StreamedLM
    service: Service
    fingerprint: str
    limits: ClientLimits = field(default_factory=ClientLimits)
    max_prompts: int = 256
    key: bytes | None = None


class Answering:
    """Answers requests for completions and chats. Used on one event loop, but for `leave`.

    Args:
        served: what there is.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self.metrics = Metrics(served.service.status, lambda: served.lm.report)
        self.started = int(time.time())
        self._bodies = BodyReader(served.limits)
        self._is_leaving = threading.Event()

    @property
    def is_leaving(self) -> bool:
        """Whether new requests are refused, because the server ends."""
        return self._is_leaving.is_set()

    def leave(self) -> None:
        """Refuse new requests from now on. May be called by any thread."""
        self._is_leaving.set()

    def close(self) -> None:
        """Join the thread that reads bodies."""
        self._bodies.close()

    def place(self) -> str:
        """Return where the carousel is, in words."""
        status, lm = self.served.service.status(), self.served.lm
        if status.stop is None:
            return "waiting"
        num_blocks = len(lm.layout.blocks)
        if lm.plan.granularity != "leaves" and status.stop < num_blocks:
            return f"block {status.stop + 1} of {num_blocks}"
        return f"stop {status.stop + 1} of {status.num_stops}"

    async def answer(self, request: Request, url: str) -> Response:
        """Answer a request.

        Raises:
            HTTPError: it is refused, or fails.
        """
        begun = time.monotonic()
        status = 500
        try:
            response = await self._answer(request, url, begun)
            status = response.status_code
        except HTTPError as error:
            status = error.status
            raise
        finally:
            if status != 200 or not isinstance(response, EventStream):
                self.metrics.count(url, status, time.monotonic() - begun)
        return response

    async def _answer(self, request: Request, url: str, begun: float) -> Response:
        check_key(request, self.served.key)
        if self.is_leaving:
            raise _leaving()
        lm, seed = self.served.lm, secrets.randbits(32)
        read = functools.partial(read_text_request, lm, url, seed=seed, longest=lm.plan.longest)
        try:
            asked = await self._bodies.read(request, read)
        except RequestError as error:
            raise HTTPError(400, str(error), error.code, param=error.param) from None
        except ClientDisconnect:
            return Response(status_code=_GONE)
        word = secrets.token_hex(12)
        if asked.streams:
            return self._stream(asked, word, url, begun)
        rides = self._board(asked, None)
        try:
            gone: asyncio.Future[Any] = asyncio.create_task(until_gone(request.receive))
            ended = _all_ended(rides)
            try:
                await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not ended.done():
                    return Response(status_code=_GONE)
            finally:
                gone.cancel()
                ended.cancel()
            answers = _results(rides)
        finally:
            _cancel(rides)
        body = await asyncio.to_thread(response_body, self.served.lm, asked, answers, self._origin(), word)
        return JSONResponse(body)

    def _stream(self, asked: TextRequest, word: str, url: str, begun: float) -> EventStream:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        # Only the newest of each continuation: a client that reads slowly holds no more.
        newest: dict[tuple[int, int], PartialContinuation] = {}

        def tell(place: int, partial: PartialContinuation) -> None:
            newest[place, partial.number] = partial
            changed.set()

        def on_partial(place: int, partial: PartialContinuation) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, place, partial)

        rides = self._board(asked, on_partial)
        writer = ChunkWriter(self.served.lm, asked, self._origin(), word)

        def on_end(is_complete: bool) -> None:
            _cancel(rides)
            self.metrics.count(url, 200 if is_complete else _GONE, time.monotonic() - begun)

        async def events() -> AsyncGenerator[bytes]:
            ended = _all_ended(rides)
            ended.add_done_callback(lambda _: changed.set())
            try:
                for chunk in writer.begin():
                    yield event(chunk)
                while not ended.done():
                    await changed.wait()
                    changed.clear()
                    for (place, _), partial in _taken(newest):
                        for chunk in writer.go_on(place, partial):
                            yield event(chunk)
            finally:
                ended.cancel()
            try:
                answers = _results(rides)
            except HTTPError as error:
                yield event(error_body(str(error), error.kind, error.param, error.code))
                return
            for chunk in await asyncio.to_thread(lambda: list(writer.end(answers))):
                yield event(chunk)
            yield LAST

        return EventStream(with_comments(events(), self.place), on_end)

    def _board(
        self, asked: TextRequest, on_partial: Callable[[int, PartialContinuation], None] | None
    ) -> list[Ride[Answer]]:
        asks, rides = asked.asks(), list[Ride[Answer]]()
        if len(asks) > self.served.max_prompts:
            raise HTTPError(
                400, f"a request may have {self.served.max_prompts} prompts, and this one has {len(asks)}", "invalid_value",
                param="prompt",
            )  # fmt: skip
        try:
            for place, ask in enumerate(asks):
                told = None if on_partial is None else functools.partial(on_partial, place)
                rides.append(self.served.service.submit(ask, told))
        except BaseException as error:
            _cancel(rides)
            if isinstance(error, BusyError) and not self.is_leaving:
                raise HTTPError(
                    429, str(error), "rate_limit_exceeded", kind="rate_limit_error",
                    headers={"Retry-After": str(self._retry_seconds())},
                ) from None  # fmt: skip
            raise _as_http(error) from None
        return rides

    def _retry_seconds(self) -> int:
        """Return about how long a sweep takes: until then no room becomes free."""
        report = self.served.lm.report
        num_sweeps = report.num_passages / self.served.lm.num_stops
        seconds = (report.wait_seconds + report.compute_seconds) / max(num_sweeps, 1.0)
        return round(min(max(seconds, _SHORTEST_RETRY), _LONGEST_RETRY))

    def _origin(self) -> ResponseOrigin:
        return ResponseOrigin(self.served.lm.name, int(time.time()), self.served.fingerprint)


def _ended(ride: Ride[Answer]) -> asyncio.Future[None]:
    """Return a future of this loop that is done when a ride has ended."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not future.done():
            future.set_result(None)

    def ended(_: Ride[Answer]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle)

    ride.add_done_callback(ended)
    return future


def _all_ended(rides: Sequence[Ride[Answer]]) -> asyncio.Future[Any]:
    """Return a future of this loop that is done when all rides have ended; it may be cancelled, and nobody need ask what came of it."""
    ended: asyncio.Future[Any] = asyncio.gather(*map(_ended, rides))
    # What `gather` returns is not cancelled by `cancel` but gets an exception, of which asyncio complains if nobody asks for it.
    ended.add_done_callback(lambda future: future.cancelled() or future.exception())
    return ended


def _results(rides: Sequence[Ride[Answer]]) -> list[Answer]:
    """Return the answers of rides that have ended.

    Raises:
        HTTPError: one of them failed.
    """
    try:
        return [ride.result(0.0) for ride in rides]
    except Exception as error:
        raise _as_http(error) from None


def _cancel(rides: Sequence[Ride[Answer]]) -> None:
    for ride in rides:
        ride.cancel()


def _taken(
    newest: dict[tuple[int, int], PartialContinuation],
) -> Iterator[tuple[tuple[int, int], PartialContinuation]]:
    while newest:
        key = next(iter(newest))
        yield key, newest.pop(key)


def _leaving() -> HTTPError:
    return HTTPError(
        503,
        "the server is ending",
        "server_shutting_down",
        kind="server_error",
        headers={"Retry-After": "30"},
    )


def _as_http(error: BaseException) -> HTTPError:
    """Return the answer to a request whose prompts could not be answered."""
    if isinstance(error, InputError):
        return HTTPError(
            400, str(error), "context_length_exceeded" if "tokens" in str(error) else "invalid_value"
        )
    if isinstance(error, BusyError | RideError):  # cancelled, because the server ends
        return _leaving()
    if isinstance(error, SlowLLMError):
        return HTTPError(500, str(error), "server_error", kind="server_error")
    log.error("a request failed: %s: %s", type(error).__name__, first_line(error), exc_info=error)
    return HTTPError(
        500, "the request failed; the server's log says why", "server_error", kind="server_error"
    )
