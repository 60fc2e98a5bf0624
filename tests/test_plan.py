"""Plans keep the budget to the byte, and sizes are read as they are written."""

from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slowllm.errors import InputError, PlanError
from slowllm.options import GIB, KIB, MIB, Options, format_binary, format_bytes, parse_bytes, parse_dtype
from slowllm.plan import (
    MAX_RIDER_TOKENS,
    MAX_SWEEP_TOKENS,
    MIN_RIDER_TOKENS,
    SLACK_BYTES,
    Budget,
    Plan,
    Sizes,
    make_plan,
    spread,
)

fuzz = settings(deadline=None, derandomize=True, max_examples=200)

num_bytes = st.integers(0, 6 * GIB) | st.integers(0, 10 * MIB)
budgets = st.integers(0, 100 * GIB) | st.integers(0, 2 * GIB)


@st.composite
def sizes(draw: st.DrawFn, uniform: bool = False) -> Sizes:
    if uniform:
        stop_bytes = [draw(st.integers(1, 6 * GIB) | st.integers(1, 10 * MIB))] * draw(st.integers(1, 130))
    else:
        stop_bytes = draw(st.lists(num_bytes, min_size=1, max_size=30))
    largest = max(stop_bytes)
    return Sizes(
        stop_bytes=tuple(stop_bytes),
        smallest_ring_bytes=largest + draw(st.integers(0, max(largest, 4096))),
        kept_bytes=draw(num_bytes),
        block_token_bytes=draw(st.integers(1, 4 * MIB)),
        rider_token_bytes=draw(st.integers(1, 200 * KIB)),
    )


def least(sizes: Sizes, keep_resident: bool = True) -> int:
    """The smallest budget: what always stays, the way through, and one rider."""
    through = sizes.smallest_ring_bytes
    if keep_resident:
        through = min(through, sum(sizes.stop_bytes))
    one_rider = MIN_RIDER_TOKENS * (sizes.block_token_bytes + sizes.rider_token_bytes)
    return sizes.kept_bytes + SLACK_BYTES + through + one_rider


def plan_of(sizes: Sizes, free_bytes: int, keep_resident: bool = True) -> Plan:
    return make_plan(sizes, free_bytes=free_bytes, total_bytes=free_bytes, keep_resident=keep_resident)


# Plans


@fuzz
@given(sizes=sizes(), more=budgets, keep_resident=st.booleans())
def test_a_plan_keeps_the_budget_and_counts_everything(sizes: Sizes, more: int, keep_resident: bool) -> None:
    free = least(sizes, keep_resident) + more
    plan = plan_of(sizes, free, keep_resident)
    assert plan.peak_bytes <= free
    assert plan.peak_bytes == (
        sizes.kept_bytes
        + SLACK_BYTES
        + plan.ring_bytes
        + sum(sizes.stop_bytes[stop] for stop in plan.resident)
        + plan.rider_tokens * sizes.block_token_bytes
        + plan.sweep_tokens * sizes.rider_token_bytes
    )
    assert MIN_RIDER_TOKENS <= plan.rider_tokens <= MAX_RIDER_TOKENS
    assert plan.rider_tokens <= plan.sweep_tokens <= MAX_SWEEP_TOKENS
    if len(plan.resident) == len(sizes.stop_bytes):
        assert plan.ring_bytes == 0
    else:
        assert plan.ring_bytes == sizes.smallest_ring_bytes
    if not keep_resident:
        assert not plan.resident


@fuzz
@given(sizes=sizes(), taken=num_bytes, keep_resident=st.booleans())
def test_a_budget_is_refused_just_below_the_smallest(sizes: Sizes, taken: int, keep_resident: bool) -> None:
    enough = least(sizes, keep_resident)
    for free, works in ((enough, True), (enough - 1, False), (0, False), (-taken, False)):
        if works:
            make_plan(sizes, free_bytes=free, total_bytes=free + taken, keep_resident=keep_resident)
            continue
        with pytest.raises(PlanError, match="is too small for this model: the smallest that would do is"):
            make_plan(sizes, free_bytes=free, total_bytes=free + taken, keep_resident=keep_resident)


@fuzz
@given(sizes=sizes(), taken=num_bytes, part=st.floats(0, 1), keep_resident=st.booleans())
def test_the_budget_that_a_refusal_names_will_do(
    sizes: Sizes, taken: int, part: float, keep_resident: bool
) -> None:
    free = min(int(least(sizes, keep_resident) * part), least(sizes, keep_resident) - 1)
    with pytest.raises(PlanError) as caught:
        make_plan(sizes, free_bytes=free, total_bytes=free + taken, keep_resident=keep_resident)
    found = re.search(r"the smallest that would do is (\S+) ", str(caught.value))
    assert found is not None
    named = parse_bytes(found[1])
    make_plan(sizes, free_bytes=named - taken, total_bytes=named, keep_resident=keep_resident)
    # And it is not far from the smallest: rounded up to a MiB, then to three figures of GiB.
    assert named - taken - least(sizes, keep_resident) <= MIB + GIB // 100


