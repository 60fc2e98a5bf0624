"""Listen at an address, and run the application there on a thread of its own, with deadlines for clients that are slow."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import TracebackType
from typing import Self

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from slowllm.entrypoints.server.answering import Answering
from slowllm.entrypoints.server.app import make_app
from slowllm.errors import SlowLLMError

# Each takes a file descriptor, of which processes often have 1,024.
MOST_CONNECTIONS = 512
# After an answer, in which the next request of a connection must begin.
_IDLE_SECONDS = 30
# In which answers are written at the end.
_LAST_SECONDS = 5
_MAX_HEAD_BYTES = 32 << 10


def timed_protocol(head_seconds: float, most_connections: int = MOST_CONNECTIONS) -> type[H11Protocol]:
    """Return uvicorn's protocol with a time in which the head of a request must come, and a most of connections.

    By itself it waits without end for the first request of a connection.
    """

    class TimedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most_connections:
                transport.abort()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._unwatch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(head_seconds, self.transport.abort)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return TimedProtocol


class HTTPServer:
    """Serves for the length of a context. Owns a thread.

    Args:
        answering: what answers requests.
        listening: a socket that listens.
    """

    def __init__(self, answering: Answering, listening: socket.socket) -> None:
        config = uvicorn.Config(
            make_app(answering), http=timed_protocol(answering.served.limits.head_seconds), ws="none", loop="asyncio",
            lifespan="on", log_config=None, access_log=False, server_header=False, timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_LAST_SECONDS, h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._listening = listening
        # Not the main thread, where uvicorn would handle signals by itself.
        self._thread = threading.Thread(target=self._run, name="slowllm-http", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(2 * _LAST_SECONDS)

    def check(self) -> None:
        """Raise what ended the server, if it has ended.

        Raises:
            SlowLLMError: it has.
        """
        if not self._thread.is_alive():
            raise SlowLLMError("the HTTP server has ended by itself; the log says why") from self._error

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listening])
        except BaseException as error:  # raised by `check`
            self._error = error
