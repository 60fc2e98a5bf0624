"""The ring: where streamed tensors lie in one buffer, and which stops are evicted to make room.

Extents are allocated in a circle, first in, first out, with exceptions where the order of visits turns. Knows which
stops are wanted; knows no threads and no files. Plain first-fit over free extents was tried against it: see
benchmarks/LOG.md, 2026-11-29.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from slowllm.storage.spans import Placement
from slowllm.streaming.buffers import PAGE, Buffer
from slowllm.streaming.read_requests import ReadRequest, ring_bytes_of


def smallest_ring(stops: Sequence[Sequence[Placement]]) -> int:
    """Return the smallest ring that never blocks.

    The largest stop, and the largest tensor again: a tensor that does not fit before the ring's end goes to its
    beginning and leaves a gap that is smaller than itself.
    """
    if not any(stops):
        return PAGE
    return max(sum(map(ring_bytes_of, stop)) for stop in stops) + max(
        ring_bytes_of(tensor) for stop in stops for tensor in stop
    )


@dataclass
class LoadedStop:
    """A stop in memory, or on its way there.

    Attributes:
        stop: its number.
        resident: whether it stays once it is read; it then takes no room in the ring.
        unplaced: tensors that have no place yet.
        requests: reads of placed tensors that have not begun, with the memory that they fill.
        weights: the placed tensors, by name.
        regions: the memory of each.
        num_in_flight: reads under way.
        held: whether a visitor holds it.
        was_held: whether one has held it.
        began_at: when its first read began, by `time.perf_counter`; None where none has.
        read_bytes: bytes read so far.
    """

    stop: int
    resident: bool
    unplaced: deque[Placement]
    requests: deque[tuple[np.ndarray, ReadRequest]] = field(default_factory=deque)
    weights: dict[str, Tensor] = field(default_factory=dict)
    regions: list[np.ndarray] = field(default_factory=list)
    num_in_flight: int = 0
    held: bool = False
    was_held: bool = False
    began_at: float | None = None
    read_bytes: int = 0

    @property
    def ready(self) -> bool:
        """Whether all of it has been read."""
        return not (self.unplaced or self.requests or self.num_in_flight)


class Ring:
    """One buffer through which stops stream, and the stops that are in memory.

    Args:
        num_bytes: size of the buffer, at least `smallest_ring`.
        stop_bytes: bytes that each stop takes in it.
        resident: stops that lie elsewhere, and are never evicted for others.
    Attributes:
        buffer: the memory.
        loaded: the stops that are in memory or on their way there, by number; resident ones, too.
        streamed: those of them that are not resident.
        wanted: stops that are waited for or expected, the next first.
        upcoming: stops that are expected behind the one that is held.
        dropped_bytes: bytes read of stops that were given up before anybody held them.
    """

    def __init__(self, num_bytes: int, stop_bytes: Sequence[int], resident: frozenset[int]) -> None:
        self.buffer = Buffer(num_bytes)
        self.loaded: dict[int, LoadedStop] = {}
        self.streamed: dict[int, LoadedStop] = {}
        self.wanted: list[int] = []
        self.upcoming: list[int] = []
        self.dropped_bytes = 0
        self._num_bytes, self._stop_bytes, self._resident = num_bytes, stop_bytes, resident
        self._extents: deque[tuple[int, int, LoadedStop]] = deque()
        self._started_over: set[int] = set()

    def place(self, num_bytes: int, slot: LoadedStop) -> np.ndarray | None:
        """Return memory for the next tensor of a stop, evicting others; None where there is no room yet.

        The stop itself may be evicted, to start over behind others.
        """
        while (region := self._allocate(num_bytes, slot)) is None:
            # Behind a stop that is still wanted, as where the carousel turns, others may be done with.
            if not self._is_done_with(self._extents[0][2]):
                if self._trim():
                    continue
                region = self._reuse(num_bytes, slot)
                if region is not None:
                    break
            if not self._drop_oldest(slot):
                return None
        return region

    def finish(self, slot: LoadedStop) -> None:
        """Note that the last tensor of a stop has its place."""
        self._started_over.discard(slot.stop)

    def add(self, slot: LoadedStop) -> None:
        """Note a stop that is going to be read."""
        self.loaded[slot.stop] = slot
        if not slot.resident:
            self.streamed[slot.stop] = slot

    def release(self) -> None:
        """Forget all stops, and let the buffer go. Weights handed out stay readable."""
        self.loaded.clear()
        self.streamed.clear()
        self._extents.clear()
        self.buffer.release()

    def evict(self, slot: LoadedStop) -> None:
        """Give a stop up. Its extents leave the ring when they are the oldest and no read is under way."""
        slot.unplaced.clear()
        slot.requests.clear()
        if self.loaded.get(slot.stop) is slot:
            del self.loaded[slot.stop]
            self.streamed.pop(slot.stop, None)
            if not slot.was_held:
                self.dropped_bytes += slot.read_bytes

    def _allocate(self, num_bytes: int, slot: LoadedStop) -> np.ndarray | None:
        if not num_bytes:  # an extent of no bytes would look like a full circle
            return self.buffer.bytes[:0]
        start = self._fit(num_bytes)
        if start is None:
            return None
        self._extents.append((start, num_bytes, slot))
        return self.buffer.bytes[start : start + num_bytes]

    def _fit(self, num_bytes: int) -> int | None:
        if not self._extents:
            return 0 if num_bytes <= self._num_bytes else None
        oldest, (newest, length, _) = self._extents[0][0], self._extents[-1]
        head = newest + length
        if head <= oldest:  # the circle has wrapped; free is what lies between
            return head if head + num_bytes <= oldest else None
        if head + num_bytes <= self._num_bytes:
            return head
        return 0 if num_bytes <= oldest else None

    def _trim(self) -> bool:
        """Take what is done with from the circle's newest end, as the head's chunks are when a sweep has turned."""
        extents, has_trimmed = self._extents, False
        while len(extents) > 1 and self._is_done_with(extents[-1][2]):
            self.evict(extents.pop()[2])
            has_trimmed = True
        return has_trimmed

    def _reuse(self, num_bytes: int, newcomer: LoadedStop) -> np.ndarray | None:
        """Give the newcomer the place of a tensor that nobody waits for any more, in the middle of the circle.

        Only where it fits well: what is left over of the place is lost until the circle comes round.
        """
        if newcomer.stop in self._started_over:
            return None
        for index, (start, length, slot) in enumerate(self._extents):
            if not num_bytes <= length <= num_bytes * 9 // 8 or slot is newcomer:
                continue
            if not self._is_done_with(slot):
                continue
            self.evict(slot)
            self._extents[index] = (start, length, newcomer)
            return self.buffer.bytes[start : start + num_bytes]
        return None

    def _is_done_with(self, slot: LoadedStop) -> bool:
        is_known = self.loaded.get(slot.stop) is slot
        return not (slot.held or slot.num_in_flight or (is_known and slot.stop in self.wanted))

    def _drop_oldest(self, newcomer: LoadedStop) -> bool:
        oldest = self._extents[0][2]
        if oldest is newcomer:
            # Its places in the middle of the circle may be what it is hemmed in by, so it takes none again.
            self._started_over.add(newcomer.stop)
            # Half of it was read ahead, then another stop was wanted sooner and lies behind it. The circle can
            # only be freed from its oldest end, so the newcomer starts over behind the other.
            if any(self._is_needed(slot, newcomer) for _, _, slot in self._extents if slot is not newcomer):
                return False
        elif self._is_needed(oldest, newcomer):
            return False
        self.evict(oldest)
        if oldest.num_in_flight:
            return False
        while self._extents and self._extents[0][2] is oldest:
            self._extents.popleft()
        return oldest is not newcomer

    def _is_needed(self, slot: LoadedStop, newcomer: LoadedStop) -> bool:
        """Whether a slot must stay because it is held, or wanted sooner than the newcomer, or soon after it."""
        if slot.held:
            return True
        if self.loaded.get(slot.stop) is not slot or slot.stop not in self.wanted:
            return False
        place, own = self.wanted.index(slot.stop), self.wanted.index(newcomer.stop)
        if place < own:
            return True
        # Where a sweep turns, the stop at the turn is wanted again behind a few others. To read it twice takes longer
        # than to let the newcomer, whom nobody waits for yet, begin when the stop that is held has been passed.
        return own > 0 and slot.ready and self._can_stay(slot, newcomer)

    def _can_stay(self, slot: LoadedStop, newcomer: LoadedStop) -> bool:
        """Whether a slot fits beside the newcomer, and what is to be read before it is wanted fits in the ring."""
        later = self.upcoming
        if slot.stop not in later or newcomer.stop not in later:
            return False
        before = later[: later.index(slot.stop)]
        between = before[before.index(newcomer.stop) + 1 :] if newcomer.stop in before else []
        beside = [slot.stop, newcomer.stop, *(stop for stop in between if self._is_there(stop))]
        missing = [stop for stop in before if not self._is_there(stop)]
        return max(self._bytes_of(beside), self._bytes_of(missing)) <= self._num_bytes

    def _bytes_of(self, stops: Sequence[int]) -> int:
        return sum(self._stop_bytes[stop] for stop in stops if stop not in self._resident)

    def _is_there(self, stop: int) -> bool:
        return stop in self.loaded and self.loaded[stop].ready