def test_a_refusal_has_all_numbers() -> None:
    sizes = Sizes((4 * GIB,) * 70, 5 * GIB, GIB, 2 * MIB, 256 * KIB)
    words = (
        r"^a budget of 4GiB is too small for this model: the smallest that would do is 7\.82GiB "
        r"\(512MiB for the process as it is, 1\.19GiB always in memory, 5GiB for the weights passing through "
        r"and 1\.13GiB for 512 tokens\)$"
    )
    with pytest.raises(PlanError, match=words):
        make_plan(sizes, free_bytes=4 * GIB - 512 * MIB, total_bytes=4 * GIB)


@fuzz
@given(sizes=sizes(uniform=True), more=budgets, step=st.integers(0, 20 * GIB))
def test_more_memory_never_keeps_less_and_never_makes_a_sweep_smaller(
    sizes: Sizes, more: int, step: int
) -> None:
    # Tokens come in whole numbers: a step of a few of them evens that out.
    step += 8 * (sizes.block_token_bytes + sizes.rider_token_bytes)
    free = least(sizes) + more
    before, after = plan_of(sizes, free), plan_of(sizes, free + step)
    assert len(after.resident) >= len(before.resident)
    # Where all weights stay, a sweep costs no reading, and its size does not matter any more.
    if bool(before.ring_bytes) == bool(after.ring_bytes):
        assert after.rider_tokens >= before.rider_tokens
        assert after.sweep_tokens >= before.sweep_tokens


@fuzz
@given(sizes=sizes(uniform=True), more=budgets)
def test_no_room_is_left_for_another_stop(sizes: Sizes, more: int) -> None:
    plan = plan_of(sizes, least(sizes) + more)
    assume(plan.ring_bytes)
    assert least(sizes) + more - plan.peak_bytes < sizes.stop_bytes[0]


@fuzz
@given(sizes=sizes(), more=st.integers(0, 10 * MIB))
def test_what_fits_as_a_whole_is_kept_as_a_whole(sizes: Sizes, more: int) -> None:
    everything = least(replace(sizes, smallest_ring_bytes=sum(sizes.stop_bytes)))
    plan = plan_of(sizes, everything + more)
    assert plan.resident == frozenset(range(len(sizes.stop_bytes)))
    assert plan.ring_bytes == 0
    # All that is left goes into tokens.
    left = everything + more - plan.peak_bytes
    assert left < sizes.rider_token_bytes or plan.sweep_tokens == MAX_SWEEP_TOKENS
    assume(sum(sizes.stop_bytes) > sizes.smallest_ring_bytes)
    assert plan_of(sizes, everything - 1).ring_bytes == sizes.smallest_ring_bytes


# Which stops stay


@fuzz
@given(num_stops=st.integers(1, 150), size=st.integers(1, 100), room=st.integers(-10, 16_000))
def test_resident_stops_are_as_many_as_fit_at_even_distances(num_stops: int, size: int, room: int) -> None:
    chosen = sorted(spread([size] * num_stops, room))
    assert len(chosen) == min(max(room, 0) // size, num_stops)
    # Around the circle: from the last to the first of the next sweep as well.
    distances = {
        (after - stop - 1) % num_stops for stop, after in zip(chosen, chosen[1:] + chosen[:1], strict=True)
    }
    assert not distances or max(distances) - min(distances) <= 1
    assert all(0 <= stop < num_stops for stop in chosen)


@fuzz
@given(stop_bytes=st.lists(st.integers(0, 50), max_size=40), room=st.integers(-10, 1000))
def test_resident_stops_never_take_more_than_the_room(stop_bytes: list[int], room: int) -> None:
    chosen = spread(stop_bytes, room)
    assert sum(stop_bytes[stop] for stop in chosen) <= max(room, 0)
    if sum(stop_bytes) <= room:
        assert len(chosen) == len(stop_bytes)


# What several models take


def test_a_budget_gives_no_more_than_it_has() -> None:
    budget = Budget(10 * GIB, used_bytes=GIB)
    budget.take(9 * GIB)
    assert budget.free_bytes == 0
    with pytest.raises(PlanError, match=r"^1B are needed but only 0B of the budget of 10GiB are left$"):
        budget.take(1)
    budget.give_back(2 * GIB)
    with pytest.raises(
        PlanError, match=r"^2\.01GiB are needed but only 2GiB of the budget of 10GiB are left$"
    ):
        budget.take(2 * GIB + 1)
    assert budget.free_bytes == 2 * GIB


def test_a_process_that_is_too_large_already_leaves_nothing() -> None:
    budget = Budget(GIB, used_bytes=2 * GIB)
    assert budget.free_bytes == -GIB
    with pytest.raises(PlanError, match=r"^1B are needed but only 0B of the budget of 1GiB are left$"):
        budget.take(1)


class Lingering(int):
    """A number whose difference takes so long that another thread can come between."""

    def __sub__(self, other: int) -> int:
        left = int(self) - other
        for _ in range(3000):
            pass
        return left


def test_a_budget_is_shared_by_threads() -> None:
    budget = Budget(Lingering(100), used_bytes=0)
    together = threading.Barrier(4)

    def work(_: int) -> int:
        taken = 0
        together.wait()
        for _ in range(100):
            try:
                budget.take(7)
            except PlanError:
                continue
            taken += 7
            assert budget.used_bytes <= 100
            if taken > 40:
                budget.give_back(taken)
                taken = 0
        return taken

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) == budget.used_bytes
    finally:
        sys.setswitchinterval(interval)


