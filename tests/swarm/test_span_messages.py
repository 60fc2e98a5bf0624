"""The calls of spans as messages: what is packed is what is unpacked, and what does not fit is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.errors import ProtocolError, UnsupportedError
from slowllm.modeling.cache_labels import Move
from slowllm.modeling.span import SpanCall, SpanGrads
from slowllm.swarm.messages import PREFIX_BYTES, decode, encode
from slowllm.swarm.span_messages import (
    SpanRequest,
    compressible,
    pack_grads,
    pack_outputs,
    pack_request,
    unpack_grads,
    unpack_outputs,
    unpack_request,
)

F32 = torch.float32


def sent(meta: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what arrives of a message."""
    return decode(b"".join(map(bytes, encode(meta, tensors)))[PREFIX_BYTES:])


def whole_request() -> SpanRequest:
    """Return a request with everything in it."""
    move = Move(4, torch.tensor([1, 0]))
    call = SpanCall(
        2, 5, torch.randn(2, 3, 8), torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 2), torch.arange(3)[None], 4,
        {3: torch.randn(2, 8), 4: torch.randn(2, 2, 8)}, {2: (torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4))},
        {2: move, 3: move, 4: Move(2, torch.zeros(2, 2).long(), torch.ones(2, 2).long())},
        records_past=True, keeps_everything=True,
    )  # fmt: skip
    return SpanRequest(call, "session", 7)


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, tuple):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif hasattr(left, "__dataclass_fields__"):
        for name in left.__dataclass_fields__:
            assert_same(getattr(left, name), getattr(right, name))
    else:
        assert left == right


def test_a_request_arrives_as_it_was_sent() -> None:
    request = whole_request()
    assert_same(request, unpack_request(*sent(*pack_request(request)), F32))


def test_blocks_with_the_same_move_share_its_tensors() -> None:
    _, tensors = pack_request(whole_request())
    assert sorted(name for name in tensors if name.startswith("rows.")) == ["rows.0", "rows.1"]


def test_a_backward_request_arrives_as_it_was_sent() -> None:
    hidden = torch.randn(2, 3, 8)
    request = SpanRequest(SpanCall(0, 2, hidden, returns_all=True), grads={0: hidden * 2, 1: hidden * 3})
    assert_same(request, unpack_request(*sent(*pack_request(request)), F32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32, torch.float32])
def test_a_mask_keeps_its_dtype(dtype: torch.dtype) -> None:
    call = SpanCall(0, 1, torch.randn(1, 2, 4), torch.tensor([[0, 1]]).to(dtype))
    back = unpack_request(*sent(*pack_request(SpanRequest(call))), F32).call.mask
    assert back is not None
    assert back.dtype == dtype
    assert back.tolist() == call.mask.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("values", [[0.0, 0.5], [1, -1], [1, 300], [1, 256]])
def test_a_mask_that_a_byte_cannot_hold_is_not_sent(values: list[float]) -> None:
    call = SpanCall(0, 1, torch.randn(1, 2, 4), torch.tensor([values]))
    with pytest.raises(UnsupportedError, match="other values than 0 and 1"):
        pack_request(SpanRequest(call))


def test_hidden_states_and_gradients_may_be_compressed_and_nothing_else() -> None:
    names = {"hidden", "hidden.3", "grad.4", "mask", "positions", "vectors.2", "keys.1", "rows.0"}
    assert set(compressible(dict.fromkeys(names, torch.zeros(1)))) == {"hidden", "hidden.3", "grad.4"}


def test_outputs_and_gradients_arrive_as_they_were_sent() -> None:
    call = whole_request().call
    outputs = {4: torch.randn(2, 3, 8)}
    assert_same(outputs, unpack_outputs(sent({}, pack_outputs(outputs))[1], call))
    grads = SpanGrads(torch.randn(2, 3, 8), {3: torch.randn(2, 8)}, {2: (torch.randn(2, 2, 4, 4), None)})
    assert_same(grads, unpack_grads(sent({}, pack_grads(grads))[1], call))


