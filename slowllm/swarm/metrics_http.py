"""Answer ``GET /metrics`` at one address, and nothing else anywhere else. Knows nothing of what the metrics are."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

from slowllm.errors import InputError

# Of silence, after which a reader is left, so that the next one is answered.
_SILENCE_SECONDS = 5.0
_MAX_PORT = 65535


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
        or not (port.isascii() and port.isdigit() and int(port) <= _MAX_PORT)
    ):
        raise InputError(f"--metrics {text!r} is no HOST:PORT such as 127.0.0.1:9100 or [::1]:9100")
    return bare, int(port)


@contextlib.contextmanager
def serving_metrics(address: str, content_type: str, text: Callable[[], str]) -> Iterator[str]:
    """Serve metrics for the length of the context; yield the URL at which they are read.

    Args:
        address: ``HOST:PORT``; it listens there only. Port 0 is any that is free.
        content_type: of the text.
        text: returns the metrics of the moment; called on a thread of its own.
    Raises:
        InputError: this is no address, or it cannot be listened at.
    """
    host, port = parse_host_port(address)

    class _Handler(BaseHTTPRequestHandler):
        timeout = _SILENCE_SECONDS

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "the metrics are at /metrics")
                return
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each reading."""

    class _Listener(HTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def server_bind(self) -> None:
            # HTTPServer's own looks the name of the host up, which may ask the network.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()

    try:
        server = _Listener((host, port), _Handler)
    except OSError as error:
        raise InputError(
            f"--metrics {address} cannot be listened at ({error.strerror or error}); choose another port, or a host of this "
            "machine"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="slowllm-metrics", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_address[1]}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
