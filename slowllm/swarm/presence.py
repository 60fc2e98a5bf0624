"""Which of the peers that have asked are still there.

A peer that was killed says nothing; its streams and its connection end. Streams alone do not tell: a server closes those
that are not used, and a client opens new ones. So a peer has left when it has had neither for a while. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection


class Presence:
    """The peers that have asked and have not left.

    Args:
        seconds: without a stream and a connection, after which a peer has left.
        clock: monotonic, in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._seen_at: dict[str, float] = {}

    def left(self, asking: Collection[str], connected: Collection[str]) -> list[str]:
        """Return the peers that have left since the last call.

        Args:
            asking: peers that have streams now.
            connected: peers that have a connection now, whether they ever asked or not.
        """
        now = self._clock()
        here = {*asking, *(peer for peer in self._seen_at if peer in connected)}
        self._seen_at.update(dict.fromkeys(here, now))
        gone = [peer for peer, seen_at in self._seen_at.items() if now - seen_at >= self._seconds]
        for peer in gone:
            del self._seen_at[peer]
        return gone
