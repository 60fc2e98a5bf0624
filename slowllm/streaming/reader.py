"""Fill buffers with the bytes of a stop, ahead of need, in any order.

Knows files, order and memory; knows nothing about models or compute dtypes. A stop handed out stays valid until
it is given back. Buffers are allocated once: a ring for the stops that stream, and one kept buffer for each
tensor of a resident stop. Reads bypass the page cache (O_DIRECT) where the file system allows, else they are buffered and
the pages are dropped behind them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slowllm.errors import RideError
from slowllm.storage.spans import Placement, Run, Span
from slowllm.streaming.buffers import PAGE, Buffer, page_up
from slowllm.streaming.direct_io import Files
from slowllm.streaming.read_requests import in_file_order
from slowllm.streaming.stops import Weights

log = logging.getLogger(__name__)


LARGE_BYTES = 1 << 18


# How long closing waits for the reads under way, all together. From a network disk that is gone none returns.
CLOSE_PATIENCE_SECONDS = 5.0


def _lead(placement: Placement) -> int:
    """Bytes between the start of a tensor's page and its first byte, so that file and memory agree modulo a page."""
    if not placement.runs:
        return 0
    first = placement.runs[0]
    lead = (first.span.offset + first.source) % PAGE
    # torch cannot view bf16 at an odd address; such a tensor goes through a bounce buffer instead.
    return lead if lead % placement.stored_dtype.itemsize == 0 else 0


def ring_bytes_of(placement: Placement) -> int:
    """Return the bytes that a tensor takes in a buffer: whole pages, the bytes around it included.

    Where it is large, as many wherever it begins in a page, so that tensors of one size fit in each other's places.
    """
    is_large = placement.num_bytes >= LARGE_BYTES
    return page_up(placement.num_bytes + (PAGE - 1 if is_large else _lead(placement)))


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
class ReadStats:
    """What reading cost so far.

    Attributes:
        read_bytes: bytes read from files.
        wait_seconds: time that visitors waited for a stop.
    """

    read_bytes: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class _Request:
    """One read: the bytes from `begin` to `end` of a span's file, to `region[at:]`; by a bounce buffer or not.

    Of these, `needed` must arrive; the last page of a file may be short.
    """

    slot: _LoadedStop
    span: Span
    begin: int
    end: int
    region: np.ndarray
    at: int
    needed: int
    bounce: bool


@dataclass
class _LoadedStop:
    """A stop in memory, or on its way there."""

    stop: int
    resident: bool
    unplaced: deque[Placement]
    requests: deque[_Request] = field(default_factory=deque)
    weights: dict[str, Tensor] = field(default_factory=dict)
    regions: list[np.ndarray] = field(default_factory=list)
    num_in_flight: int = 0
    held: bool = False
    error: BaseException | None = None

    @property
    def ready(self) -> bool:
        return not (self.unplaced or self.requests or self.num_in_flight)