def test_an_answer_that_lacks_hidden_states_is_refused() -> None:
    with pytest.raises(ProtocolError, match="lacks the hidden states behind block 4"):
        unpack_outputs({}, whole_request().call)


def test_a_gradient_of_another_shape_is_refused() -> None:
    call = whole_request().call
    with pytest.raises(ProtocolError, match=r"gradient hidden is float32 \[1\], not float32 \[2, 3, 8\]"):
        unpack_grads({"hidden": torch.zeros(1)}, call)
    with pytest.raises(ProtocolError, match="gradient hidden is float64"):
        unpack_grads({"hidden": torch.zeros(2, 3, 8, dtype=torch.float64)}, call)
    with pytest.raises(ProtocolError, match="lacks the gradient of the hidden states"):
        unpack_grads({}, call)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 9), (2, 3, 8, 1), (1, 3, 8)])
def test_hidden_states_of_another_shape_are_no_answer(shape: tuple[int, ...]) -> None:
    call = whole_request().call
    with pytest.raises(
        ProtocolError, match=r"behind block 4 as float32 .*, but what was sent is float32 \[2, 3, 8\]"
    ):
        unpack_outputs({"hidden.4": torch.zeros(shape)}, call)


def test_a_request_without_a_session_has_no_past_and_a_backward_has_no_session() -> None:
    meta, tensors = pack_request(SpanRequest(SpanCall(0, 1, torch.randn(1, 2, 4), length=5)))
    with pytest.raises(ProtocolError, match="without a session continues 5 positions"):
        unpack_request(*sent(meta, tensors), F32)
    assert unpack_request(*sent(meta, tensors), F32, is_replayed=True).call.length == 5
    meta, tensors = pack_request(
        SpanRequest(SpanCall(0, 1, torch.randn(1, 2, 4)), grads={0: torch.randn(1, 2, 4)})
    )
    with pytest.raises(ProtocolError, match="a backward request names a session"):
        unpack_request(*sent({**meta, "session": "s", "step": 0}, tensors), F32)


def test_a_mask_of_other_bytes_is_refused() -> None:
    meta, tensors = pack_request(SpanRequest(SpanCall(0, 1, torch.randn(1, 2, 4), torch.ones(1, 2).long())))
    with pytest.raises(ProtocolError, match="mask has other values than 0 and 1"):
        unpack_request(*sent(meta, {**tensors, "mask": tensors["mask"] * 7}), F32)


