"""The ring by itself: where tensors go, and what is evicted for them."""

from __future__ import annotations

import itertools
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from slowllm.streaming.buffers import PAGE
from slowllm.streaming.ring import LoadedStop, Ring


def load(ring: Ring, stop: int, sizes: list[int]) -> LoadedStop | None:
    """Place all tensors of a stop as the reader does; None where there is no room for it yet."""
    while True:
        slot = ring.loaded.setdefault(stop, LoadedStop(stop, False, deque()))
        del slot.regions[:]
        for size in sizes:
            region = ring.place(size * PAGE, slot)
            if region is None:
                break
            slot.regions.append(region)
        else:
            ring.finish(slot)
            return slot
        if ring.loaded.get(stop) is slot:
            ring.evict(slot)
            return None


def extents_of(ring: Ring, slot: LoadedStop) -> list[tuple[int, int]]:
    start = ring.buffer.bytes.ctypes.data
    return [(r.ctypes.data - start, r.ctypes.data - start + r.nbytes) for r in slot.regions]


@given(
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=2, max_size=6),
    extra=st.integers(0, 6),
    visits=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_what_is_waited_for_always_finds_room_and_nothing_that_is_held_is_overwritten(
    sizes: list[list[int]], extra: int, visits: list[int]
) -> None:
    stop_bytes = [sum(stop) * PAGE for stop in sizes]
    num_bytes = max(stop_bytes) + max(map(max, sizes)) * PAGE + extra * PAGE
    ring = Ring(num_bytes, stop_bytes, frozenset())
    visits = [stop % len(sizes) for stop in visits]
    for number, stop in enumerate(visits):
        upcoming = list(dict.fromkeys(visits[number + 1 : number + 4]))
        ring.upcoming, ring.wanted = upcoming, list(dict.fromkeys([stop, *upcoming]))
        slot = ring.loaded.get(stop) or load(ring, stop, sizes[stop])
        assert slot is not None, "the smallest ring always has room for the stop that is waited for"
        slot.held = True
        for ahead in upcoming:
            if ahead not in ring.loaded and load(ring, ahead, sizes[ahead]) is None:
                break
        assert ring.loaded.get(stop) is slot, "a held stop is never evicted"
        extents = sorted(e for s in ring.loaded.values() for e in extents_of(ring, s))
        assert all(0 <= start < end <= num_bytes for start, end in extents)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(extents)), "extents do not overlap"
        slot.held = False
    ring.release()


def test_a_stop_that_is_wanted_sooner_is_not_evicted_for_one_that_is_wanted_later() -> None:
    ring = Ring(4 * PAGE, [2 * PAGE] * 3, frozenset())
    ring.wanted = [0, 1, 2]
    assert load(ring, 0, [2]) is not None
    assert load(ring, 1, [2]) is not None
    assert load(ring, 2, [2]) is None
    assert set(ring.loaded) == {0, 1}
    ring.wanted = [1, 2]  # the first has been passed
    assert load(ring, 2, [2]) is not None
    assert set(ring.loaded) == {1, 2}
