"""An asyncio loop in a thread of its own, which other threads give work to, and which ends with nothing left over.

Knows nothing of networks.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from slowllm.errors import NetworkError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]
_CLOSED = "the network was closed"


class LoopThread:
    """The thread. Owns it and its loop: `close` it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._log)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closing = False
        self._thread.start()

    def submit(self, work: Work[T]) -> Future[T]:
        """Return the future of a coroutine that runs on the loop. When the loop is closed it fails with a NetworkError.

        Raises:
            NetworkError: the loop is closed.
        """
        with self._lock:
            if self._is_closing:
                raise NetworkError(_CLOSED)
            # A connection keeps the context in which it was opened, and the caller's holds caches and tensors.
            submit = asyncio.run_coroutine_threadsafe
            return contextvars.Context().run(submit, self.until_closed(work), self._loop)

    def soon(self, work: Callable[[], object]) -> None:
        """Let the loop's thread do a short piece of work soon; when the loop is closed, it is not done.

        Takes no lock: the garbage collector may call this on a thread that holds any.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(work, context=contextvars.Context())

    def call(self, work: Work[T], seconds: float) -> T:
        """Run a coroutine on the loop and wait for it, at most so long.

        Raises:
            NetworkError: the loop is closed, or the time is over.
        """
        assert threading.current_thread() is not self._thread, "this would wait for itself"

        async def limited() -> T:
            try:
                async with asyncio.timeout(seconds):
                    return await work()
            except TimeoutError as error:
                raise NetworkError(f"the swarm has not answered in {seconds:g} s") from error

        return self.submit(limited).result()

    async def until_closed(self, work: Work[T]) -> T:
        """Do work of the loop's own that ends with a NetworkError when the loop is closed."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._is_closing:
                raise NetworkError(_CLOSED)
            return await work()
        except asyncio.CancelledError:
            if self._is_closing:
                raise NetworkError(_CLOSED) from None
            raise
        finally:
            self._tasks.discard(task)

    def close(self, last: Work[None]) -> None:
        """End what runs, do one last thing on the loop, and end the thread. Once only."""
        assert threading.current_thread() is not self._thread, "this would wait for itself"
        with self._lock:
            assert not self._is_closing, "closed twice"
            self._is_closing = True
        try:
            asyncio.run_coroutine_threadsafe(self._end(last), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _end(self, last: Work[None]) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await last()
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _log(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log in one line what a task that nobody waits for has raised: hivemind's do when their process dies."""
        level = logging.DEBUG if self._is_closing else logging.WARNING
        logger.log(level, "%s (%r)", context["message"], context.get("exception"))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()
