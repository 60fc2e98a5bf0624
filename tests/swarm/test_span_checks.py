"""What a server refuses before it computes, and the numbers that it does not take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slowllm.errors import BusyError, InputError, LimitError, NonFiniteError
from slowllm.modeling.span import SpanCall
from slowllm.swarm.messages import encode
from slowllm.swarm.span_checks import (
    ServedSpan,
    check_answer,
    check_request,
    check_sent,
    tokens_of,
    waiting_tokens,
)
from slowllm.swarm.span_messages import compressible, pack_outputs

WIDTH = 64
SERVED = ServedSpan(
    2, 6, max_batch_tokens=20, max_length=15, max_waiting_tokens=80, cache_tokens=100, session_seconds=60,
    max_answer_bytes=1 << 20,
)  # fmt: skip
CALL = SpanCall(2, 5, torch.randn(2, 5, WIDTH))
NAN, INFINITY = float("nan"), float("inf")


def check(call: SpanCall, served: ServedSpan = SERVED, *, wants_grad: bool = False) -> None:
    check_request(call, tokens_of(call), served, (WIDTH,), wants_grad=wants_grad)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (replace(CALL, first=1), "blocks 1:5 are not served here; this server has 2:6"),
        (replace(CALL, end=7), "blocks 2:7 are not served here"),
        (
            replace(CALL, hidden=torch.zeros(2, 5, 63)),
            r"of shape \[2, 5, 63\] are no \(rows, positions, 64\)",
        ),
        (replace(CALL, hidden=torch.zeros(3, 7, WIDTH)), "a request of 21 tokens is longer than the 20 that"),
        (replace(CALL, length=11), "a sequence of 16 tokens is longer than the 15 that this server takes"),
    ],
)
def test_what_is_not_served_is_refused(call: SpanCall, match: str) -> None:
    check(CALL)
    with pytest.raises((InputError, LimitError, BusyError), match=match):
        check(call)


def test_why_there_are_no_gradients_is_said() -> None:
    check(CALL, wants_grad=True)
    with pytest.raises(
        LimitError, match="computes no gradients: it was started with --forward-only"
    ) as caught:
        check(CALL, replace(SERVED, no_backward="it was started with --forward-only"), wants_grad=True)
    assert "parts" not in str(caught.value)


@pytest.mark.parametrize("compression", ["none", "bfloat16", "float16", "int8"])
def test_an_answer_that_does_not_fit_a_message_is_refused_and_every_other_one_fits(compression: str) -> None:
    call = replace(CALL, returns_all=True)
    answer = pack_outputs(dict.fromkeys(range(2, 5), CALL.hidden))
    parts = encode({}, answer, compression=dict.fromkeys(compressible(answer), compression))
    needed = sum(map(len, parts)) + (256 << 10)
    check_answer([call], replace(SERVED, max_answer_bytes=needed), compression)
    with pytest.raises(
        LimitError,
        match=r"the hidden states behind 3 blocks for 10 tokens have .* bytes, more than the .* of an answer; ask for fewer",
    ):
        check_answer([call], replace(SERVED, max_answer_bytes=needed - (258 << 10)), compression)


def test_an_answer_with_several_outputs_counts_for_each_of_them_while_it_waits() -> None:
    assert waiting_tokens(CALL) == 10
    assert waiting_tokens(replace(CALL, returns_all=True)) == 30


@pytest.mark.parametrize(("value", "what"), [(NAN, "NaN"), (INFINITY, "infinity"), (-INFINITY, "infinity")])
def test_what_is_no_number_is_named_and_not_blamed_on_the_weights(value: float, what: str) -> None:
    wrong = CALL.hidden.clone()
    wrong[1, 3, 5] = value
    with pytest.raises(
        NonFiniteError, match=rf"^hidden: {what} at position \[1, 3\] in what the client sent"
    ):
        check_sent(replace(CALL, hidden=wrong))
    vectors = torch.full((2, WIDTH), value)
    with pytest.raises(NonFiniteError, match=rf"^vectors\.3: {what} in what the client sent"):
        check_sent(replace(CALL, vectors={3: vectors}))
    pair = torch.zeros(2, 2, 4, 4), torch.full((2, 2, 4, 4), value)
    with pytest.raises(NonFiniteError, match=rf"^values\.4: {what} in what the client sent"):
        check_sent(replace(CALL, pairs={4: pair}))


def test_padding_may_hold_anything_and_large_numbers_are_numbers() -> None:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:7] = 0
    wrong = CALL.hidden.clone()
    wrong[1, :3] = NAN
    check_sent(replace(CALL, hidden=wrong, mask=mask, length=4))
    wrong[1, 3] = NAN
    with pytest.raises(NonFiniteError, match=r"at position \[1, 3\]"):
        check_sent(replace(CALL, hidden=wrong, mask=mask, length=4))
    check_sent(replace(CALL, hidden=torch.full((2, 5, WIDTH), 3e38)))
