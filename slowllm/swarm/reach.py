"""Whether this server reaches another one, for whoever asks: how a stranger finds out who can be dialled by others.

Only peers that the model's directory names are dialled, and only so often, so that nobody uses a server to call others.
Owns one thread, because finding and asking wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

from slowllm.errors import BusyError, InputError, NetworkError
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.requests import PeerRequest

REACH_SECONDS = 5.0
# Of one asker, and of all, within the window; and those that may wait.
_WINDOW_SECONDS, _MOST_OF_ONE, _MOST_OF_ALL, _MOST_WAITING = 10.0, 8, 32, 16
# A directory that was read so lately is not read again.
_FRESH_SECONDS = 10.0


class AsksPeer(Protocol):
    """Sends a request to a peer; `Network.ask` is one."""

    def __call__(
        self, peer: str, meta: Mapping[str, Any], *, timeout: float | None = None
    ) -> Future[tuple[dict[str, Any], Any]]: ...


class DialBack:
    """Answers requests ``reach``. A context manager.

    Args:
        find: returns the records of the model's servers.
        ask: sends a request to a peer.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[ServerRecord]],
        ask: AsksPeer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find, self._ask, self._clock = find, ask, clock
        self._lock = threading.Lock()
        self._asked: deque[tuple[float, str]] = deque()
        self._num_waiting, self._is_closed = 0, False
        self._asking: Future[Any] | None = None
        self._known: frozenset[str] = frozenset()
        self._found_at = float("-inf")
        self._worker = ThreadPoolExecutor(1, "slowllm-reach")

    def handle(self, request: PeerRequest) -> None:
        """Answer whether this server reaches the ``peer`` of a request, and in how many seconds. Does not wait.

        Raises:
            BusyError: it was asked too often.
        """
        self._count(request.peer)
        self._worker.submit(self._answer, request)

    def _count(self, asker: str) -> None:
        with self._lock:
            now = self._clock()
            while self._asked and self._asked[0][0] <= now - _WINDOW_SECONDS:
                self._asked.popleft()
            own = sum(peer == asker for _, peer in self._asked)
            if own >= _MOST_OF_ONE or len(self._asked) >= _MOST_OF_ALL or self._num_waiting >= _MOST_WAITING:
                raise BusyError(
                    f"this server was asked to reach others {own} times by this peer and {len(self._asked)} times in all within "
                    f"{_WINDOW_SECONDS:g} s, which is enough; ask again later"
                )
            self._asked.append((now, asker))
            self._num_waiting += 1

    def _answer(self, request: PeerRequest) -> None:
        try:
            request.respond(self.look(request.meta.get("peer")))
        except BaseException as error:  # told to who asked; what is a fault of ours is logged there
            request.fail(error)
        finally:
            with self._lock:
                self._num_waiting -= 1

    def look(self, peer: object) -> dict[str, Any]:
        """Return the meta of an answer: whether a peer was reached, in how many seconds, and why not. Waits.

        Raises:
            InputError: the peer is no server of this model that the directory names.
        """
        if self._clock() - self._found_at > _FRESH_SECONDS:
            self._known = frozenset(record.peer for record in self._find())
            self._found_at = self._clock()
        if not isinstance(peer, str) or peer not in self._known:
            raise InputError(f"{str(peer)[:80]!r} is no server of this model that the directory names")
        began = self._clock()
        asking = self._ask(peer, {"op": "status"}, timeout=REACH_SECONDS)
        with self._lock:
            self._asking = asking
            if self._is_closed:
                asking.cancel()
        try:
            asking.result()
        except NetworkError as error:
            return {"reached": False, "seconds": self._clock() - began, "why": str(error)[:300]}
        except CancelledError:
            return {"reached": False, "seconds": 0.0, "why": "this server is leaving"}
        return {"reached": True, "seconds": self._clock() - began, "why": ""}

    def close(self) -> None:
        """Give up what is under way, and end the thread; requests that wait get no answer."""
        with self._lock:
            self._is_closed = True
            if self._asking is not None:
                self._asking.cancel()
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
