"""Look once in a while whether a server should move to other blocks, and let it move.

Owns a thread. The decisions are those of `slowllm.swarm.rebalancing`; what moving is, the server knows.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

from slowllm.errors import NetworkError
from slowllm.swarm.rebalancing import better_blocks, delay_seconds, next_check_seconds, reason_to_move
from slowllm.swarm.records import ServerRecord

log = logging.getLogger(__name__)

# What comes of a wish to move: the server is there; it stays because clients use it; the blocks could not be opened, so
# it is back at its old ones.
Move = Literal["moved", "in use", "failed"]


class Moves(Protocol):
    """Moves a server; `Server.move` does."""

    def __call__(self, first: int, end: int, why: str) -> Move:
        """Move to the blocks from `first` to `end` - 1, for a reason that is logged."""


class Rebalancer:
    """Looks at the swarm for a server that may have any blocks, as long as the context lasts.

    Args:
        find: returns the records of the model's servers as they are now.
        own: returns the server's record as it is now.
        move: moves the server.
        num_blocks: of the model.
        allowed: blocks that the server can have.
        fail: called on the thread with what ended it, if that is an error.
        wait: waits so many seconds, and returns whether the server is being closed; by default until `close` is called.
        generator: of the times between looks.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[ServerRecord]],
        own: Callable[[], ServerRecord],
        move: Moves,
        num_blocks: int,
        allowed: Collection[int],
        fail: Callable[[BaseException], object],
        *,
        wait: Callable[[float], bool] | None = None,
        generator: random.Random | None = None,
    ) -> None:
        self._find, self._own, self._move, self._fail = find, own, move, fail
        self._num_blocks, self._allowed = num_blocks, allowed
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._random = generator or random.Random()
        # Those that could not be opened would not open the next time either, and each try is a time without service.
        self._unusable: set[tuple[int, int]] = set()
        self._thread = threading.Thread(target=self._look_for_ever, name="slowllm-rebalance", daemon=True)

    def look(self) -> Move | None:
        """Look whether the swarm needs the server elsewhere, wait, look again, and move; None where it stays.

        Raises:
            SlowLLMError: the server could neither move nor go back.
        """
        if self._wish() is None or self._wait(delay_seconds(self._random)):
            return None
        wish = self._wish()  # others may have gone there in the meantime
        if wish is None:
            return None
        (first, end), why = wish
        done = self._move(first, end, why)
        if done == "failed":
            self._unusable.add((first, end))
        return done

    def _wish(self) -> tuple[tuple[int, int], str] | None:
        """Return the span to which the server should move, and why."""
        try:
            own, records = self._own(), self._find()
        except NetworkError as error:
            log.info("whether other blocks need this server is not known (%s)", error)
            return None
        if own.state != "online":
            return None
        span = better_blocks(records, own, self._num_blocks, allowed=self._allowed)
        if span is None or span in self._unusable:
            return None
        return span, reason_to_move(records, own, span, self._num_blocks)

    def _look_for_ever(self) -> None:
        try:
            while not self._wait(next_check_seconds(self._random)):
                self.look()
        except BaseException as error:  # handed to whoever waits for the server
            self._fail(error)

    def close(self) -> None:
        """End the thread, after a move that is under way. Idempotent."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
