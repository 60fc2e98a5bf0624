"""Serve the page over HTTP on a socket that is bound already, in a thread, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# Connections of browsers stay open; so long they get to end.
_GRACE_SECONDS = 1
# What Gradio reads of the environment: nothing is sent to anybody, and files go where they are deleted.
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextlib.contextmanager
def quiet_gradio() -> Iterator[Path]:
    """Let Gradio send nothing and keep its files in a folder that is deleted in the end; to be entered before it is imported.

    Yields:
        the folder.
    """
    with tempfile.TemporaryDirectory(prefix="slowllm-web-", ignore_cleanup_errors=True) as folder:
        changed = {**_QUIET, "GRADIO_TEMP_DIR": folder}
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class PageServer:
    """A thread that serves an application; ended with the context.

    Args:
        app: an ASGI application.
        bound: the socket that it is served at.
        end_streams: called in the application's event loop before it ends, so that no stream to a browser keeps it.
    """

    def __init__(self, app: object, bound: socket.socket, end_streams: Callable[[], None]) -> None:
        import uvicorn

        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS, ws="none",
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._end_streams = end_streams
        self._loop: list[asyncio.AbstractEventLoop] = []
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve, args=(bound,), name="slowllm-web")

    def _serve(self, bound: socket.socket) -> None:
        try:
            asyncio.run(self._run(bound))
        except BaseException as error:  # handed to whoever looks
            self._failure.append(error)

    async def _run(self, bound: socket.socket) -> None:
        self._loop.append(asyncio.get_running_loop())
        await self._server.serve(sockets=[bound])

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            for loop in self._loop:
                loop.call_soon_threadsafe(self._end_streams)
        self._server.should_exit = True
        self._thread.join()

    def check(self) -> None:
        """Raise what has ended the server, if it has ended."""
        if self._thread.is_alive():
            return
        raise self._failure[0] if self._failure else RuntimeError("the page's server has ended by itself")