# Sizes as people write them

WRITTEN = {
    "16GiB": 16 * GIB, "16gib": 16 * GIB, "16g": 16 * GIB, "16G": 16 * GIB, " 16 GiB ": 16 * GIB, "1.5G": 3 * GIB // 2,
    "500MB": 500_000_000, "500mb": 500_000_000, "8GB": 8_000_000_000, "2TB": 2 * 10**12, "1TiB": 1 << 40, "1k": 1024,
    "1kB": 1000, "1KiB": 1024, "12345": 12345, "12345B": 12345, "0.001kB": 1, "123456789012345678": 123456789012345678,
}  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), WRITTEN.items())
def test_a_size_is_read(text: str, meant: int) -> None:
    assert parse_bytes(text) == meant


def test_a_plain_number_is_bytes() -> None:
    assert parse_bytes(9_007_199_254_740_993) == 9_007_199_254_740_993


NO_SIZE = [
    "",
    "GiB",
    "16 X",
    "16GiBB",
    "-1GiB",
    "+1G",
    "1e9",
    "1_000",
    "1,5G",
    ".5G",
    "5.G",
    "16 G iB",
    "٣GiB",
    "nan",
    "9" * 400,
]


@pytest.mark.parametrize("text", NO_SIZE)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=rf"{re.escape(repr(text))} is not a size; write it like 16GiB, 500MB or 8g"
    ):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0001B"])
def test_nothing_is_not_a_size(text: str) -> None:
    with pytest.raises(InputError, match=f"'{text}' is not a positive size"):
        parse_bytes(text)


@fuzz
@given(size=st.integers(1, 10**18) | st.integers(1, 64 * GIB) | st.integers(1, 10**7))
def test_a_size_as_we_write_it_is_read_as_at_least_as_much(size: int) -> None:
    read = parse_bytes(format_binary(size))
    assert size <= read
    assert read - size <= max(size // 100, 1) + 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1025, "1.01KiB"), (GIB - 1, "1024MiB"), (5 * GIB // 4, "1.25GiB"),
        (20_000 * GIB + 1, "20000.01GiB"), (10**7 * GIB, "10000000GiB"),
    ],
)  # fmt: skip
def test_binary_sizes_are_written_short(size: int, text: str) -> None:
    assert format_binary(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999.4, "999 B"), (1234, "1.23 kB"), (12_345, "12.3 kB"),
        (999_499, "999 kB"), (999_500, "1 MB"), (99_949_999, "99.9 MB"), (99_950_000, "100 MB"), (352e9, "352 GB"),
        (4.93e9, "4.93 GB"), (5e15, "5000 TB"), (-1234, "-1.23 kB"),
    ],
)  # fmt: skip
def test_decimal_sizes_have_three_figures(size: float, text: str) -> None:
    assert format_bytes(size) == text


# Options


@pytest.mark.parametrize(
    ("text", "name"),
    [("bf16", "bfloat16"), ("torch.float16", "float16"), ("FP32", "float32"), ("auto", "auto")],
)
def test_a_dtype_is_read(text: str, name: str) -> None:
    assert parse_dtype(text) == name


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"dtype 'int8' is unknown; use one of auto, fp32, float32, bf16"):
        parse_dtype("int8")
    with pytest.raises(InputError, match=r"dtype 'bf16' is unknown"):
        Options(dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"device 'cuda' is not supported yet; use device='cpu'"):
        Options(device="cuda")