FAULTS: list[tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = [
    ("no blocks", lambda meta, _: meta.update(first=5), "empty span of blocks 5:5"),
    ("first is text", lambda meta, _: meta.update(first="2"), "first is no number"),
    ("huge length", lambda meta, _: meta.update(length=1 << 40), "length is no number"),
    ("flag is text", lambda meta, _: meta.update(returns_all="yes"), "returns_all is neither"),
    ("session is a list", lambda meta, _: meta.update(session=[]), "session is no name"),
    ("no hidden", lambda _, tensors: tensors.pop("hidden"), "has no hidden states"),  # type: ignore[list-item,return-value]
    ("flat hidden", lambda _, tensors: tensors.update(hidden=torch.zeros(4)), "has no hidden states"),
    ("other dtype", lambda _, tensors: tensors.update(hidden=torch.zeros(2, 3, 8).half()), "has the dtype float16"),
    ("mask of one row", lambda _, tensors: tensors.update(mask=torch.zeros(1, 7).byte()), "mask has the shape"),
    ("short mask", lambda _, tensors: tensors.update(mask=torch.zeros(2, 2).byte()), "mask has the shape"),
    ("mask of halves", lambda meta, _: meta.update(mask_dtype="float16"), "mask_dtype is none of"),
    ("positions", lambda _, tensors: tensors.update(positions=torch.zeros(2, 9).long()), "positions have the shape"),
    ("vectors outside", lambda _, tensors: tensors.update({"vectors.9": torch.zeros(2, 8)}), "vectors for blocks outside"),
    ("wide vectors", lambda _, tensors: tensors.update({"vectors.3": torch.zeros(2, 9)}), "vectors.3 has the shape"),
    ("keys alone", lambda _, tensors: tensors.update({"keys.3": torch.zeros(2, 2, 4, 4)}), "no keys and values"),
    ("keys of a row", lambda _, tensors: tensors.update(
        {"keys.2": torch.zeros(1, 2, 4, 4), "values.2": torch.zeros(1, 2, 4, 4)}), "has 1 rows, but there are 2"),
    ("long mask", lambda _, tensors: tensors.update(mask=torch.zeros(2, 80).byte()), "mask has the shape"),
    ("many kinds of positions", lambda _, tensors: tensors.update(positions=torch.zeros(99, 1, 3).long()), "are none from 0"),
    ("deep positions", lambda _, tensors: tensors.update(positions=torch.zeros(9, 1, 1, 3).long()), "positions have the shape"),
    ("negative positions", lambda _, tensors: tensors.update(positions=torch.full((1, 3), -1)), "are none from 0"),
    ("huge positions", lambda _, tensors: tensors.update(positions=torch.full((1, 3), 1 << 62)), "are none from 0"),
    ("number with a zero", lambda _, tensors: tensors.update({"vectors.03": torch.zeros(2, 8)}), "blocks outside"),
    ("foreign digit", lambda _, tensors: tensors.update({"vectors.\u0663": torch.zeros(2, 8)}), "blocks outside"),
    ("rows again and again", lambda _, tensors: tensors.update({"rows.0": torch.zeros(4000).long()}), "do not fit each other"),
    ("move beyond the past", lambda meta, _: meta.update(moves=[[5, [2]]]), "names no length and blocks"),
    ("moves are text", lambda meta, _: meta.update(moves="all"), "moves are no list"),
    ("move elsewhere", lambda meta, _: meta.update(moves=[[1, [9]]]), "names no length and blocks"),
    ("odd move", lambda _, tensors: tensors.update({"positions.0": torch.zeros(3, 3).long()}), "do not fit each other"),
    ("unknown tensor", lambda _, tensors: tensors.update(extra=torch.zeros(1)), "unknown tensor 'extra'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_a_request_that_does_not_fit_is_refused(change: Callable[..., Any], why: str) -> None:
    meta, tensors = pack_request(whole_request())
    change(meta, tensors)
    with pytest.raises(ProtocolError, match=why):
        unpack_request(meta, tensors, F32)


def test_a_backward_request_needs_gradients_of_its_outputs() -> None:
    hidden = torch.randn(1, 2, 4)
    meta, tensors = pack_request(SpanRequest(SpanCall(0, 2, hidden), grads={1: hidden}))
    for name, shape, why in (
        ("grad.0", (1, 2, 4), "no gradients of its outputs"),
        ("grad.1", (1, 2, 5), "has the shape"),
    ):
        others = {key: tensor for key, tensor in tensors.items() if key != "grad.1"}
        with pytest.raises(ProtocolError, match=why):
            unpack_request(meta, {**others, name: torch.zeros(shape)}, F32)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
tensors_of_any_kind = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bfloat16]),
)


@given(
    st.dictionaries(
        st.sampled_from(["first", "end", "length", "session", "step", "moves", "mask_dtype", "op"]),
        json_values,
    ),
    st.dictionaries(
        st.sampled_from(
            [
                "hidden",
                "mask",
                "positions",
                "vectors.3",
                "keys.2",
                "values.2",
                "rows.0",
                "positions.0",
                "grad.4",
            ]
        ),
        tensors_of_any_kind,
    ),
)
def test_any_message_is_a_request_or_refused(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    whole_meta, whole_tensors = pack_request(whole_request())
    with contextlib.suppress(ProtocolError):
        unpack_request({**whole_meta, **meta}, {**whole_tensors, **tensors}, F32)
