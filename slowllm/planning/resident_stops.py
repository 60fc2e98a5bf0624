"""Which stops stay in memory, so that a sweep need not read them again. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slowllm.planning.forecast import reads_of
from slowllm.planning.job import Job, Sizes


def choose_resident(sizes: Sizes, job: Job, room_bytes: int) -> frozenset[int]:
    """Choose the stops that stay among those that a sweep visits; those that it would read twice first."""
    reads = reads_of(sizes, job)
    chosen: frozenset[int] = frozenset()
    for count in sorted(set(reads) - {0}, reverse=True):
        num_bytes = [s.num_bytes if reads[n] == count else 0 for n, s in enumerate(sizes.stops)]
        kept_bytes = sum(sizes.stops[stop].num_bytes for stop in chosen)
        chosen |= {stop for stop in spread(num_bytes, room_bytes - kept_bytes) if num_bytes[stop]}
    return chosen


def spread(stop_bytes: Sequence[int], room_bytes: int) -> frozenset[int]:
    """Choose as many stops as fit in `room_bytes`, at even distances.

    The set is fixed, because an LRU would evict each stop just before it is needed again; and spread evenly, so that
    the reader gets ahead of the computation at every one of them.
    """
    total = sum(stop_bytes)
    if total <= room_bytes:
        return frozenset(range(len(stop_bytes)))
    # Spread twice, or what is left over at the end would crowd the stops at the beginning.
    chosen = set(_even(stop_bytes, sum(stop_bytes[stop] for stop in _even(stop_bytes, room_bytes))))
    kept_bytes = sum(stop_bytes[stop] for stop in chosen)
    # Stops differ in size, and what is left may hold another.
    for stop in sorted(range(len(stop_bytes)), key=lambda stop: -stop_bytes[stop]):
        if stop not in chosen and 0 < stop_bytes[stop] <= room_bytes - kept_bytes:
            chosen.add(stop)
            kept_bytes += stop_bytes[stop]
    return frozenset(chosen)


def _even(stop_bytes: Sequence[int], room_bytes: int) -> Iterator[int]:
    """Yield stops of at most `room_bytes`: each adds its share of the room, and stays if enough has accumulated."""
    total, share = sum(stop_bytes), 0
    for stop, num_bytes in enumerate(stop_bytes):
        share += num_bytes * max(room_bytes, 0)
        if 0 < num_bytes * total <= share:
            share -= num_bytes * total
            yield stop
