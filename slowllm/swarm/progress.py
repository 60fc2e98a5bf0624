"""What a server says of a request that it works on: the block, the place in the queue, and the seconds left.

It stands in the place of a message's length, with the highest bit set, which no length has; so it is as small as a length
and cannot be taken for one. Knows neither streams nor requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0

_MARK, _MOST, _MOST_SECONDS = 0x80, 0xFFFF, 0xFFFFFF


@dataclass(frozen=True)
class RequestProgress:
    """How far a request is.

    Attributes:
        block: that is computed next; None where no one has begun.
        num_ahead: requests that came before it and are still to be computed.
        seconds_left: until the answer, by the server's measured speed; None where it is not known.
    """

    block: int | None
    num_ahead: int
    seconds_left: float | None

    def to_prefix(self) -> bytes:
        """Return it as 8 bytes. Numbers that are too large are the largest that can be said."""
        block = 0 if self.block is None else min(self.block + 1, _MOST)
        seconds = (
            _MOST_SECONDS if self.seconds_left is None else min(round(self.seconds_left), _MOST_SECONDS - 1)
        )
        ahead = min(self.num_ahead, _MOST)
        return (
            bytes([_MARK]) + block.to_bytes(2, "big") + ahead.to_bytes(2, "big") + seconds.to_bytes(3, "big")
        )

    @classmethod
    def from_prefix(cls, prefix: bytes) -> Self | None:
        """Return what 8 bytes say; None where they are a length."""
        if prefix[0] != _MARK:
            return None
        block, ahead, seconds = (
            int.from_bytes(prefix[begin:end], "big") for begin, end in ((1, 3), (3, 5), (5, 8))
        )
        return cls(block - 1 if block else None, ahead, None if seconds == _MOST_SECONDS else float(seconds))

    def __str__(self) -> str:
        where = "waits for its first block" if self.block is None else f"is at block {self.block}"
        ahead = f", {self.num_ahead} before it" if self.num_ahead else ""
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        return f"{where}{ahead}{left}"


class ProgressLog:
    """Writes into the log what a server says of one request, every `LOG_SECONDS` at most; called with each `RequestProgress`.

    Args:
        name: of the server.
        clock: in seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock, self._told_at = name, clock, clock()

    def __call__(self, progress: RequestProgress) -> None:
        """Note what was said."""
        now = self._clock()
        if now - self._told_at >= LOG_SECONDS:
            self._told_at = now
            log.info("%s: the request %s", self._name, progress)
