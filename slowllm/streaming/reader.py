"""Fill buffers with the bytes of a stop, ahead of need, in any order.

Knows files and memory; knows nothing about models or compute dtypes. A stop handed out stays valid until it is given
back. Buffers are allocated once: a ring for the stops that stream, and one kept buffer for each
tensor of a resident stop. Reads bypass the page cache (O_DIRECT) where the file system allows, else they are buffered and
the pages are dropped behind them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slowllm.storage.spans import Placement
from slowllm.streaming.buffers import PAGE, Buffer, page_up
from slowllm.streaming.direct_io import Files
from slowllm.streaming.prefetch import PrefetchedStops
from slowllm.streaming.read_requests import ReadRequest, in_file_order, lead_of, requests_of, ring_bytes_of
from slowllm.streaming.ring import LoadedStop, Ring, smallest_ring
from slowllm.streaming.stops import StopRead, Weights

log = logging.getLogger(__name__)

# How long closing waits for the reads under way, all together. From a network disk that is gone none returns.
CLOSE_PATIENCE_SECONDS = 5.0


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
class _Read:
    """A read under way, into the region of a tensor of a stop."""

    slot: LoadedStop
    region: np.ndarray
    request: ReadRequest


class Reader(PrefetchedStops[LoadedStop, _Read]):
    """Read stops ahead of a visitor, into a ring and into kept buffers.

    One visitor at a time. Owns its threads, files and buffers.

    Args:
        stops: the tensors of each stop.
        ring_bytes: size of the ring, at least `smallest_ring` of the stops that stream.
        resident: stops that stay in memory once read.
        num_threads: reads in flight.
        request_bytes: size of one read.
        poison: fill every streamed tensor with NaN when its stop is given back, to show whoever still uses it.
    Attributes:
        stats: what reading cost so far.
        on_read: called with each stop that has been read whole, on the thread that read the last of it; must not raise.
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
        super().__init__(len(stops), [f"slowllm-read-{number}" for number in range(num_threads)])
        self.stats = ReadStats()
        self.on_read: Callable[[StopRead], None] | None = None
        self._stops = [in_file_order(stop) for stop in stops]
        self._resident = resident
        self._request_bytes = page_up(request_bytes)
        self._poison = poison
        self._stop_bytes = [sum(map(ring_bytes_of, stop)) for stop in stops]
        self._ring = Ring(ring_bytes, self._stop_bytes, resident)
        kept_bytes = [self._stop_bytes[index] for index in sorted(resident)]
        self._homes = dict(zip(sorted(resident), itertools.accumulate(kept_bytes, initial=0), strict=False))
        self._kept = Buffer(sum(kept_bytes))
        self._files = Files()
        self._num_working = num_threads
        self._start_threads()

    @property
    def buffers(self) -> list[np.ndarray]:
        """The memory that stops are handed out in, each piece of whole pages."""
        return [self._ring.buffer.bytes, self._kept.bytes]

    @property
    def dropped_bytes(self) -> int:
        """Bytes read of stops that were given up before anybody held them; those that are still in the ring do not count yet."""
        return self._ring.dropped_bytes

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
            self._ring.upcoming = list(dict.fromkeys(upcoming))
            awaited = {stop, *upcoming}
            for loaded in list(self._ring.streamed.values()):
                # The part of a streamed stop that was read in vain is given up; a resident stop keeps its part.
                if loaded.stop not in awaited and not loaded.ready:
                    self._ring.evict(loaded)
            slot = self._wait_for(stop, upcoming)
            slot.held = slot.was_held = True
            self.stats.wait_seconds += time.perf_counter() - started
        try:
            yield slot.weights
        finally:
            with self._changed:
                slot.held = False
                if self._poison and not slot.resident:
                    for region in slot.regions:
                        region.fill(0xFF)  # NaN in every floating-point dtype
                    self._ring.evict(slot)
                self._want(upcoming)  # the stop that was held only if it comes up again

    def prefetch(self, stops: Sequence[int]) -> None:
        """Have stops read ahead of the next visit, instead of those that were expected before."""
        with self._changed:
            self._ring.upcoming = list(dict.fromkeys(stops))
            self._want(stops)

    def close(self) -> None:
        """End the threads and close the files. Weights handed out stay readable.

        A read that does not return is left to its thread after a while, and with it the files and its buffer, which
        may be written to at any time.
        """
        if self._is_forked():
            return
        num_left = self._end_threads(CLOSE_PATIENCE_SECONDS)
        if num_left:
            log.warning(
                "closing without %d read(s) that have not returned after %g s; what they write to stays in memory",
                num_left, CLOSE_PATIENCE_SECONDS,
            )  # fmt: skip
            return
        self._ring.release()
        self._kept.release()

    # Called with the lock held, down to `_work`.

    def _want(self, stops: Sequence[int]) -> None:
        super()._want(stops)
        self._ring.wanted = self._wanted

    def _find(self, stop: int) -> LoadedStop | None:
        slot = self._ring.loaded.get(stop)
        return slot if slot is not None and slot.ready else None

    def _next_work(self) -> _Read | None:
        for stop in self._wanted:
            if stop in self._errors:
                return None
            slot = self._ring.loaded.get(stop)
            if slot is None:
                slot = LoadedStop(stop, stop in self._resident, deque(self._stops[stop]))
                self._ring.add(slot)
                if slot.ready:  # a stop without weights of its own
                    self._changed.notify_all()
            while slot.unplaced and not slot.requests:
                if not self._place(slot):
                    # Given up to start over, or waiting for room.
                    return None if self._ring.loaded.get(stop) is slot else self._next_work()
            if slot.requests:
                slot.num_in_flight += 1
                if slot.began_at is None:
                    slot.began_at = time.perf_counter()
                return _Read(slot, *slot.requests.popleft())
        return None

    def _place(self, slot: LoadedStop) -> bool:
        """Give the slot's next tensor a place in memory; return False where there is none yet."""
        placement = slot.unplaced[0]
        num_bytes = ring_bytes_of(placement)
        if slot.resident:
            start = self._homes[slot.stop] + sum(len(region) for region in slot.regions)
            region = self._kept.bytes[start : start + num_bytes]
        else:
            found = self._ring.place(num_bytes, slot)
            if found is None:
                return False
            region = found
        slot.unplaced.popleft()
        if not slot.unplaced:
            self._ring.finish(slot)
        lead = lead_of(placement)
        flat = torch.from_numpy(region)[lead : lead + placement.num_bytes]
        slot.weights[placement.name] = flat.view(placement.stored_dtype).view(placement.stored_shape)
        slot.regions.append(region)
        slot.requests.extend((region, request) for request in requests_of(placement, self._request_bytes))
        if slot.ready:
            self._changed.notify_all()
        return True

    def _work(self) -> None:
        try:
            # A request that begins inside a page and ends inside another touches a page more at either end.
            bounce = Buffer(self._request_bytes + 2 * PAGE).bytes
            while (read := self._wait_for_work()) is not None:
                error: BaseException | None = None
                try:
                    self._fill(read.region, read.request, bounce)
                except BaseException as caught:  # handed to whoever visits this stop
                    error = caught
                self._finish(read, error)
                del read, error
        finally:
            with self._changed:
                self._num_working -= 1
                is_last = not self._num_working
            if is_last:  # not whoever closes, for whom a read may take too long
                self._files.close()

    def _finish(self, read: _Read, error: BaseException | None) -> None:
        done: StopRead | None = None
        with self._changed:
            slot = read.slot
            slot.num_in_flight -= 1
            if error is None:
                self.stats.read_bytes += read.request.needed
                slot.read_bytes += read.request.needed
                # A stop that was given up meanwhile is not there.
                is_there = self._ring.loaded.get(slot.stop) is slot
                if not is_there:
                    self._ring.dropped_bytes += read.request.needed
                if slot.ready and is_there and slot.began_at is not None:
                    done = StopRead(slot.stop, slot.began_at, time.perf_counter(), slot.read_bytes)
            elif self._ring.loaded.get(slot.stop) is slot:
                self._ring.evict(slot)
                self._errors[slot.stop] = error
                self._changed.notify_all()
            if not slot.num_in_flight:  # the stop may be ready, or its extents may be free
                self._changed.notify_all()
        if done is not None and self.on_read is not None:
            self.on_read(done)

    def _fill(self, region: np.ndarray, request: ReadRequest, bounce: np.ndarray) -> None:
        length = request.end - request.begin
        target = region[request.at : request.at + length]
        if not request.bounce:
            self._files.read(request.span, request.begin, target, request.needed)
            return
        skip = request.begin % PAGE
        view = bounce[: page_up(skip + length)]
        self._files.read(request.span, request.begin - skip, view, skip + length)
        np.copyto(target, view[skip : skip + length])
