"""What stays on devices, what stays in RAM, and what streams."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slowllm.errors import PlanError
from slowllm.options import GIB, MIB, parse_bytes
from slowllm.planning import device_plan
from slowllm.planning.device_plan import (
    DEVICE_SLACK_BYTES,
    DeviceBudget,
    DevicePlan,
    device_rates,
    homes_of,
    least_host_bytes,
    plan_both,
    plan_devices,
    plan_host,
)
from slowllm.planning.forecast import sweep_costs
from slowllm.planning.host_plan import working_bytes
from slowllm.planning.job import ExpertSizes, Job, Rates, Sizes, StopSize
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


# Nine blocks, eight of which have 128 experts, and the head.
EXPERTS = ExpertSizes(frozenset(range(1, 9)), 128, 4, 13 * MIB, 9 * MIB, 50e6, router_bytes=MIB)
WITHOUT = Sizes(
    "experts", tuple(StopSize(60 * MIB, 20 * MIB, 1e8) for _ in range(10)), 40 * MIB, 5000, 0, 2000,
    num_head_stops=1, num_blocks=9, experts=EXPERTS,
)  # fmt: skip
WHOLE = replace(
    WITHOUT, granularity="blocks", experts=None,
    stops=tuple(
        replace(stop, num_bytes=stop.num_bytes + 128 * EXPERTS.unit_bytes, flops=stop.flops + 4 * EXPERTS.unit_flops)
        if number in EXPERTS.stops
        else stop
        for number, stop in enumerate(WITHOUT.stops)
    ),
)  # fmt: skip
BLOCKS = [*range(9), -1]
TOKEN = Job(num_tokens=1, longest=1, repeated=True, forward_only=True)


def cut(
    vram: list[int],
    ram: int = 16 * GIB,
    job: Job | None = TOKEN,
    choices: tuple[Sizes, ...] = (WHOLE, WITHOUT),
) -> tuple[DevicePlan, Plan]:
    budgets = [DeviceBudget(f"cuda:{number}", size) for number, size in enumerate(vram)]
    return plan_both(
        choices, [BLOCKS] * len(choices), budgets, free_bytes=ram, total_bytes=ram, job=job, rates=RATES
    )


@num_examples(100)
@given(
    vram=st.lists(st.integers(900, 6000).map(lambda n: n * MIB), min_size=1, max_size=3),
    ram=st.integers(1200, 9000).map(lambda n: n * MIB),
    job=st.sampled_from([TOKEN, JOB, None]),
)
def test_experts_take_two_slots_of_their_device_and_ring_and_room_of_ram(
    vram: list[int], ram: int, job: Job | None
) -> None:
    try:
        devices, host = cut(vram, ram, job, (WITHOUT,))
    except PlanError:
        assume(False)
    for number, budget in enumerate(vram):
        kept = sum(WITHOUT.stops[s].num_bytes for s in devices.kept if devices.homes[s] == number)
        slots = devices.num_slots[number] * devices.slot_bytes[number]
        working = working_bytes(
            WITHOUT, job or Job(repeated=True), devices.rider_tokens, devices.sweep_tokens
        )
        taken = DEVICE_SLACK_BYTES + WITHOUT.kept_bytes + working + kept + slots + 2 * EXPERTS.unit_bytes
        assert devices.num_expert_slots[number] == 2
        assert taken == devices.used_bytes[number] <= budget
    kept_bytes = host.kept_units * EXPERTS.unit_bytes
    in_ram = sum(WITHOUT.stops[stop].num_bytes for stop in host.resident)
    assert host.expert_ring_bytes >= EXPERTS.smallest_ring_bytes
    assert host.resident_bytes == in_ram + kept_bytes
    assert host.ring_bytes + host.expert_ring_bytes + host.resident_bytes <= host.peak_bytes <= ram
    assert not host.router_bytes, "no router is asked ahead: hidden states are on the devices"


def test_a_device_whose_blocks_have_no_experts_has_no_slots_for_them() -> None:
    sparse = replace(WITHOUT, experts=replace(EXPERTS, stops=frozenset({1, 3, 5, 7})))
    devices, _ = cut([4 * GIB, 4 * GIB], choices=(sparse,))
    assert devices.num_expert_slots == (0, 2)
    devices, _ = cut([4 * GIB, 4 * GIB], choices=(WHOLE,))
    assert devices.num_expert_slots == (0, 0)


def test_blocks_or_experts_are_chosen_by_the_forecast() -> None:
    # Blocks, 1.7 GiB each, fit; to copy all experts takes longer than to copy those that are needed.
    assert cut([8 * GIB])[0].granularity == "experts"
    # Where all weights stay on the device there is nothing to gain.
    devices, host = cut([24 * GIB])
    assert (devices.granularity, devices.num_slots, host.granularity) == ("blocks", (0,), "blocks")
    # A sweep of thousands of tokens needs all of them.
    many = Job(num_tokens=16384, longest=128, forward_only=True, keeps_results=False)
    assert cut([8 * GIB], job=many)[0].granularity == "blocks"
    # Where whole blocks do not fit.
    assert cut([2 * GIB], job=many)[0].granularity == "experts"
    assert cut([8 * GIB], ram=2 * GIB, job=many)[0].granularity == "experts"
    # What comes down again may be read on demand only where blocks do not fit.
    turning = Job(num_tokens=64, longest=64, repeated=True, turns=True)
    assert cut([8 * GIB], job=turning)[0].granularity == "blocks"
    assert cut([2 * GIB], job=turning)[0].granularity == "experts"


def test_the_smallest_budgets_that_would_do_are_those_of_experts() -> None:
    for vram, ram, number in (([GIB, 512 * MIB], 16 * GIB, 1), ([8 * GIB], 700 * MIB, None)):
        with pytest.raises(PlanError, match="the smallest that would do is") as refused:
            cut(vram, ram)
        smallest = parse_bytes(re.findall(r"that would do is ([\d.]+\w+)", str(refused.value))[0])
        for size in (smallest, smallest - 32 * MIB):
            budgets = [size if place == number else other for place, other in enumerate(vram)]
            if size == smallest:
                assert cut(budgets, ram if number is not None else size)[0].granularity == "experts"
            else:
                with pytest.raises(PlanError):
                    cut(budgets, ram if number is not None else size)
    assert least_host_bytes(WITHOUT, 1) < least_host_bytes(WHOLE, 1)


def test_a_device_waits_for_what_is_copied_to_it() -> None:
    devices, host = cut([24 * GIB], ram=64 * GIB, choices=(WITHOUT,))
    assert len(devices.kept) == len(WITHOUT.stops)
    assert host.kept_units == EXPERTS.num_units
    _, later, _ = sweep_costs(
        WITHOUT, host.resident | devices.kept, host.ring_bytes, host.kept_units, 64, RATES, devices.kept
    )
    copied = 8 * 4 * EXPERTS.unit_bytes / RATES.copy
    assert later.read_bytes == 0
    assert copied <= later.seconds <= 1.2 * copied
    assert copied <= host.forecast.later_seconds <= 1.2 * copied
    assert cut([8 * GIB], ram=64 * GIB, choices=(WHOLE,))[1].forecast.later_seconds > 5 * copied
