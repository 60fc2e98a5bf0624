"""The likeliest tokens of positions are those of the resident model, and given tokens' scores have the bits of `log_probs_at`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.errors import InputError
from slowllm.modeling.log_probs import log_probs_at
from slowllm.modeling.top_log_probs import top_log_probs
from tests.support.families import VOCAB, family_cases

Tiny = Callable[..., Path]
IDS = torch.randint(5, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([2, 0, 0, 2, 1, 1, 1])
POSITIONS = torch.tensor([1, 3, 8, 1, 0, 5, 5])
TOKENS = torch.tensor([33, 7, 300, 12, 306, 0, 44])
PLACES = [[0, 3], [0, 8], [1, 0], [1, 5], [2, 1]]
# The softmax is summed in another order.
TOLERANCE = 1e-5


def plain_log_probs(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits.float()
    found: torch.Tensor = logits[[p[0] for p in PLACES], [p[1] for p in PLACES]].log_softmax(-1)
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", family_cases())
@pytest.mark.parametrize("num_top", [5, VOCAB])
def test_the_likeliest_tokens_of_a_family_equal_the_resident_models(
    name: str, num_top: int, tiny: Tiny
) -> None:
    compare(name, num_top, tiny)


def test_the_likeliest_tokens_equal_the_resident_models(tiny: Tiny) -> None:
    compare("bloom", 5, tiny)


def test_they_are_found_in_whole_logits_as_well(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slowllm.runtime.load.find_logit_transform", lambda model: None)
    compare("bloom", VOCAB, tiny)


def compare(name: str, num_top: int, tiny: Tiny) -> None:
    wanted = plain_log_probs(tiny(name))
    ordered = wanted.topk(num_top)
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True) as lm:
        found = top_log_probs(lm.model, ROWS, POSITIONS, TOKENS, num_top, input_ids=IDS)
        plain = log_probs_at(lm.model, ROWS, POSITIONS, TOKENS, input_ids=IDS)
    assert found.places.tolist() == PLACES
    assert torch.equal(found.places[found.place_of_token], torch.stack([ROWS, POSITIONS], -1))
    assert torch.equal(found.log_probs, plain.log_probs)
    assert torch.equal(found.is_likeliest, plain.is_likeliest)
    assert (found.top_log_probs - ordered.values).abs().max() <= TOLERANCE
    # Where rounding changes the order, the tokens are about as likely.
    assert (wanted.gather(-1, found.top_ids) - ordered.values).abs().max() <= TOLERANCE
    assert (found.top_ids == ordered.indices).float().mean() > 0.9


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_many_tiles_and_chunks_give_the_same_tokens(
    dtype: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for columns, chunk_bytes in ((8192, 1 << 30), (17, 64 * 64 * 4)):
        monkeypatch.setattr("slowllm.modeling.online_softmax.TILE_COLUMNS", columns)
        monkeypatch.setattr("slowllm.modeling.layout.MIN_CHUNK_BYTES", chunk_bytes)
        with slowllm.load(tiny("bloom"), dtype=dtype, keep_resident=False, poison=True) as lm:
            found.append(top_log_probs(lm.model, ROWS, POSITIONS, TOKENS, 250, input_ids=IDS))
            plain = log_probs_at(lm.model, ROWS, POSITIONS, TOKENS, input_ids=IDS)
        assert torch.equal(found[-1].log_probs, plain.log_probs)
        # A token that is asked for has the bits that it has among the likeliest.
        top = found[-1].top_ids[found[-1].place_of_token] == TOKENS[:, None]
        number, place = top.nonzero().unbind(1)
        assert len(number)
        assert torch.equal(
            found[-1].top_log_probs[found[-1].place_of_token[number], place], plain.log_probs[number]
        )
        assert torch.equal(found[-1].is_likeliest, found[-1].top_ids[found[-1].place_of_token, 0] == TOKENS)
    assert (found[0].top_log_probs - found[1].top_log_probs).abs().max() <= TOLERANCE


def test_in_bf16_equal_logits_are_ordered_by_id(tiny: Tiny) -> None:
    wanted = plain_log_probs(tiny("bloom"), torch.bfloat16)
    with slowllm.load(tiny("bloom"), dtype="bf16") as lm:
        found = top_log_probs(lm.model, ROWS, POSITIONS, TOKENS, VOCAB, input_ids=IDS)
    equal = found.top_log_probs[:, 1:] == found.top_log_probs[:, :-1]
    assert equal.any(), "bf16 has 256 numbers between powers of two"
    assert (found.top_ids[:, 1:] > found.top_ids[:, :-1])[equal].all()
    assert found.top_ids.sort().values.tolist() == [list(range(VOCAB))] * len(PLACES)
    assert (found.top_log_probs.exp().sum(-1) - 1).abs().max() <= TOLERANCE
    assert (wanted.gather(-1, found.top_ids) - found.top_log_probs).abs().max() <= 0.05


@pytest.mark.parametrize("num_top", [0, -1, VOCAB + 1])
def test_a_number_that_the_vocabulary_does_not_have_is_refused(num_top: int, tiny: Tiny) -> None:
    with (
        slowllm.load(tiny("bloom"), dtype="fp32") as lm,
        pytest.raises(InputError, match="ask for one at least, and no more than there are"),
    ):
        top_log_probs(lm.model, ROWS, POSITIONS, TOKENS, num_top, input_ids=IDS)


def test_without_tokens_nothing_is_likeliest(tiny: Tiny) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with slowllm.load(tiny("bloom"), dtype="fp32") as lm:
        found = top_log_probs(lm.model, none, none, none, 4, input_ids=IDS)
    assert [len(found.log_probs), len(found.places), *found.top_ids.shape] == [0, 0, 0, 4]
    assert found.top_log_probs.shape == (0, 4)


def test_a_token_beyond_the_vocabulary_is_refused(tiny: Tiny) -> None:
    with (
        slowllm.load(tiny("bloom"), dtype="fp32") as lm,
        pytest.raises(InputError, match="targets lie between 33 and 307, but there are 307 tokens"),
    ):
        top_log_probs(lm.model, ROWS[:1], POSITIONS[:2], TOKENS[:1].new_tensor([33, VOCAB]), 1, input_ids=IDS)
