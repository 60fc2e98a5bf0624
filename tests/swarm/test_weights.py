"""One word stands for all blocks of a model, and servers that hold them are found by it among others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.swarm.records import ServerRecord
from slowllm.swarm.weights import MAX_WAYS, assemblies, is_weights_hash, pinned_blocks, weights_hash

TRUE = ("a0", "a1", "a2", "a3")
RECORD = ServerRecord("Q" * 20, (), "m-4", 0, 4, "online", "float32", "1", TRUE)


def server(first: int, hashes: tuple[str, ...]) -> ServerRecord:
    return replace(RECORD, first=first, end=first + len(hashes), block_hashes=hashes)


def test_the_word_depends_on_each_block_and_their_order() -> None:
    words = {weights_hash(hashes) for hashes in (TRUE, TRUE[::-1], TRUE[:3], ("a0a1", "a2", "a3"))}
    assert len(words) == 4
    assert all(map(is_weights_hash, words))


@pytest.mark.parametrize("text", ["", "a" * 31, "g" * 32, "A" * 32])
def test_other_texts_are_no_such_word(text: str) -> None:
    assert not is_weights_hash(text)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=6))
def test_the_blocks_of_a_word_are_found_if_the_servers_have_them(spans: list[tuple[int, int]]) -> None:
    records = [server(first, TRUE[first : first + length]) for first, length in spans]
    odd = [server(1, ("b1", "b2"))]
    covered = {block for r in records for block in range(r.first, r.end)}
    found = pinned_blocks([*odd, *records], 4, weights_hash(TRUE))
    assert found == (dict(enumerate(TRUE)) if covered == {0, 1, 2, 3} else None)


def test_a_word_of_blocks_that_few_have_is_found_among_those_of_many() -> None:
    many = [server(0, ("b0", "b1", "b2", "b3"))] * 5
    assert pinned_blocks([*many, server(0, TRUE)], 4, weights_hash(TRUE)) == dict(enumerate(TRUE))
    assert pinned_blocks([*many, server(0, TRUE)], 4, weights_hash(TRUE[::-1])) is None


def test_servers_that_disagree_about_a_block_are_not_put_together() -> None:
    records = [server(0, ("a0", "a1")), server(1, ("b1", "a2", "a3"))]
    assert list(assemblies(records, 4)) == []
    assert list(assemblies([*records, server(2, ("a2", "a3"))], 4)) == [TRUE]


def test_strangers_with_many_weights_do_not_keep_a_client_busy() -> None:
    few = [server(block, (f"{block}-{n}",)) for block in range(16) for n in range(16)]
    assert len(list(assemblies(few, 16))) < MAX_WAYS
