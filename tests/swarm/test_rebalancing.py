"""Servers move to other blocks where it pays, and only there."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.swarm_churn import Simulation
from slowllm.swarm.placement import block_rates
from slowllm.swarm.rebalancing import (
    MEAN_CHECK_SECONDS,
    MOST_DELAY_SECONDS,
    better_blocks,
    delay_seconds,
    next_check_seconds,
    reason_to_move,
)
from slowllm.swarm.records import ServerRecord, State

NUM_BLOCKS = 10


def server(name: str, first: int, end: int, rate: float = 10.0, state: State = "online") -> ServerRecord:
    return ServerRecord(
        peer=name * 16, addresses=(), model="m", first=first, end=end, state=state, dtype="float32", version="1",
        block_hashes=("h",) * (end - first), forward_tokens_per_second=rate,
    )  # fmt: skip


def test_a_server_fills_a_gap_where_others_have_its_blocks() -> None:
    own = server("a", 0, 5)
    assert better_blocks([own, server("b", 0, 5)], own, NUM_BLOCKS) == (5, 10)
    # Alone it would only open another one.
    assert better_blocks([own], own, NUM_BLOCKS) is None


def test_a_server_stays_where_it_gains_little() -> None:
    own = server("a", 0, 5, 10.0)
    others = [server("b", 0, 5, 100.0), server("c", 5, 10, 90.0)]
    assert better_blocks([own, *others], own, NUM_BLOCKS) is None
    # From 90 tokens a second of the slowest block to 100.
    assert better_blocks([own, *others], own, NUM_BLOCKS, least_gain=1.05) == (5, 10)
    slow = [server("b", 0, 5, 100.0), server("c", 5, 10, 30.0)]
    assert better_blocks([own, *slow], own, NUM_BLOCKS) == (5, 10)


def test_a_server_does_not_leave_blocks_to_others_that_do_not_serve_yet() -> None:
    own = server("a", 0, 5, 10.0)
    others = [server("b", 0, 5, 100.0, state="joining"), server("c", 5, 10, 30.0)]
    assert better_blocks([own, *others], own, NUM_BLOCKS) is None


def test_a_server_moves_only_to_blocks_that_it_has() -> None:
    own = server("a", 0, 4)
    others = [server("b", 0, 4), server("c", 0, 4)]
    assert better_blocks([own, *others], own, NUM_BLOCKS, allowed=range(8)) == (4, 8)
    assert better_blocks([own, *others], own, NUM_BLOCKS, allowed=range(4)) is None


def test_the_reason_to_move_is_what_the_swarm_gains() -> None:
    own = server("a", 0, 5)
    gap = [own, server("b", 0, 5)]
    assert reason_to_move(gap, own, (5, 10), NUM_BLOCKS) == "5 blocks more are served then"
    slow = [own, server("b", 0, 5, 100.0), server("c", 5, 10, 30.0)]
    said = reason_to_move(slow, own, (5, 10), NUM_BLOCKS)
    assert said == "the swarm's slowest block gets 1.3 times the tokens a second then"


spans = st.tuples(st.integers(0, 8), st.integers(1, 6), st.floats(1, 100), st.booleans())


@given(spans, st.lists(spans, max_size=6))
def test_no_move_takes_a_block_from_the_swarm(
    first_span: tuple[int, int, float, bool], others: list[tuple[int, int, float, bool]]
) -> None:
    made = [
        server("abcdefgh"[number], first, min(NUM_BLOCKS, first + length), rate, "online" if online else "joining")
        for number, (first, length, rate, online) in enumerate([first_span, *others])
    ]  # fmt: skip
    own, rest = made[0], made[1:]
    span = better_blocks(made, own, NUM_BLOCKS)
    if span is None:
        return
    assert span[1] - span[0] == own.end - own.first
    moved = server("a", *span, own.forward_tokens_per_second)
    before, after = block_rates(made, NUM_BLOCKS), block_rates([moved, *rest], NUM_BLOCKS)
    assert after.count(0.0) <= before.count(0.0)
    if after.count(0.0) == before.count(0.0):
        assert min(after) > min(before)
        online = block_rates([record for record in rest if record.state == "online"], NUM_BLOCKS)
        assert all(online[own.first : own.end])
    assert better_blocks([moved, *rest], moved, NUM_BLOCKS) is None, "it would move on at once"


def test_servers_do_not_look_in_step() -> None:
    generator = random.Random(0)
    checks = [next_check_seconds(generator) for _ in range(100)]
    assert MEAN_CHECK_SECONDS / 2 <= min(checks) < max(checks) <= MEAN_CHECK_SECONDS * 3 / 2
    delays = [delay_seconds(generator) for _ in range(100)]
    assert 0 <= min(delays) < MOST_DELAY_SECONDS / 4 < max(delays) <= MOST_DELAY_SECONDS


def test_a_swarm_keeps_all_blocks_while_a_fifth_of_its_servers_go_each_hour() -> None:
    found = Simulation(30, 24, 0.2, seed=0).run(3.0)
    assert found.num_left >= 10
    assert found.covered > 0.999999
    assert found.mean_slowest > 0.5 * found.mean_fair


def test_a_small_swarm_closes_gaps_sooner_if_its_servers_move() -> None:
    moving, staying = (
        Simulation(8, 24, 0.2, seed=0, rebalances=rebalances).run(24.0) for rebalances in (True, False)
    )
    assert moving.num_moves > 0
    assert staying.num_moves == 0
    assert moving.longest_gap_seconds < staying.longest_gap_seconds
    assert moving.mean_slowest / moving.mean_fair > staying.mean_slowest / staying.mean_fair
