"""A session that is filled anew by its own calls, in one sweep, or by one call in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from slowllm.errors import SessionError
from slowllm.modeling.merged_calls import merged
from slowllm.modeling.span import SpanCall
from tests.support.families import FAMILIES, save_tiny
from tests.support.local_swarm import LocalSwarm

# Growing caches of every manner; recurrent states stay where they are.
QUICK = ["bloom", "gemma-3-sliding", "llama-2", "mixtral"]
NOT_KEPT = {"mamba", "qwen3-next-hybrid", "rwkv", "gemma-3-with-a-tower"}


def kept(cache: Cache) -> list[Tensor]:
    """Return the keys and values of those layers of a cache that hold some of their own."""
    found = []
    for layer in cast(list[DynamicLayer], cache.layers):
        if layer.keys is not None and layer.values is not None and layer.keys.shape[-1] > 1:
            found += [layer.keys, layer.values]
    return found


class Recorded:
    """A generation, the calls that the first hop with several blocks had in its session, and what the session kept."""

    def __init__(self, swarm: LocalSwarm, **options: Any) -> None:
        ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(0))
        model: Any = swarm.lm.model
        before = len(swarm.spans.calls)
        with torch.no_grad():
            # The cache is held, so that the session stays.
            self.result = model.generate(
                ids, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, return_dict_in_generate=True, **options
            )  # fmt: skip
        first = next(start for start, end in swarm.spans.ends.items() if end - start > 1)
        self.calls = [call for call in swarm.spans.calls[before:] if call.first == first]
        self.server, self.runner = swarm.spans.models[first], swarm.spans.runners[first]
        self.cache = next(
            cache
            for cache in swarm.spans.sessions.values()
            if kept(cache) and cast(DynamicLayer, cache.layers[first]).keys.shape[-1] > 1
        )

    def new_cache(self) -> Cache:
        return self.runner.new_cache(keeps_everything=self.calls[0].keeps_everything)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
        for name in FAMILIES
        if name not in NOT_KEPT
    ],
)
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_calls_that_ride_together_leave_what_they_left_one_after_the_other(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(name, tmp_path)
    with LocalSwarm(tmp_path, keep_resident=False) as swarm:
        recorded = Recorded(swarm, **options)
        cache = recorded.new_cache()
        before = recorded.server.report.num_passages
        outputs = recorded.server.ride(recorded.runner.replay(recorded.calls, cache))
        num_passages = recorded.server.report.num_passages - before
        assert_same(kept(cache), kept(recorded.cache))
        call = recorded.calls[0]
        assert len(recorded.calls) == 8
        assert num_passages == call.end - call.first, "the span is read once"
        assert [len(output[call.end - 1]) for output in outputs] == [len(c.hidden) for c in recorded.calls]


def test_after_a_replay_the_session_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    save_tiny("gemma-3-sliding", tmp_path)
    with LocalSwarm(tmp_path) as swarm:
        recorded = Recorded(swarm, do_sample=False)
        *past, last = recorded.calls
        cache = recorded.new_cache()
        recorded.server.ride(recorded.runner.replay(past, cache))
        recorded.server.ride([lambda: recorded.runner.forward(last, cache)])
        assert_same(kept(cache), kept(recorded.cache))


def test_a_replay_whose_call_fails_lets_none_of_the_later_ones_pass(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    with LocalSwarm(tmp_path) as swarm:
        recorded = Recorded(swarm, do_sample=False)
        without_the_third = [*recorded.calls[:2], *recorded.calls[3:]]
        jobs = recorded.runner.replay(without_the_third, recorded.new_cache())
        with pytest.raises(SessionError, match="continues 2 rows of 9 positions"):
            recorded.server.ride(jobs)
        rides = recorded.server.board_together(
            recorded.runner.replay(without_the_third, recorded.new_cache())
        )
        errors = [error_of(ride) for ride in rides]
        assert errors[:2] == [None, None]
        assert all(isinstance(error, SessionError) for error in errors[2:])
        assert "found block" in str(errors[-1])


def error_of(ride: Any) -> BaseException | None:
    try:
        ride.result()
    except SessionError as error:
        return error
    return None


@pytest.mark.parametrize("max_tokens", [1000, 7])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_merged_calls_leave_the_same_up_to_rounding(
    options: dict[str, Any], max_tokens: int, tmp_path: Path
) -> None:
    save_tiny("bloom", tmp_path)
    with LocalSwarm(tmp_path) as swarm:
        recorded = Recorded(swarm, **options)
        calls = merged(recorded.calls, max_tokens)
        assert calls is not None
        assert len(calls) < len(recorded.calls) or max_tokens == 7
        cache = recorded.new_cache()
        for call in calls:
            recorded.server.ride([lambda call=call: recorded.runner.forward(call, cache)])
        ours, theirs = kept(cache), kept(recorded.cache)
        assert len(ours) == len(theirs) > 0
        for our, their in zip(ours, theirs, strict=True):
            # Products of other shapes, summed in another order.
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def call_of(hidden: Tensor, **fields: Any) -> SpanCall:
    return SpanCall(0, 2, hidden, **fields)


def test_calls_of_a_prefix_or_of_blocks_that_keep_different_positions_are_not_merged() -> None:
    hidden = torch.zeros(1, 3, 4)
    pair = (torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    assert merged([call_of(hidden, pairs={0: pair, 1: pair}, length=2)], 100) is None
    from slowllm.modeling.cache_labels import Move

    first, token = call_of(hidden), torch.zeros(1, 1, 4)
    assert merged([first, call_of(token, length=2, moves={0: Move(2)})], 100) is None
    assert merged([first, call_of(token, length=2, moves={0: Move(2), 1: Move(1)})], 100) is None
    move = Move(2)
    both = merged([first, call_of(token, length=2, moves={0: move, 1: move})], 100)
    assert both is not None
    assert [call.hidden.shape[1] for call in both] == [3]
    assert merged([first, call_of(token, length=5)], 100) is None
    assert (
        merged([first, call_of(token, length=3, positions=torch.zeros(1, 1, dtype=torch.int64))], 100) is None
    )


def test_calls_that_add_other_vectors_than_the_first_are_not_merged() -> None:
    hidden, vectors = torch.zeros(1, 3, 4), {1: torch.ones(5, 4)}
    first = call_of(hidden, vectors=vectors)
    both = merged([first, call_of(hidden, length=3, vectors=dict(vectors))], 100)
    assert both is not None
    assert torch.equal(both[0].vectors[1], vectors[1])
    assert merged([first, call_of(hidden, length=3)], 100) is None
    assert merged([first, call_of(hidden, length=3, vectors={1: torch.zeros(5, 4)})], 100) is None
    assert merged([call_of(hidden), call_of(hidden, length=3, vectors=vectors)], 100) is None
    assert (
        merged([call_of(hidden), call_of(hidden, length=3, vectors={1: torch.ones(3, 4)})], 100) is not None
    )
