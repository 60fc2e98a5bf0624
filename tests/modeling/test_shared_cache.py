"""Rows that go on from another rider's keys and values score as whole rows do, in every family that allows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import slowllm
from slowllm.errors import NonFiniteError, RideError
from slowllm.inference import scoring
from slowllm.inference.text import Query
from slowllm.modeling.shared_cache import Beginning, SharedPrefix, can_share
from slowllm.runtime.streamed_lm import StreamedLM
from tests.support.families import family_cases, resident

# Families whose cache is more than keys and values, or that have none.
OWN_CACHES = {"mamba", "openai-gpt", "qwen3-next-hybrid"}
TOLERANCE = 1e-5  # other shapes of the same products round otherwise


def some_queries(seed: int = 0) -> list[Query]:
    """A header, under it contexts of unlike length, under each some continuations of unlike length."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (count,), generator=generator).tolist())

    header = ids(20)
    contexts = [(*header, *ids(4 + 3 * number)) for number in range(5)]
    return [Query(context, ids(1 + number)) for context in contexts for number in range(4)]


def eager(lm: StreamedLM) -> StreamedLM:
    """Make sharing look cheap, so that tiny rows are shared in small riders."""
    lm.plan = dataclasses.replace(lm.plan, rider_tokens=48, sweep_tokens=400, padding_tokens=2)
    return lm


@pytest.mark.parametrize("family", family_cases())
def test_shared_rows_score_as_plain_transformers_does(family: str, tiny: Callable[..., Path]) -> None:
    folder = tiny(family)
    reference = resident(folder)
    queries = some_queries()
    with slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True) as lm:
        assert can_share(lm.config) == (family not in OWN_CACHES)
        eager(lm)
        before = lm._carousel.totals.num_passed
        found = list(scoring.score_queries(lm, queries))
        shared = lm._carousel.totals.num_passed - before
        plain = list(scoring.score_queries(lm, queries, share=False))
    assert shared > 0
    for query, ours, unshared in zip(queries, found, plain, strict=True):
        ids = torch.tensor([query.context + query.continuation])
        with torch.no_grad():
            logits = reference(ids).logits[0].float().log_softmax(-1)
        first = len(query.context)
        places = torch.arange(first - 1, ids.shape[1] - 1)
        expected = logits[places, ids[0, first:]]
        assert torch.allclose(torch.tensor(ours.log_probs), expected, rtol=0, atol=TOLERANCE)
        assert torch.allclose(torch.tensor(unshared.log_probs), expected, rtol=0, atol=TOLERANCE)
        assert ours.is_greedy == bool((logits[places].argmax(-1) == ids[0, first:]).all())


def test_sharing_saves_tokens(tiny: Callable[..., Path]) -> None:
    queries = some_queries()
    passed: list[int] = []

    with slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False) as lm:
        lm.model.model.embed_tokens.register_forward_hook(lambda *a: passed.append(a[1][0].numel()))
        eager(lm)
        list(scoring.score_queries(lm, queries))
        shared = sum(passed)
        passed.clear()
        list(scoring.score_queries(lm, queries, share=False))
    assert shared < sum(passed) / 2


def test_a_trunk_is_dropped_when_all_have_taken_it() -> None:
    trunk = SharedPrefix(2)
    keys = torch.randn(2, 1, 5, 3)
    trunk.put(0, keys, keys + 1)
    beginning = Beginning(4, [(trunk, 1), (trunk, 0), (trunk, 1)])
    taken, values = beginning.take(0)
    assert torch.equal(taken, keys[[1, 0, 1], :, :4])
    assert torch.equal(values, keys[[1, 0, 1], :, :4] + 1)
    Beginning(5, [(trunk, 0)]).take(0)
    assert not trunk._pairs
    with pytest.raises(RideError, match="the rider that computes the beginning of these rows has failed"):
        beginning.take(0)


def test_a_failed_beginning_is_the_error_that_is_raised(tiny: Callable[..., Path]) -> None:
    with slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False) as lm:
        eager(lm)

        def spoil(module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            is_header = inputs[0].shape == (1, 20)
            return output * float("nan") if is_header else output

        header = some_queries()[0].context[:20]
        queries = [Query((*header, token), (5,)) for token in range(30)]
        handle = lm.model.model.embed_tokens.register_forward_hook(spoil)
        with pytest.raises(NonFiniteError, match=r"layers\.0"):
            list(scoring.score_queries(lm, queries))
        handle.remove()
        assert len(list(scoring.score_queries(lm, queries))) == 30, "the model goes on"


def test_a_shared_load_waits_for_an_empty_carousel(tiny: Callable[..., Path]) -> None:
    # Else a header's keys and values of all blocks would be held for those who board a sweep later.
    with slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False) as lm:
        eager(lm)
        lm.plan = dataclasses.replace(lm.plan, sweep_tokens=100)
        most = 0
        put = SharedPrefix.put

        def watched(self: SharedPrefix, block: int, *pair: torch.Tensor) -> None:
            nonlocal most
            put(self, block, *pair)
            most = max(most, len(self._pairs))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SharedPrefix, "put", watched)
            before = lm.report.num_passages
            list(scoring.score_queries(lm, [q for seed in range(4) for q in some_queries(seed)]))
        assert lm.report.num_passages - before > 2 * lm.num_stops
        assert most == 1, "one block's keys and values at a time"
