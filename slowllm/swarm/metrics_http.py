"""Answer ``GET /metrics`` at one address, and nothing else anywhere else. Knows nothing of what the metrics are.

Whoever reaches the address can connect, so a client that is slow or silent keeps nobody else waiting, and not the end of
the server either: every request has a deadline, and beyond so many connections the oldest is closed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from slowllm.errors import InputError, first_line

log = logging.getLogger(__name__)

# For a whole request and its answer, however its bytes come.
REQUEST_SECONDS = 5.0
# Each is a thread.
MOST_CONNECTIONS = 16
# Between looks whether a request's time is over, or the server ends.
_LOOK_SECONDS = 0.2
_MAX_PORT = 65535
_PORT_DIGITS = 5


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        listener = cast(_Listener, self.server)
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "the metrics are at /metrics")
            return
        body = listener.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", listener.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each reading."""


class _Listener(ThreadingHTTPServer):
    """Listens, and has a thread for each connection; see `serving_metrics`."""

    # Neither the end of the server nor that of the process waits for a request.
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, content_type: str, text: Callable[[], str]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.content_type, self.text = content_type, text
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}  # the oldest first
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks the name of the host up, which may ask the network.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            while len(self._deadlines) >= MOST_CONNECTIONS:
                self._hang_up(next(iter(self._deadlines)))
            self._deadlines[request] = time.monotonic() + REQUEST_SECONDS
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self.hang_up(time.monotonic())

    def hang_up(self, now: float = math.inf) -> None:
        """End the connections whose time is over; their threads see the end of what they read or write."""
        with self._lock:
            for request in [own for own, deadline in self._deadlines.items() if deadline <= now]:
                self._hang_up(request)

    def _hang_up(self, request: socket.socket) -> None:
        # Its thread closes it: closed here, its number could be another connection's already.
        del self._deadlines[request]
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        assert error is not None, "it is being handled"
        if isinstance(error, ConnectionError):
            return  # a client that hung up, or was too slow
        log.error("the metrics were not answered: %s: %s", type(error).__name__, first_line(error))


def parse_host_port(text: str) -> tuple[str, int]:
    """Return the host and the port of ``HOST:PORT``; IPv6 numbers stand in brackets.

    Raises:
        InputError: it is none.
    """
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not colon
        or not bare
        or (":" in bare and bare == host)
        or not (port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS and int(port) <= _MAX_PORT)
    ):
        raise InputError(f"--metrics {text!r} is no HOST:PORT such as 127.0.0.1:9100 or [::1]:9100")
    return bare, int(port)


@contextlib.contextmanager
def serving_metrics(address: str, content_type: str, text: Callable[[], str]) -> Iterator[str]:
    """Serve metrics for the length of the context; yield the URL at which they are read.

    Args:
        address: ``HOST:PORT``; it listens there only. Port 0 is any that is free.
        content_type: of the text.
        text: returns the metrics of the moment; called on threads of its own, several at once.
    Raises:
        InputError: this is no address, or it cannot be listened at.
    """
    host, port = parse_host_port(address)
    try:
        server = _Listener(host, port, content_type, text)
    except OSError as error:
        raise InputError(
            f"--metrics {address} cannot be listened at ({error.strerror or error}); choose another port, or a host of this "
            "machine"
        ) from error
    thread = threading.Thread(
        target=server.serve_forever, args=(_LOOK_SECONDS,), name="slowllm-metrics", daemon=True
    )
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_address[1]}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        server.hang_up()
        thread.join()
