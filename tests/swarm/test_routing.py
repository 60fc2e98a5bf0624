"""Routes cover every block once, through servers that may be asked, and are the best ones on small swarms."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import MissingBlocksError
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.routing import (
    UNKNOWN_DECODE_SECONDS,
    UNKNOWN_LATENCY_SECONDS,
    ServerHop,
    Wishes,
    fastest_route,
    format_route,
    most_batch_tokens,
    other_weights,
    spread,
    usable_spans,
)
from tests.support.properties import num_examples


def server(letter: str, first: int, end: int, **fields: Any) -> ServerRecord:
    """Return the record of an online server."""
    options: dict[str, Any] = {
        "state": "online", "dtype": "float32", "version": "1", "addresses": (), "model": "m-9",
        "block_hashes": tuple(f"h{block}" for block in range(first, end)), "decode_seconds": 0.01,
        "forward_tokens_per_second": 100.0, "max_batch_tokens": 100, "cache_tokens_free": 100, "has_backward": True, **fields,
    }  # fmt: skip
    return ServerRecord(peer=letter * 16, first=first, end=end, **options)


@st.composite
def swarms(draw: st.DrawFn, most: int = 5, blocks: int = 5) -> list[ServerRecord]:
    """Return a few servers of a model with a few blocks, some of which cannot be used."""
    records = []
    for letter in "ABCDEFG"[: draw(st.integers(1, most))]:
        first = draw(st.integers(0, blocks - 1))
        end = draw(st.integers(first + 1, blocks))
        hashes = tuple(f"h{b}" if draw(st.integers(0, 9)) else "other" for b in range(first, end))
        records.append(
            server(
                letter, first, end, block_hashes=hashes,
                state=draw(st.sampled_from(["online"] * 6 + ["joining", "draining", "offline"])),
                decode_seconds=draw(st.sampled_from([0.0, 0.01, 0.02, 0.07])),
                forward_tokens_per_second=draw(st.sampled_from([0.0, 10.0, 100.0, 250.0])),
                has_backward=draw(st.booleans()), max_batch_tokens=draw(st.sampled_from([10, 100])),
            )
        )  # fmt: skip
    return records


PEERS = [letter * 16 for letter in "ABCDE"]
WISHES = st.builds(
    Wishes,
    allowed=st.none() | st.sets(st.sampled_from(PEERS), min_size=2),
    blocked=st.sets(st.sampled_from(PEERS), max_size=1),
    banned=st.sets(st.sampled_from(PEERS), max_size=1),
    hashes=st.dictionaries(st.integers(0, 4), st.sampled_from(["h1", "h2", "other"]), max_size=1),
    needs_backward=st.booleans(),
    batch_tokens=st.sampled_from([0, 10, 50]),
)
LATENCIES = st.dictionaries(st.sampled_from(PEERS), st.sampled_from([0.001, 0.02, 0.3]))


def check(route: Sequence[ServerHop], first: int, end: int, wishes: Wishes) -> None:
    """Check that a route covers each block once, in order, through servers that may be asked, with the same weights."""
    assert [block for hop in route for block in range(hop.first, hop.end)] == list(range(first, end))
    for hop in route:
        assert hop.record.first <= hop.first < hop.end <= hop.record.end
        assert hop.record.state == "online"
        assert wishes.allowed is None or hop.record.peer in wishes.allowed
        assert hop.record.peer not in wishes.blocked
        assert hop.record.peer not in wishes.banned
        assert hop.record.has_backward or not wishes.needs_backward
        assert hop.record.max_batch_tokens >= wishes.batch_tokens
        for block in range(hop.first, hop.end):
            assert hop.record.hash_of(block) == wishes.hashes.get(block, hop.record.hash_of(block))


def every_route(spans: Sequence[ServerHop], first: int, end: int) -> Iterator[list[ServerHop]]:
    """Yield every way to cover the blocks."""
    if first == end:
        yield []
    for span in spans:
        if span.first <= first < span.end:
            for cut in range(first + 1, min(span.end, end) + 1):
                for rest in every_route(spans, cut, end):
                    yield [ServerHop(span.record, first, cut), *rest]


def cost_of(route: Sequence[ServerHop], way: Any) -> float:
    """Return the seconds of one token on a route, where a hop that goes on at the same server is none."""
    total, last = 0.0, None
    for hop in route:
        if hop.record.peer != last:
            total += way(last, hop.record.peer)
        last = hop.record.peer
        total += (hop.record.decode_seconds or UNKNOWN_DECODE_SECONDS) * (hop.end - hop.first)
    return total


@given(swarms(), WISHES, LATENCIES, st.booleans(), st.integers(0, 1000))
@num_examples(300)
def test_a_route_covers_every_block_once_and_none_is_faster(
    records: list[ServerRecord], wishes: Wishes, latencies: dict[str, float], is_direct: bool, seed: int
) -> None:
    def hop_latency(last: str | None, peer: str) -> float:
        # Any numbers, also such that a detour is shorter.
        return crc32(f"{last} {peer} {seed}".encode()) % 97 / 1000

    def way(last: str | None, peer: str) -> float:
        return hop_latency(last, peer) if is_direct else latencies.get(peer, UNKNOWN_LATENCY_SECONDS)

    try:
        spans = usable_spans(records, 0, 5, wishes)
    except MissingBlocksError:
        with pytest.raises(MissingBlocksError):
            fastest_route(records, 0, 5, wishes, latencies)
        return
    route = fastest_route(records, 0, 5, wishes, latencies, hop_latency if is_direct else None)
    check(route, 0, 5, wishes)
    assert all(a.record.peer != b.record.peer for a, b in itertools.pairwise(route))
    best = min(cost_of(other, way) for other in every_route(spans, 0, 5))
    assert cost_of(route, way) == pytest.approx(best)
    for block in range(5):  # whichever spans are taken, weights are never mixed
        assert len({span.record.hash_of(block) for span in spans if span.first <= block < span.end}) == 1


@given(swarms(), WISHES, st.integers(1, 8))
@num_examples(200)
def test_each_micro_batch_has_a_route_that_covers_every_block_once(
    records: list[ServerRecord], wishes: Wishes, num: int
) -> None:
    try:
        usable_spans(records, 0, 5, wishes)
    except MissingBlocksError:
        with pytest.raises(MissingBlocksError):
            spread(records, num, 0, 5, wishes)
        return
    routes = spread(records, num, 0, 5, wishes)
    assert len(routes) == num
    for route in routes:
        check(route, 0, 5, wishes)


@given(st.lists(st.sampled_from([10.0, 15.0, 40.0, 100.0]), min_size=1, max_size=4), st.integers(1, 6))
@num_examples(100)
def test_whole_replicas_share_micro_batches_as_well_as_can_be(rates: list[float], num: int) -> None:
    records = [
        server(letter, 0, 3, forward_tokens_per_second=rate)
        for letter, rate in zip("ABCD", rates, strict=False)
    ]
    routes = spread(records, num, 0, 3)
    assert all(len(route) == 1 for route in routes)

    def seconds(choice: Sequence[int]) -> float:
        return max(count / rates[index] for index, count in Counter(choice).items())

    best = min(seconds(choice) for choice in itertools.product(range(len(rates)), repeat=num))
    chosen = [records.index(route[0].record) for route in routes]
    assert seconds(chosen) == pytest.approx(best)


def test_replicas_of_parts_are_all_used() -> None:
    records = [server("A", 0, 2), server("B", 0, 2), server("C", 2, 4), server("D", 2, 4), server("E", 2, 4)]
    used = Counter(hop.record.peer[0] for route in spread(records, 12, 0, 4) for hop in route)
    assert used == {"A": 6, "B": 6, "C": 4, "D": 4, "E": 4}


def test_the_majoritys_weights_are_used_and_others_named() -> None:
    records = [
        server("A", 0, 2),
        server("B", 0, 2, block_hashes=("h0", "changed"), decode_seconds=0.001, name="fast"),
        server("C", 1, 2),
    ]
    route = fastest_route(records, 0, 2)
    assert format_route(route) in (
        "0:2 AAAAAA",
        "0:1 fast (BBBBBB), 1:2 AAAAAA",
        "0:1 fast (BBBBBB), 1:2 CCCCCC",
    )
    assert other_weights(records, 0, 2, Wishes()) == {"fast (BBBBBB)": "blocks 1:2"}
    # The client's own weights count more than the majority.
    route = fastest_route(records, 0, 2, Wishes(hashes={1: "changed"}))
    assert format_route(route) == "0:2 fast (BBBBBB)"
    assert other_weights(records, 0, 2, Wishes(hashes={1: "changed"})) == {
        "AAAAAA": "blocks 1:2",
        "CCCCCC": "blocks 1:2",
    }


def test_blocks_that_nobody_serves_are_named_with_the_servers_that_were_seen() -> None:
    records = [
        server("A", 0, 3, name="desk"),
        server("B", 3, 5, state="draining"),
        server("C", 5, 7, has_backward=False),
        server("D", 7, 8, max_batch_tokens=5),
        server("E", 8, 9, block_hashes=("changed",)),
        server("F", 9, 10, cache_tokens_free=3),
        server("G", 10, 11),
        server("H", 11, 12),
        server("J", 12, 13),
    ]
    wishes = Wishes(
        allowed={record.peer for record in records if record.peer[0] != "J"}, blocked={"G" * 16}, banned={"H" * 16},
        hashes={8: "mine"}, needs_backward=True, batch_tokens=10, cache_tokens=4,
    )  # fmt: skip
    with pytest.raises(MissingBlocksError) as caught:
        fastest_route(records, 1, 14, wishes)
    assert caught.value.blocks == tuple(range(3, 14))
    assert str(caught.value) == (
        "nobody serves blocks 3:14 (desk (AAAAAA) has 0:3; BBBBBB has 3:5 but is draining; CCCCCC has 5:7 but computes no "
        "gradients; DDDDDD has 7:8 but takes 5 tokens a request, not 10; EEEEEE has 8:9 but has other weights in blocks 8:9; "
        "FFFFFF has 9:10 but has room for 3 tokens, not 4; GGGGGG has 10:11 but is blocked; HHHHHH has 11:12 but failed lately; "
        "and 1 more)"
    )
    with pytest.raises(MissingBlocksError, match="JJJJJJ has 12:13 but is not among the allowed peers"):
        fastest_route(records[-1:], 12, 13, wishes)
    with pytest.raises(MissingBlocksError, match=r"nobody serves blocks 0:1, 2:3 \(AAAAAA has 1:2\)"):
        spread([server("A", 1, 2)], 1, 0, 3)
    with pytest.raises(MissingBlocksError, match=r"nobody serves blocks 0:3 \(no server was found\)"):
        usable_spans([], 0, 3, Wishes())


def test_a_near_server_is_better_than_two_fast_ones_far_away() -> None:
    records = [
        server("A", 0, 4, decode_seconds=0.02),
        server("B", 0, 2, decode_seconds=0.001),
        server("C", 2, 4, decode_seconds=0.001),
    ]
    near = {"A" * 16: 0.01, "B" * 16: 0.05, "C" * 16: 0.05}
    assert format_route(fastest_route(records, 0, 4, latencies=near)) == "0:4 AAAAAA"
    assert (
        format_route(fastest_route(records, 0, 4, latencies=dict.fromkeys(near, 0.01)))
        == "0:2 BBBBBB, 2:4 CCCCCC"
    )
    assert format_route([]) == ""


def test_a_server_too_small_for_a_session_is_named_with_the_limit_that_refuses() -> None:
    record = server("A", 0, 2, max_length=50, cache_tokens=60, cache_tokens_free=40)
    for wishes, reason, is_full in (
        (Wishes(length=51), "takes sequences of 50 tokens, not 51", False),
        (Wishes(cache_tokens=61), "keeps 60 tokens of sessions in all, not 61", False),
        (Wishes(cache_tokens=60, length=50), "has room for 40 tokens, not 60", True),
    ):
        with pytest.raises(MissingBlocksError, match=f"AAAAAA has 0:2 but {reason}") as caught:
            fastest_route([record], 0, 2, wishes)
        assert caught.value.is_full is is_full
    assert fastest_route([record], 0, 2, Wishes(cache_tokens=40, length=50))
    unknown = server("B", 0, 2, cache_tokens_free=1000)
    assert fastest_route([unknown], 0, 2, Wishes(cache_tokens=1000, length=1000))


def test_what_fills_a_server_counts_only_at_blocks_that_are_missing() -> None:
    full = server("A", 0, 2, cache_tokens=100, cache_tokens_free=1)
    blocked = server("B", 2, 4, cache_tokens_free=100)
    other = server("C", 0, 2, cache_tokens_free=100)
    with pytest.raises(MissingBlocksError, match="nobody serves blocks 2:4") as caught:
        fastest_route([full, blocked, other], 0, 4, Wishes(cache_tokens=50, blocked={blocked.peer}))
    assert not caught.value.is_full


def test_a_server_that_takes_little_does_not_bound_the_requests_of_others() -> None:
    many = [server("A", 0, 6, max_batch_tokens=500), server("B", 6, 9, max_batch_tokens=300)]
    little = [server("C", 0, 9, max_batch_tokens=1)]
    assert most_batch_tokens([*many, *little], 9, Wishes()) == 300
    assert most_batch_tokens([many[0], *little], 9, Wishes()) == 1
    with pytest.raises(MissingBlocksError, match="nobody serves blocks 6:9"):
        most_batch_tokens(many[:1], 9, Wishes())
    with pytest.raises(MissingBlocksError, match="no server was found"):
        most_batch_tokens([], 9, Wishes())
