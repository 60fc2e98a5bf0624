"""Which blocks a server takes, by what the swarm has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slowllm.swarm.placement import is_overtaken, scarcest_blocks
from slowllm.swarm.records import ServerRecord, State


def server(
    first: int, end: int, rate: float = 10.0, state: State = "online", peer: str = "Q" * 16
) -> ServerRecord:
    return ServerRecord(
        peer=peer, addresses=(), model="m", first=first, end=end, state=state, dtype="float32", version="1",
        block_hashes=("h",) * (end - first), forward_tokens_per_second=rate,
    )  # fmt: skip


def test_an_empty_swarm_gets_the_first_blocks() -> None:
    assert scarcest_blocks([], 10, 4) == (0, 4)


def test_blocks_that_nobody_has_come_first() -> None:
    assert scarcest_blocks([server(0, 4), server(7, 10)], 10, 3) == (4, 7)
    assert scarcest_blocks([server(0, 6)], 10, 3) == (6, 9)


def test_the_slowest_blocks_come_next() -> None:
    assert scarcest_blocks([server(0, 5, 10.0), server(5, 10, 3.0)], 10, 5) == (5, 10)


def test_servers_that_leave_do_not_count_and_those_that_join_do() -> None:
    assert scarcest_blocks([server(0, 5, state="draining"), server(5, 10)], 10, 5) == (0, 5)
    assert scarcest_blocks([server(0, 5, 0.0, state="joining")], 10, 5) == (5, 10)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10), st.floats(0, 100)), max_size=6),
    st.integers(1, 10),
)
def test_the_worst_block_is_always_among_them(spans: list[tuple[int, int, float]], count: int) -> None:
    records = [server(first, min(10, first + length), rate) for first, length, rate in spans]
    first, end = scarcest_blocks(records, 10, count)
    assert 0 <= first < end <= 10
    assert end - first == count
    rates = [
        sum(r.forward_tokens_per_second or 1.0 for r in records if r.first <= block < r.end)
        for block in range(10)
    ]
    assert min(rates) == min(rates[first:end])


def test_of_two_that_join_with_the_same_blocks_the_lower_peer_keeps_them() -> None:
    low = server(0, 4, state="joining", peer="A" * 16)
    high = server(3, 6, state="joining", peer="B" * 16)
    assert is_overtaken(high, [], [low])
    assert not is_overtaken(low, [], [high])
    # Blocks beside each other, those that were known, and servers that leave are no reason to choose again.
    assert not is_overtaken(server(4, 6, state="joining", peer="B" * 16), [], [low])
    assert not is_overtaken(high, [low], [low])
    assert not is_overtaken(high, [], [server(0, 4, state="draining", peer="A" * 16)])
    # Who serves already was there first, whatever its id.
    assert is_overtaken(low, [], [server(3, 6, peer="B" * 16)])
