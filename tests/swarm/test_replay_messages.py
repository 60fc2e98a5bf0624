"""Sessions that are filled anew, as messages: what is packed is what is unpacked, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slowllm.errors import ProtocolError
from slowllm.modeling.cache_labels import Move
from slowllm.modeling.span import SpanCall
from slowllm.swarm.messages import encode
from slowllm.swarm.replay_messages import (
    MAX_CALLS,
    ReplayRequest,
    pack_replay,
    pack_replayed,
    unpack_replay,
    unpack_replayed,
    windows,
)
from slowllm.swarm.span_messages import compressible
from tests.swarm.test_span_messages import assert_same, sent

F32 = torch.float32


def steps(number: int, width: int = 4) -> list[SpanCall]:
    """Return the calls of a session of two rows that begins with three tokens and takes one more each."""
    calls = [SpanCall(1, 4, torch.randn(2, 3, width))]
    for length in range(3, 2 + number):
        moves = dict.fromkeys((1, 2, 3), Move(length, torch.tensor([1, 0])))
        mask = torch.ones(2, length + 1, dtype=torch.int64)
        calls.append(SpanCall(1, 4, torch.randn(2, 1, width), mask, length=length, moves=moves))
    return calls


def test_what_is_packed_is_unpacked() -> None:
    asked = ReplayRequest(steps(4), "session", 2, returns=False)
    found = unpack_replay(*sent(*pack_replay(asked)), F32)
    assert (found.session, found.step, found.returns) == ("session", 2, False)
    assert_same(tuple(vars(call) for call in found.calls), tuple(vars(call) for call in asked.calls))


def test_outputs_are_unpacked_and_may_be_compressed() -> None:
    calls = steps(3)
    outputs = [{call.end - 1: torch.randn_like(call.hidden)} for call in calls]
    tensors = pack_replayed(outputs)
    assert compressible(tensors) == ["0/hidden", "1/hidden", "2/hidden"]
    assert compressible(pack_replay(ReplayRequest(calls, "s"))[1]) == ["0/hidden", "1/hidden", "2/hidden"]
    assert_same(tuple(unpack_replayed(sent({}, tensors)[1], calls)), tuple(outputs))
    with pytest.raises(ProtocolError, match="lacks the hidden states of passage 2"):
        unpack_replayed({name: tensors[name] for name in ("0/hidden", "1/hidden")}, calls)
    with pytest.raises(
        ProtocolError, match=r"passage 0 as float32 \[2, 1, 4\], but what was sent is float32 \[2, 3, 4\]"
    ):
        unpack_replayed({**tensors, "0/hidden": tensors["1/hidden"]}, calls)
    with pytest.raises(ProtocolError, match="NaN or infinity in the hidden states of passage 2"):
        unpack_replayed({**tensors, "2/hidden": tensors["2/hidden"] / 0}, calls)


@pytest.mark.parametrize(
    ("number", "max_tokens", "largest"), [(700, 10_000, MAX_CALLS), (20, 16, 8), (5, 1, 1), (1, 100, 1)]
)
def test_windows_have_all_calls_in_order_and_fit_a_message(
    number: int, max_tokens: int, largest: int
) -> None:
    calls = steps(number)
    pieces = list(windows(calls, max_tokens))
    assert [id(call) for piece in pieces for call in piece] == [id(call) for call in calls]
    assert max(map(len, pieces)) == largest
    for piece in pieces:
        assert len(piece) == 1 or sum(call.hidden[..., 0].numel() for call in piece) <= max_tokens
        encode(*pack_replay(ReplayRequest(piece, "s" * 64, 1 << 20)))


def test_windows_of_calls_that_say_much_fit_a_message() -> None:
    move = dict.fromkeys(range(100), Move(2))
    calls = [SpanCall(0, 100, torch.zeros(1, 1, 1), length=3, moves=move) for _ in range(300)]
    pieces = list(windows(calls, 1 << 20))
    assert sum(map(len, pieces)) == 300
    for piece in pieces:
        encode(*pack_replay(ReplayRequest(piece, "s" * 64, 1 << 20)))


def with_meta(**fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda meta, tensors: meta.update(fields)


def with_call(**fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda meta, tensors: meta["calls"][1].update(fields)


def with_tensor(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda meta, tensors: tensors.update({name: torch.zeros(2, 1, 4)})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (with_meta(calls="none"), "no list of 1 to 128 calls"),
        (with_meta(calls=[]), "no list of 1 to 128 calls"),
        (with_meta(calls=[{}] * 129), "no list of 1 to 128 calls"),
        (with_meta(session=None), "names no session and step"),
        (with_meta(session="s" * 65), "names no session and step"),
        (with_meta(step=-1), "names no session and step"),
        (with_meta(step=True), "names no session and step"),
        (with_meta(returns="yes"), "does not say whether"),
        (with_call(op="backward"), "no passage forward"),
        (with_call(session="other"), "no passage forward"),
        (with_meta(calls=[1, 2, 3]), "no passage forward"),
        (with_call(keeps_everything=True), "of different spans or caches"),
        (with_call(length=9), "mask has the shape"),
        (with_tensor("hidden"), "belongs to none of its calls"),
        (with_tensor("3/hidden"), "belongs to none of its calls"),
        (with_tensor("01/hidden"), "belongs to none of its calls"),
        (with_tensor("1/noise"), "unknown tensor"),
    ],
)
def test_damaged_replays_are_refused(
    damage: Callable[[dict[str, Any], dict[str, Tensor]], None], sentence: str
) -> None:
    meta, tensors = pack_replay(ReplayRequest(steps(3), "session"))
    damage(meta, tensors)
    with pytest.raises(ProtocolError, match=sentence):
        unpack_replay(*sent(meta, tensors), F32)
