"""Tell the swarm again and again what a server is, so that who dies is forgotten.

Owns a thread. Knows a network and what to ask for the record; knows nothing of what is served.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from slowllm.errors import NetworkError
from slowllm.swarm.model_list import ModelEntry
from slowllm.swarm.network import Network
from slowllm.swarm.records import ServerRecord

log = logging.getLogger(__name__)

ANNOUNCE_SECONDS = 10.0
# A server that died is forgotten after this time.
RECORD_SECONDS = 30.0


class Announcer:
    """Announces a record now, when it is told to, and every `ANNOUNCE_SECONDS`; a context manager.

    Args:
        network: of the server.
        record: returns what the server says of itself now; called on any thread.
        kind: of its model, for the swarm's list of models.
    """

    def __init__(self, network: Network, record: Callable[[], ServerRecord], kind: str) -> None:
        self._network, self._record, self._kind = network, record, kind
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._say_for_ever, name="slowllm-announce", daemon=True)

    def tell(self) -> None:
        """Announce the record.

        Raises:
            NetworkError: nobody took it.
        """
        with self._lock:  # what is older is announced first
            record = self._record()
            self._network.announce(record, RECORD_SECONDS)
            self._network.list_model(ModelEntry(record.peer, record.model, self._kind), RECORD_SECONDS)

    def say(self) -> None:
        """Announce the record; that nobody took it is only logged: others come and go, and the next time may find some."""
        try:
            self.tell()
        except NetworkError as error:
            log.warning("%s; this server tries again in %g s", error, ANNOUNCE_SECONDS)

    def _say_for_ever(self) -> None:
        while not self._closed.wait(ANNOUNCE_SECONDS):
            self.say()

    def __enter__(self) -> Self:
        self.say()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
