"""Which servers a client knows: those that the swarm's directory had lately. It is read again beside the work.

A peer of the directory that hangs holds up nobody who can go on with what is known.

Knows records and how they are looked for; chooses nothing.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from slowllm.errors import DirectoryError
from slowllm.swarm.records import ServerRecord

log = logging.getLogger(__name__)


class KnownServers:
    """The records of one model's servers. All methods may be called from any thread.

    Args:
        look: begins to read the directory, and returns the future of what it has; `Network.look` does. It must end by
            itself. Its result may be set on any thread.
        refresh_seconds: after which the directory is read again.
    """

    def __init__(self, look: Callable[[], Future[list[ServerRecord]]], refresh_seconds: float) -> None:
        self._look, self._refresh_seconds = look, refresh_seconds
        self._lock = threading.Lock()
        self._records: dict[str, ServerRecord] | None = None
        self._looked_at = -math.inf
        self._under_way: Future[None] | None = None
        self._is_failing = False

    def get(self, peer: str) -> ServerRecord | None:
        """Return the record of a server; None where none is known."""
        with self._lock:
            return (self._records or {}).get(peer)

    def records(self, deadline: float = math.inf) -> list[ServerRecord]:
        """Return what is known; where that is old, let the directory be read. Waits only where it never was.

        Args:
            deadline: of `time.monotonic`, until which is waited.
        Raises:
            DirectoryError: nothing is known, and the directory does not answer.
            NetworkError: the network is closed, or libp2p's process has ended.
        """
        if self._records is None:
            self.renew(deadline)
        elif time.monotonic() - self._looked_at > self._refresh_seconds:
            self._begin()
        with self._lock:
            return list((self._records or {}).values())

    def renew(self, deadline: float = math.inf) -> None:
        """Read the directory, and wait for what it has.

        Args:
            deadline: of `time.monotonic`, until which is waited.
        Raises:
            DirectoryError: it does not answer, or not in time.
            NetworkError: the network is closed, or libp2p's process has ended.
        """
        self._wait(self._begin(), deadline)

    def _begin(self) -> Future[None]:
        """Begin to read the directory, unless that is under way."""
        with self._lock:
            if self._under_way is not None:
                return self._under_way
            reading: Future[None] = Future()
            self._under_way, self._looked_at = reading, time.monotonic()
        try:
            looking = self._look()
        except BaseException as error:
            with self._lock:
                self._under_way = None
            reading.set_exception(error)
            raise
        looking.add_done_callback(functools.partial(self._take, reading))
        return reading

    def _take(self, reading: Future[None], looking: Future[list[ServerRecord]]) -> None:
        """Take what a look has found. Whoever waits is told behind that."""
        try:
            found = looking.result()
        except BaseException as error:
            with self._lock:
                is_new, self._is_failing, self._under_way = not self._is_failing, True, None
                is_known = self._records is not None
            if is_new and is_known and isinstance(error, DirectoryError):
                log.warning("%s; the servers that were known before are asked", error)
            reading.set_exception(error)
            return
        self._put(found)
        reading.set_result(None)

    def _put(self, found: Sequence[ServerRecord]) -> None:
        with self._lock:
            self._records = {record.peer: record for record in found}
            self._under_way, self._is_failing = None, False

    def _wait(self, reading: Future[None], deadline: float) -> None:
        seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        try:
            reading.result(seconds)
        except TimeoutError:
            raise DirectoryError("the swarm's directory has not answered in time") from None
