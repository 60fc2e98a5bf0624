"""Rows, cuts and loads: whatever is merged, cut and divided, every target is answered once, after the right tokens."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from slowllm.inference.prefix_sharing import (
    PARENT_WEIGHT,
    Load,
    Segment,
    batches_of,
    choose_depths,
    common,
    cut,
    loads,
    merge,
    padded_tokens,
)
from slowllm.inference.text import Query
from tests.support.properties import num_examples

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
queries = st.lists(st.builds(Query, tokens, st.lists(st.integers(0, 2), max_size=4).map(tuple)), max_size=30)
HEADER = tuple(range(100, 140))


def seen_by(segments: list[Segment] | tuple[Segment, ...], number: int) -> tuple[int, ...]:
    """The tokens of a row up to the end of a segment."""
    segment = segments[number]
    before = () if segment.parent is None else seen_by(segments, segment.parent)
    assert len(before) == segment.start
    return before + segment.ids


def answered(asked: list[Query], segments: list[Segment] | tuple[Segment, ...]) -> set[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number, segment in enumerate(segments):
        seen = seen_by(segments, number)
        for target in segment.targets:
            query = asked[target.query]
            before = query.context + query.continuation[: target.place]
            assert segment.start <= target.position < len(seen)
            assert seen[: target.position + 1] == before, "the token is asked for after what comes before it"
            assert target.token == query.continuation[target.place]
            found.append((target.query, target.place))
    assert len(found) == len(set(found))
    return set(found)


def wanted(asked: list[Query]) -> set[tuple[int, int]]:
    return {(number, place) for number, query in enumerate(asked) for place in range(len(query.continuation))}


@given(queries)
def test_merged_rows_answer_every_query(asked: list[Query]) -> None:
    rows = merge(asked)
    assert answered(asked, cut(rows, ())) == wanted(asked)
    assert [row.ids for row in rows] == sorted(row.ids for row in rows)
    assert all(b.ids[: len(a.ids)] != a.ids for a, b in itertools.pairwise(rows)), "none begins another"


def test_choices_of_one_token_share_a_row() -> None:
    rows = merge([Query((1, 2), (3,)), Query((1, 2), (4,)), Query((1, 2), (3, 5))])
    assert [row.ids for row in rows] == [(1, 2, 3)]
    assert sorted((w.position, w.token, w.query) for w in rows[0].targets) == [
        (1, 3, 0),
        (1, 3, 2),
        (1, 4, 1),
        (2, 5, 2),
    ]


@given(queries, st.sets(st.integers(1, 10)).map(sorted))
def test_cut_rows_answer_every_query(asked: list[Query], depths: list[int]) -> None:
    rows = merge(asked)
    segments = cut(rows, depths)
    assert answered(asked, segments) == wanted(asked)
    assert all(s.parent is None or s.parent < number for number, s in enumerate(segments))
    assert all(s.ids for s in segments)
    seen = [seen_by(segments, number) for number in range(len(segments))]
    assert len(seen) == len(set(seen)), "nothing is computed twice as a segment of its own"
    # Cut only where at least two go on.
    parents = [s.parent for s in segments if s.parent is not None]
    assert all(parents.count(parent) > 1 for parent in parents)


@given(queries, st.integers(1, 40), st.integers(1, 60), st.integers(0, 20), st.booleans())
@num_examples(300)
def test_loads_carry_every_wish_and_keep_parents_first(
    asked: list[Query], rider_tokens: int, sweep_tokens: int, padding: int, share: bool
) -> None:
    found: set[tuple[int, int]] = set()
    for load in loads(merge(asked), rider_tokens, sweep_tokens, padding, share=share):
        mine = answered(asked, load.segments)
        assert not mine & found
        found |= mine
        assert sorted(itertools.chain(*load.batches)) == list(range(len(load.segments)))
        at = {member: number for number, batch in enumerate(load.batches) for member in batch}
        for batch in load.batches:
            segments = [load.segments[member] for member in batch]
            assert len({s.start for s in segments}) == 1
            width = max(len(s.ids) for s in segments) + segments[0].start * PARENT_WEIGHT
            assert len(batch) == 1 or len(batch) * width <= rider_tokens
            for member in batch:
                parent = load.segments[member].parent
                assert parent is None or at[parent] < at[member]
        assert load.is_shared == any(s.parent is not None for s in load.segments)
        assert share or not load.is_shared
        if load.is_shared and len(load.segments) > 2:
            assert padded_tokens(load.segments, load.batches) <= sweep_tokens or _rows(load) == 1
    assert found == wanted(asked)


@given(queries, st.integers(1, 40), st.randoms(use_true_random=False))
@num_examples(200)
def test_a_resumed_load_computes_what_is_not_saved_and_what_that_continues(
    asked: list[Query], rider_tokens: int, chance: Any
) -> None:
    for load in loads(merge(asked), rider_tokens, 60, 0, share=True):
        is_saved = [chance.random() < 0.7 for _ in load.batches]
        needed = {load.places[n][0] for n in load.places if not is_saved[load.places[n][0]]}
        while True:
            members = [member for number in needed for member in load.batches[number]]
            parents = [load.segments[member].parent for member in members]
            more = needed | {load.places[parent][0] for parent in parents if parent is not None}
            if more == needed:
                break
            needed = more
        assert load.computed(is_saved) == needed


def _rows(load: Load) -> int:
    return len(load.segments) - len({s.parent for s in load.segments if s.parent is not None})


@given(tokens, tokens)
def test_common_counts_equal_tokens(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(a, b) == expected


def test_a_header_is_computed_once() -> None:
    asked = [Query((*HEADER, number, 7, 7), (8,)) for number in range(50)]
    rows = merge(asked)
    assert choose_depths(rows, 1024, 32) == (40,)
    (load,) = loads(rows, 1024, 8192, 32, share=True)
    assert padded_tokens(load.segments, load.batches) == 40 + 50 * 3


def test_contexts_of_unlike_length_are_cut_where_they_can_go_on_together() -> None:
    # 30 contexts of 64 to 93 tokens after a header, four continuations of three tokens each.
    asked = [
        Query((*HEADER, *([200 + n] * (24 + n))), (choice, 1, 2)) for n in range(30) for choice in range(4)
    ]
    whole = padded_tokens(*_divided(asked, ()))
    segments, batches = _divided(asked, choose_depths(merge(asked), 1024, 16))
    assert padded_tokens(segments, batches) < whole / 3
    assert {s.start for s in segments} - {0}, "there are cuts"


def _divided(asked: list[Query], depths: tuple[int, ...]) -> tuple[list[Segment], list[list[int]]]:
    segments = cut(merge(asked), depths)
    return segments, batches_of(segments, 1024, 16)


def test_sharing_is_left_where_another_micro_batch_costs_more() -> None:
    asked = [Query((*range(10), number), (8,)) for number in range(4)]
    assert choose_depths(merge(asked), 1024, 1000) == ()
    assert choose_depths(merge(asked), 1024, 1) == (10,)


def test_rows_of_one_sweep_have_their_header_beside_them() -> None:
    asked = [Query((*HEADER, number, 7, 7), (8,)) for number in range(50)]
    parts = list(loads(merge(asked), 64, 100, 8, share=True))
    assert len(parts) >= 3
    for load in parts:
        assert sum(s.parent is None for s in load.segments) == 1
        assert padded_tokens(load.segments, load.batches) <= 100


def test_a_load_has_no_more_micro_batches_than_seats() -> None:
    asked = [Query((*range(400), number, 7, 7), (8,)) for number in range(200)]
    parts = list(loads(merge(asked), 256, 8192, 8, share=True, max_batches=16))
    assert all(load.is_shared and len(load.batches) <= 16 for load in parts)
    assert sum(_rows(load) for load in parts) == 200
