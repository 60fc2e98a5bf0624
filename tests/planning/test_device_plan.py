"""What stays on devices, what stays in RAM, and what streams."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slowllm.errors import PlanError
from slowllm.options import GIB, MIB
from slowllm.planning import device_plan
from slowllm.planning.device_plan import (
    DEVICE_SLACK_BYTES,
    DeviceBudget,
    DevicePlan,
    device_rates,
    homes_of,
    plan_devices,
    plan_host,
)
from slowllm.planning.host_plan import working_bytes
from slowllm.planning.job import Job, Rates, Sizes, StopSize
from slowllm.planning.plan import Plan
from tests.support.properties import num_examples

RATES = device_rates(Rates())
JOB = Job(num_tokens=4096, longest=128, forward_only=True, keeps_results=False, repeated=True)


def sizes_of(stops: list[int], head: int = 0) -> Sizes:
    found = tuple(StopSize(size, -(-size // 3), 2.0 * size) for size in [*stops, *([head] if head else [])])
    return Sizes("blocks", found, 3 * MIB, 5000, 10, 2000, 3000, 1000, 8000, 10, 1 if head else 0)


def planned(
    sizes: Sizes, vram: list[int], ram: int = 64 * GIB, job: Job | None = JOB, keep: bool = True
) -> tuple[DevicePlan, Plan]:
    blocks = [*range(len(sizes.stops) - sizes.num_head_stops), *[-1] * sizes.num_head_stops]
    budgets = [DeviceBudget(f"cuda:{n}", size) for n, size in enumerate(vram)]
    (devices,) = plan_devices([sizes], [blocks], budgets, job=job, rates=RATES, keep_resident=keep)
    host = plan_host(
        sizes, devices, free_bytes=ram, total_bytes=ram, job=job, rates=RATES, keep_resident=keep
    )
    return devices, host


many_stops = st.lists(st.integers(1, 500), min_size=1, max_size=24).map(lambda s: [n * MIB for n in s])


@num_examples(200)
@given(
    stops=many_stops,
    head=st.integers(0, 500).map(lambda n: n * MIB),
    vram=st.lists(st.integers(1700, 12_000).map(lambda n: n * MIB), min_size=1, max_size=3),
    ram=st.integers(2000, 20_000).map(lambda n: n * MIB),
    keep=st.booleans(),
    session=st.booleans(),
)
def test_every_stop_has_a_place_and_no_budget_is_passed(
    stops: list[int], head: int, vram: list[int], ram: int, keep: bool, session: bool
) -> None:
    sizes, job = sizes_of(stops, head), None if session else JOB
    try:
        devices, host = planned(sizes, vram, ram, job, keep)
    except PlanError:
        assume(False)
    assert devices.homes == homes_of([*range(len(stops)), *([-1] if head else [])], len(vram))
    for number, budget in enumerate(vram):
        own = [stop for stop, home in enumerate(devices.homes) if home == number]
        kept = sum(sizes.stops[stop].num_bytes for stop in own if stop in devices.kept)
        working = working_bytes(sizes, job or Job(repeated=True), devices.rider_tokens, devices.sweep_tokens)
        slots = devices.num_slots[number] * devices.slot_bytes[number]
        taken = DEVICE_SLACK_BYTES + sizes.kept_bytes + working + kept + slots
        assert taken == devices.used_bytes[number] <= budget
        streamed = [sizes.stops[stop].num_bytes for stop in own if stop not in devices.kept]
        if streamed:
            assert devices.num_slots[number] in (1, 2)
            assert devices.slot_bytes[number] >= max(streamed)
        else:
            assert not devices.num_slots[number]
    assert not devices.kept & host.resident, "what stays on a device takes no RAM"
    assert host.ring_bytes >= sizes.smallest_ring_bytes, "what is read once passes through the ring as well"
    in_ram = sum(sizes.stops[stop].num_bytes for stop in host.resident)
    assert host.ring_bytes + in_ram <= host.peak_bytes <= ram
    assert (host.rider_tokens, host.sweep_tokens) == (devices.rider_tokens, devices.sweep_tokens)
    if not keep:
        assert not devices.kept
        assert not host.resident


@given(stops=many_stops, vram=st.integers(1700, 12_000).map(lambda n: n * MIB))
@num_examples(100)
def test_more_memory_never_keeps_fewer_bytes(stops: list[int], vram: int) -> None:
    job = replace(JOB, packing=(128, 128, 64))  # or it may go to more tokens instead
    sizes = sizes_of(stops)
    try:
        less, _ = planned(sizes, [vram], job=job)
    except PlanError:
        assume(False)
    more, _ = planned(sizes, [vram + max(stops)], job=job)
    kept = [sum(sizes.stops[stop].num_bytes for stop in plan.kept) for plan in (less, more)]
    assert kept[1] + max(stops) * 2 * (more.num_slots[0] > less.num_slots[0]) >= kept[0]


def test_what_fits_stays_on_the_device_then_in_ram_and_the_rest_streams() -> None:
    sizes = sizes_of([1000 * MIB] * 16)
    everything, host = planned(sizes, [24 * GIB])
    assert (len(everything.kept), everything.num_slots, len(host.resident)) == (16, (0,), 0)
    some, host = planned(sizes, [10 * GIB], ram=8 * GIB)
    assert 4 <= len(some.kept) < 8
    assert some.num_slots == (2,)
    assert 0 < len(host.resident) < 16 - len(some.kept)
    kept = sorted(some.kept)
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 4, "at even distances"


def test_blocks_take_turns_and_the_head_is_where_a_sweep_begins() -> None:
    assert homes_of([0, 1, 2, 3, 4, -1, -1], 2) == (0, 1, 0, 1, 0, 0, 0)
    assert homes_of([0, 0, 1, 1, -1], 2) == (0, 0, 1, 1, 0)


def test_one_slot_does_where_there_is_no_room_for_two() -> None:
    sizes = sizes_of([1000 * MIB] * 4)
    fixed = DEVICE_SLACK_BYTES + sizes.kept_bytes + working_bytes(sizes, JOB, 128, 128)
    devices, _ = planned(sizes, [fixed + 1500 * MIB], job=replace(JOB, packing=(128, 128, 64)))
    assert (devices.num_slots, devices.kept) == ((1,), frozenset())


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_would_do() -> None:
    sizes = sizes_of([1000 * MIB] * 4)
    with pytest.raises(
        PlanError, match=r"1GiB on cuda:1 are too few for this model: the smallest that would do is 1\.7"
    ):
        planned(sizes, [4 * GIB, GIB])
    smallest = "1.74GiB"
    with pytest.raises(PlanError, match=rf"the smallest that would do is {smallest}"):
        planned(sizes, [GIB])
    planned(sizes, [1782 * MIB])
    with pytest.raises(PlanError, match=r"a budget of 2GiB is too small for this model"):
        planned(sizes, [4 * GIB], ram=2 * GIB)


def test_leaves_are_taken_where_blocks_do_not_fit() -> None:
    blocks = sizes_of([1000 * MIB] * 4)
    leaves = replace(sizes_of([100 * MIB] * 40), granularity="leaves")
    numbers = [list(range(4)), [stop // 10 for stop in range(40)]]
    budgets = [DeviceBudget("cuda:0", int(1.5 * GIB))]
    (found,) = plan_devices([blocks, leaves], numbers, budgets, job=JOB, rates=RATES)
    assert found.granularity == "leaves"
    assert device_plan.NUM_SLOTS == found.num_slots[0] == 2