class _Ring:
    """Allocate extents of one buffer in a circle, first in, first out."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = Buffer(num_bytes)
        self.num_bytes = num_bytes
        self.extents: deque[tuple[int, int, _LoadedStop]] = deque()

    def allocate(self, num_bytes: int, slot: _LoadedStop) -> np.ndarray | None:
        if not num_bytes:  # an extent of no bytes would look like a full circle
            return self.buffer.bytes[:0]
        start = self._fit(num_bytes)
        if start is None:
            return None
        self.extents.append((start, num_bytes, slot))
        return self.buffer.bytes[start : start + num_bytes]

    def _fit(self, num_bytes: int) -> int | None:
        if not self.extents:
            return 0 if num_bytes <= self.num_bytes else None
        oldest, (newest, length, _) = self.extents[0][0], self.extents[-1]
        head = newest + length
        if head <= oldest:  # the circle has wrapped; free is what lies between
            return head if head + num_bytes <= oldest else None
        if head + num_bytes <= self.num_bytes:
            return head
        return 0 if num_bytes <= oldest else None


class Reader:
    """Read stops ahead of a visitor, into a ring and into kept buffers.

    One visitor at a time. Owns its threads, files and buffers.

    Args:
        stops: the tensors of each stop.
        ring_bytes: size of the ring, at least `smallest_ring` of the stops that stream.
        resident: stops that stay in memory once read.
        num_threads: reads in flight.
        request_bytes: size of one read.
        poison: fill every streamed tensor with NaN when its stop is given back, to show whoever still uses it.
    """

    def __init__(
        self,
        stops: Sequence[Sequence[Placement]],
        *,
        ring_bytes: int,
        resident: frozenset[int] = frozenset(),
        # 256 KiB to 1 MiB at 8 to 16 in flight read fastest on the reference NVMe; see benchmarks/LOG.md.
        num_threads: int = 8,
        request_bytes: int = 1 << 20,
        poison: bool = False,
    ) -> None:
        streamed = [stop for index, stop in enumerate(stops) if index not in resident]
        assert ring_bytes >= smallest_ring(streamed), "the ring cannot hold the largest stop"
        self.stats = ReadStats()
        self.num_stops = len(stops)
        self._stops = [in_file_order(stop) for stop in stops]
        self._resident = resident
        self._request_bytes = page_up(request_bytes)
        self._poison = poison
        self._stop_bytes = [sum(map(ring_bytes_of, stop)) for stop in stops]
        self._ring = _Ring(ring_bytes)
        kept_bytes = [self._stop_bytes[index] for index in sorted(resident)]
        self._homes = dict(zip(sorted(resident), itertools.accumulate(kept_bytes, initial=0), strict=False))
        self._kept = Buffer(sum(kept_bytes))
        self._slots: dict[int, _LoadedStop] = {}
        self._wanted: list[int] = []
        self._upcoming: list[int] = []
        self._started_over: set[int] = set()
        self._files = Files()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._process = os.getpid()
        self._num_working = num_threads
        self._threads = [
            threading.Thread(target=self._work, name=f"slowllm-read-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def buffers(self) -> list[np.ndarray]:
        """The memory that stops are handed out in, each piece of whole pages."""
        return [self._ring.buffer.bytes, self._kept.bytes]

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a stop in memory, and read those that come next meanwhile.

        Args:
            stop: to be held.
            upcoming: the stops expected next, in order; a wrong guess costs a read, never a wrong answer.
        Yields:
            the stop's tensors by name, as stored; valid inside the context.
        Raises:
            CheckpointError: a file is shorter than its header said, or is not the one whose header was read.
            OSError: the disk failed.
            RideError: the reader was closed.
        """
        assert all(0 <= index < self.num_stops for index in (stop, *upcoming)), "there is no such stop"
        started = time.perf_counter()
        with self._changed:
            self._upcoming = list(dict.fromkeys(upcoming))
            self._wanted = list(dict.fromkeys((stop, *upcoming)))
            for slot in list(self._slots.values()):
                # What half a resident stop has is kept until it comes.
                if slot.stop not in self._wanted and (slot.error or not (slot.ready or slot.resident)):
                    self._forget(slot)
            # What failed ahead of need may be there by now: it is read once more for whoever comes for it.
            if (ahead := self._slots.get(stop)) is not None and ahead.error is not None:
                self._forget(ahead)
            self._changed.notify_all()
            while True:
                if self._closing:
                    raise RideError("the model was closed")
                if self._failure is not None:
                    raise self._failure
                found = self._slots.get(stop)
                if found is not None and (found.ready or found.error):
                    break
                self._changed.wait()
            slot = found
            if slot.error is not None:
                self._forget(slot)
                self._wanted = []  # else it would be read again at once, and fail again before anybody came
                raise slot.error
            slot.held = True
            self.stats.wait_seconds += time.perf_counter() - started
        try:
            yield slot.weights
        finally:
            with self._changed:
                slot.held = False
                # Served: from here on it is wanted only if it comes up again.
                self._wanted = list(dict.fromkeys(upcoming))
                if self._poison and not slot.resident:
                    for region in slot.regions:
                        region.fill(0xFF)  # NaN in every floating-point dtype
                    self._forget(slot)
                self._changed.notify_all()

    def close(self) -> None:
        """End the threads and close the files. Weights handed out stay readable.

        A read that does not return is left to its thread after a while, and with it the files and its buffer, which
        may be written to at any time.
        """
        # A forked child has no threads to end, and whoever held the lock is not there to give it back.
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        # A forgotten reader may be collected, and closed, on one of its own threads.
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        deadline = time.monotonic() + CLOSE_PATIENCE_SECONDS
        for thread in others:
            thread.join(max(deadline - time.monotonic(), 0))
        num_left = sum(thread.is_alive() for thread in others)
        if num_left:
            log.warning(
                "closing without %d read(s) that have not returned after %g s; what they write to stays in memory",
                num_left, CLOSE_PATIENCE_SECONDS,
            )  # fmt: skip
            return
        self._slots.clear()
        self._ring.extents.clear()
        self._ring.buffer.release()
        self._kept.release()

    # What follows runs with the lock held, down to `_work`.

    def _forget(self, slot: _LoadedStop) -> None:
        """Give a stop up. Its extents leave the ring when they are the oldest and no read is under way."""
        slot.unplaced.clear()
        slot.requests.clear()
        if self._slots.get(slot.stop) is slot:
            del self._slots[slot.stop]

    def _next_request(self) -> _Request | None:
        for stop in self._wanted:
            slot = self._slots.get(stop)
            if slot is None:
                slot = _LoadedStop(stop, stop in self._resident, deque(self._stops[stop]))
                self._slots[stop] = slot
                if slot.ready:  # a stop without weights of its own
                    self._changed.notify_all()
            if slot.error is not None:
                return None
            while slot.unplaced and not slot.requests:
                if not self._place(slot):
                    # Given up to start over, or waiting for room.
                    return None if self._slots.get(stop) is slot else self._next_request()
            if slot.requests:
                slot.num_in_flight += 1
                return slot.requests.popleft()
        return None

    def _place(self, slot: _LoadedStop) -> bool:
        """Give the slot's next tensor a place in memory; return False where there is none yet."""
        placement = slot.unplaced[0]
        num_bytes = ring_bytes_of(placement)
        if slot.resident:
            start = self._homes[slot.stop] + sum(len(region) for region in slot.regions)
            region = self._kept.bytes[start : start + num_bytes]
        else:
            while (found := self._ring.allocate(num_bytes, slot)) is None:
                # Behind a stop that is still wanted, as where the carousel turns, others may be done with.
                if not self._is_done_with(self._ring.extents[0][2]):
                    if self._trim():
                        continue
                    found = self._reuse(num_bytes, slot)
                    if found is not None:
                        break
                if not self._drop_oldest(slot):
                    return False
            region = found
        slot.unplaced.popleft()
        if not slot.unplaced:
            self._started_over.discard(slot.stop)
        lead = _lead(placement)
        flat = torch.from_numpy(region)[lead : lead + placement.num_bytes]
        slot.weights[placement.name] = flat.view(placement.stored_dtype).view(placement.stored_shape)
        slot.regions.append(region)
        slot.requests.extend(self._requests(slot, placement, region, lead))
        if slot.ready:
            self._changed.notify_all()
        return True

    def _trim(self) -> bool:
        """Take what is done with from the circle's newest end, as the head's chunks are when a sweep has turned."""
        extents, has_trimmed = self._ring.extents, False
        while len(extents) > 1 and self._is_done_with(extents[-1][2]):
            self._forget(extents.pop()[2])
            has_trimmed = True
        return has_trimmed

    def _reuse(self, num_bytes: int, newcomer: _LoadedStop) -> np.ndarray | None:
        """Give the newcomer the place of a tensor that nobody waits for any more, in the middle of the circle.

        Only where it fits well: what is left over of the place is lost until the circle comes round.
        """
        if newcomer.stop in self._started_over:
            return None
        for index, (start, length, slot) in enumerate(self._ring.extents):
            if not num_bytes <= length <= num_bytes * 9 // 8 or slot is newcomer:
                continue
            if not self._is_done_with(slot):
                continue
            self._forget(slot)
            self._ring.extents[index] = (start, length, newcomer)
            return self._ring.buffer.bytes[start : start + num_bytes]
        return None

    def _is_done_with(self, slot: _LoadedStop) -> bool:
        is_known = self._slots.get(slot.stop) is slot
        return not (slot.held or slot.num_in_flight or (is_known and slot.stop in self._wanted))

    def _drop_oldest(self, newcomer: _LoadedStop) -> bool:
        oldest = self._ring.extents[0][2]
        if oldest is newcomer:
            # Its places in the middle of the circle may be what it is hemmed in by, so it takes none again.
            self._started_over.add(newcomer.stop)
            # Half of it was read ahead, then another stop was wanted sooner and lies behind it. The circle can
            # only be freed from its oldest end, so the newcomer starts over behind the other.
            if any(
                self._is_needed(slot, newcomer) for _, _, slot in self._ring.extents if slot is not newcomer
            ):
                return False
        elif self._is_needed(oldest, newcomer):
            return False
        self._forget(oldest)
        if oldest.num_in_flight:
            return False
        while self._ring.extents and self._ring.extents[0][2] is oldest:
            self._ring.extents.popleft()
        return oldest is not newcomer

    def _is_needed(self, slot: _LoadedStop, newcomer: _LoadedStop) -> bool:
        """Whether a slot must stay because it is held, or wanted sooner than the newcomer, or soon after it."""
        if slot.held:
            return True
        if self._slots.get(slot.stop) is not slot or slot.stop not in self._wanted:
            return False
        place, own = self._wanted.index(slot.stop), self._wanted.index(newcomer.stop)
        if place < own:
            return True
        # Where a sweep turns, the stop at the turn is wanted again behind a few others. To read it twice takes longer
        # than to let the newcomer, whom nobody waits for yet, begin when the stop that is held has been passed.
        return own > 0 and slot.ready and self._can_stay(slot, newcomer)

    def _can_stay(self, slot: _LoadedStop, newcomer: _LoadedStop) -> bool:
        """Whether a slot fits beside the newcomer, and what is to be read before it is wanted fits in the ring."""
        later = self._upcoming
        if slot.stop not in later or newcomer.stop not in later:
            return False
        before = later[: later.index(slot.stop)]
        between = before[before.index(newcomer.stop) + 1 :] if newcomer.stop in before else []
        beside = [slot.stop, newcomer.stop, *(stop for stop in between if self._is_there(stop))]
        missing = [stop for stop in before if not self._is_there(stop)]
        return max(self._bytes_of(beside), self._bytes_of(missing)) <= self._ring.num_bytes

    def _bytes_of(self, stops: Sequence[int]) -> int:
        return sum(self._stop_bytes[stop] for stop in stops if stop not in self._resident)

    def _is_there(self, stop: int) -> bool:
        return stop in self._slots and self._slots[stop].ready

    def _requests(
        self, slot: _LoadedStop, placement: Placement, region: np.ndarray, lead: int
    ) -> Iterator[_Request]:
        for number, run in enumerate(placement.runs):
            begin = run.span.offset + run.source
            end, shift = begin + run.num_bytes, lead + run.target - begin
            first, last = number == 0, number == len(placement.runs) - 1
            if shift % PAGE:
                yield from self._cut(slot, run, region, shift, begin, end, bounce=True)
                continue
            # Pages at the edges also hold the bytes of other tensors. They may be written around the first and
            # the last byte of this one, which has whole pages to itself, but not over its neighbouring runs.
            low = begin // PAGE * PAGE if first else page_up(begin)
            high = page_up(end) if last else end // PAGE * PAGE
            if low >= high:
                yield from self._cut(slot, run, region, shift, begin, end, bounce=True)
                continue
            if low > begin:
                yield from self._cut(slot, run, region, shift, begin, low, bounce=True)
            yield from self._cut(slot, run, region, shift, low, high, bounce=False)
            if high < end:
                yield from self._cut(slot, run, region, shift, high, end, bounce=True)

    def _cut(
        self,
        slot: _LoadedStop,
        run: Run,
        region: np.ndarray,
        shift: int,
        begin: int,
        end: int,
        *,
        bounce: bool,
    ) -> Iterator[_Request]:
        run_begin = run.span.offset + run.source
        for low in range(begin, end, self._request_bytes):
            high = min(low + self._request_bytes, end)
            needed = min(high, run_begin + run.num_bytes) - low
            at = shift + low
            yield _Request(slot, run.span, low, high, region, at, needed, bounce)

    def _work(self) -> None:
        try:
            # A request that begins inside a page and ends inside another touches a page more at either end.
            bounce = Buffer(self._request_bytes + 2 * PAGE).bytes
            while (request := self._wait_for_request()) is not None:
                error: BaseException | None = None
                try:
                    self._read(request, bounce)
                except BaseException as caught:  # handed to whoever visits this stop
                    error = caught
                self._finish(request, error)
        except BaseException as caught:  # no memory for a buffer, say: handed to every visitor
            with self._changed:
                self._failure = caught
                self._changed.notify_all()
        finally:
            with self._changed:
                self._num_working -= 1
                is_last = not self._num_working
            if is_last:  # not whoever closes, for whom a read may take too long
                self._files.close()

    def _wait_for_request(self) -> _Request | None:
        with self._changed:
            while not self._closing:
                request = self._next_request()
                if request is not None:
                    return request
                self._changed.wait()
        return None

    def _finish(self, request: _Request, error: BaseException | None) -> None:
        with self._changed:
            slot = request.slot
            slot.num_in_flight -= 1
            if error is None:
                self.stats.read_bytes += request.needed
            else:
                slot.unplaced.clear()
                slot.requests.clear()
                slot.error = error
            if not slot.num_in_flight:  # the stop may be ready, or its extents may be free
                self._changed.notify_all()

    def _read(self, request: _Request, bounce: np.ndarray) -> None:
        length = request.end - request.begin
        target = request.region[request.at : request.at + length]
        if not request.bounce:
            self._files.read(request.span, request.begin, target, request.needed)
            return
        skip = request.begin % PAGE
        view = bounce[: page_up(skip + length)]
        self._files.read(request.span, request.begin - skip, view, skip + length)
        np.copyto(target, view[skip : skip + length])
