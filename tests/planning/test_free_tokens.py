"""How many tokens a sweep computes while its bytes are read."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from slowllm.planning.forecast import compute_seconds, free_tokens
from slowllm.planning.job import Rates, Sizes, StopSize


@given(
    num_stops=st.integers(1, 5), megabytes=st.integers(1, 4000), rider=st.integers(1, 2048),
    disk=st.floats(1e7, 1e10), memory=st.floats(1e9, 1e11), compute=st.floats(1e9, 1e13),
)  # fmt: skip
def test_they_are_as_many_as_fit_into_the_time_of_the_reads(
    num_stops: int, megabytes: int, rider: int, disk: float, memory: float, compute: float
) -> None:
    stop = StopSize(megabytes * 10**6, megabytes * 10**6, flops=megabytes * 1e6)
    sizes = Sizes("blocks", (stop,) * num_stops, 0, 0, 0, 0)
    rates = Rates(disk, memory, compute)
    read_seconds = sizes.all_bytes / disk

    def seconds(num_tokens: int) -> float:
        return math.fsum(
            compute_seconds(one, rates, min(rider, num_tokens), num_tokens) for one in sizes.stops
        )

    free = free_tokens(sizes, rider, read_seconds, rates)
    unit = rider if free >= rider else 1
    assert not free or seconds(free) <= read_seconds
    assert seconds(free + unit) > read_seconds
    assert free_tokens(sizes, rider, 0.0, rates) == 0
