"""How many bytes of requests a server holds at a time, and whose.

A message takes room as it comes, so who claims much and sends little holds little. Messages that have begun are kept
able to end: room is given only while there is an order in which all of them could get the rest of theirs (the banker's
algorithm of Dijkstra), the memory of those that have come being free when they are answered. Those that wait to begin do
so in their order, but a peer that has claimed half of the room lets others go first.

Knows peers by their names; knows no streams and no messages. Used on one loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Up to this, a message waits for no room: one token's hidden states, and what lets go of others.
SMALL_BYTES = 64 << 10


@dataclass(eq=False)
class Place:
    """One message's place in the room.

    Attributes:
        peer: that sends it.
        length: of the whole message.
        held: bytes of it that were given room.
    """

    room: Room
    peer: str
    length: int
    held: int = 0

    @property
    def missing(self) -> int:
        """Bytes for which it has no room yet."""
        return self.length - self.held

    async def take(self, num_bytes: int) -> None:
        """Wait until there is room for so many bytes more, of those that the message has."""
        if self.length > SMALL_BYTES:
            await self.room.give(self, num_bytes)


class Room:
    """Bytes that may be held at a time.

    Args:
        num_bytes: of all messages together that are longer than `SMALL_BYTES`; each must be shorter than this.
    """

    def __init__(self, num_bytes: int) -> None:
        self._free, self._share = num_bytes, num_bytes // 2
        self._begun: set[Place] = set()
        self._waiting: list[tuple[Place, int, asyncio.Future[None]]] = []

    @contextmanager
    def place(self, peer: str, length: int) -> Iterator[Place]:
        """Yield a place for a message, which has left the room at the end of the block."""
        place = Place(self, peer, length)
        try:
            yield place
        finally:
            self._free += place.held
            self._begun.discard(place)
            self._serve()

    async def give(self, place: Place, num_bytes: int) -> None:
        """Wait until a message may hold so many bytes more."""
        turn = asyncio.get_running_loop().create_future()
        waiting = (place, num_bytes, turn)
        self._waiting.append(waiting)
        self._serve()
        try:
            await turn
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def _serve(self) -> None:
        while True:
            begun = [waiting for waiting in self._waiting if waiting[0] in self._begun]
            new = [waiting for waiting in self._waiting if waiting[0] not in self._begun]
            # While one that has begun must wait, no new one takes what it waits for.
            next_new = [] if begun else [waiting for waiting in new if not self._gives_way(waiting[0])][:1]
            if not any(self._serve_one(waiting) for waiting in begun or next_new):
                return

    def _gives_way(self, place: Place) -> bool:
        claimed = sum(other.length for other in self._begun if other.peer == place.peer)
        others_wait = any(other.peer != place.peer for other, *_ in self._waiting)
        return others_wait and claimed > 0 and claimed + place.length > self._share

    def _serve_one(self, waiting: tuple[Place, int, asyncio.Future[None]]) -> bool:
        place, num_bytes, turn = waiting
        if turn.done() or not self._can_all_end(place, num_bytes):
            return False
        self._waiting.remove(waiting)
        self._begun.add(place)
        self._free -= num_bytes
        place.held += num_bytes
        turn.set_result(None)
        return True

    def _can_all_end(self, place: Place, num_bytes: int) -> bool:
        """Whether every message that has begun could still get all of its room after this one has so much more."""
        free = self._free - num_bytes
        if free < 0:
            return False
        after = {other: (other.missing, other.held) for other in self._begun}
        after[place] = (place.missing - num_bytes, place.held + num_bytes)
        for missing, held in sorted(after.values()):
            if missing > free:
                return False
            free += held
        return True
