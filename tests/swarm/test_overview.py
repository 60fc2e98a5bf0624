"""The view of a swarm counts replicas, names what is missing, and names servers whose weights differ."""

from __future__ import annotations

import json
from dataclasses import replace

from slowllm.swarm.overview import StatusAnswer, view_of
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.status import ServerStatus
from slowllm.swarm.weights import weights_hash

A = ServerRecord("a" * 20, (), "m-6", 0, 3, "online", "float32", "1", ("0", "1", "2"), name="desk")
B = replace(A, peer="b" * 20, first=2, end=5, block_hashes=("2", "3", "4"), name="lamp")
ODD = replace(A, peer="c" * 20, first=1, end=3, block_hashes=("1", "x"), name="odd")
LEAVING = replace(A, peer="d" * 20, first=5, end=6, block_hashes=("5",), state="draining")


def test_replicas_and_missing_blocks_are_counted_of_servers_that_are_online() -> None:
    view = view_of("m-6", "llama", 6, [A, ODD, B, LEAVING], {})
    assert view.replicas == (1, 2, 3, 1, 1, 0)
    assert view.coverage == [(0, 1, 1), (1, 2, 2), (2, 3, 3), (3, 5, 1), (5, 6, 0)]
    assert view.missing == [(5, 6)]
    assert view.weights == ()


def test_servers_of_one_block_whose_weights_differ_are_named() -> None:
    view = view_of("m-6", "llama", 6, [A, ODD, B], {})
    assert {server.record.name: server.odd_blocks for server in view.servers} == {
        "desk": (), "odd": ((2, 3),), "lamp": (),
    }  # fmt: skip


def test_whole_sets_of_blocks_have_their_words_the_most_common_first() -> None:
    other = replace(A, peer="e" * 20, end=5, block_hashes=("y",) * 5)
    view = view_of("m-5", "llama", 5, [other, A, replace(A, peer="f" * 20), B], {})
    assert view.weights == (weights_hash(("0", "1", "2", "3", "4")), weights_hash(("y",) * 5))


def test_the_json_says_what_came_of_asking() -> None:
    status = ServerStatus(1, 2, 3, 4, 5, 6)
    answers = {
        A.peer: StatusAnswer(status, 0.25, reached_by=True, asked="lamp"),
        B.peer: StatusAnswer(why="is lost"),
    }
    said = json.loads(json.dumps(view_of("m-6", "llama", 6, [A, B, LEAVING], answers).to_json()))
    first, second, third = said["servers"]
    assert (first["reached"], first["reach_seconds"], first["reached_by_others"]) == (True, 0.25, True)
    assert first["status"]["num_sessions"] == 4
    assert (second["reached"], second["why_not_reached"]) == (False, "is lost")
    assert third["why_not_reached"] == "was not asked"


def test_a_record_of_more_blocks_than_the_model_has_is_left_out() -> None:
    assert view_of("m-2", "llama", 2, [A], {}).servers == ()
