"""Messages come back as they were; whatever else arrives is refused with a ProtocolError and bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.errors import InputError, ProtocolError
from slowllm.storage.spans import TORCH_DTYPES
from slowllm.swarm.messages import (
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_META_BYTES,
    MAX_TENSORS,
    PREFIX_BYTES,
    body_bytes,
    decode,
    encode,
)
from tests.support.properties import num_examples

MIB = 1 << 20
DTYPES = sorted(TORCH_DTYPES.values(), key=str)


def joined(parts: list[bytes | memoryview]) -> bytearray:
    """Return a message's bytes without the first eight."""
    data = bytearray(b"".join(parts))
    assert body_bytes(bytes(data[:PREFIX_BYTES])) == len(data) - PREFIX_BYTES
    return data[PREFIX_BYTES:]


def message_of(header: object, data: bytes = b"") -> bytearray:
    """Return a message with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def header_of(tensors: dict[str, Any], meta: object = None, **other: object) -> dict[str, Any]:
    """Return a header that is right but for what is given."""
    said = {"protocol": 1, "meta": meta or {}, "compressed": {}, **other}
    return {"__metadata__": {"slowllm": json.dumps(said)}, **tensors}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """Return a header's entry for a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@st.composite
def any_tensor(draw: st.DrawFn) -> Tensor:
    """Return a tensor of any dtype and a small shape, with any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = int(torch.Size(shape).numel())
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype).view(
            shape
        )
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    return (torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, NaN for NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat, its = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return torch.equal(flat.view(torch.uint8), its.view(torch.uint8))


METAS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)  # fmt: skip


@given(
    METAS,
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), any_tensor(), max_size=4
    ),
)
def test_a_message_comes_back_with_the_same_bits(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    body = joined(encode(meta, tensors))
    said, found = decode(body)
    assert said == meta
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    by_library = safetensors.torch.load(bytes(body))
    assert all(same_bits(by_library[name], tensor) for name, tensor in tensors.items())


def test_tensors_are_views_of_what_was_received_and_of_what_is_sent() -> None:
    tensor = torch.arange(1024, dtype=torch.float32).view(4, 256)
    parts = encode({}, {"hidden": tensor})
    tensor[0, 0] = 7.0
    body = joined(parts)
    _, found = decode(body)
    assert found["hidden"][0, 0] == 7.0
    body[-4:] = torch.tensor(5.0).numpy().tobytes()
    assert found["hidden"][-1, -1] == 5.0


def test_tensors_with_strides_and_gradients_can_be_sent() -> None:
    tensor = torch.randn(3, 5, requires_grad=True)
    _, found = decode(joined(encode({}, {"turned": tensor.T, "one": torch.tensor(2.5)})))
    assert torch.equal(found["turned"], tensor.detach().T)
    assert found["one"].shape == ()


@given(st.binary(max_size=300))
@num_examples(300)
def test_any_bytes_are_refused_with_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@given(
    st.data(),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(-3, 3),
)
@num_examples(600)
def test_a_damaged_message_is_refused_or_read_as_the_library_reads_it(
    data: st.DataObject, flips: list[tuple[int, int]], shift: int
) -> None:
    tensors = {
        "hidden": torch.randn(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "short": torch.ones(3, dtype=torch.int16),
    }
    body = joined(
        encode(
            {"op": "step", "first": 3},
            tensors,
            compression=data.draw(st.sampled_from([{}, {"hidden": "int8"}])),
        )
    )
    for place, value in flips:
        # Most of the bytes that matter are in the first few hundred.
        body[place % len(body)] = value
    body = body[:shift] if shift < 0 else body + b"\0" * shift
    try:
        _, found = decode(body)
    except ProtocolError:
        return
    by_library = safetensors.torch.load(bytes(body))
    for name, tensor in found.items():
        if name != "hidden" or tensor.dtype is not torch.float32 or "scales:hidden" not in by_library:
            assert same_bits(by_library[name], tensor)


HEADER_BYTES = st.text(alphabet='{}[]":,0123456789.eE-+ \\u_abcdtypeshaof', max_size=200).map(str.encode)


@given(
    HEADER_BYTES
    | st.recursive(
        st.integers() | st.text(max_size=20),
        lambda s: st.lists(s) | st.dictionaries(st.text(max_size=9), s),
        max_leaves=20,
    ).map(lambda v: json.dumps(v).encode())
)
@num_examples(300)
def test_any_header_is_refused_with_a_protocol_error(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(message_of(text, bytes(64)))


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        (b"{}" + b" " * MAX_HEADER_BYTES, b"", "claims a header"),
        (b"[]", b"", "has no header"),
        (b"{" + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":' * 20 + b"1" + b"}" * 20, b"", "nested more than 12"),
        (b'{"a":1,"a":2}', b"", "stands twice"),
        (b'{"a":NaN}', b"", "NaN is not JSON"),
        (b'{"a":1e999}', b"", "out of range"),
        (b'{"a":' + b"9" * 30 + b"}", b"", "out of range"),
        (b'{"a":"\\ud800"}', b"", "surrogates not allowed"),
        ({}, b"", "no metadata with the one key slowllm"),
        ({"__metadata__": {"slowllm": "{}", "x": "y"}}, b"", "no metadata with the one key"),
        ({"__metadata__": {"slowllm": 5}}, b"", "metadata is not a string"),
        ({"__metadata__": {"slowllm": "[]"}}, b"", "not a JSON object"),
        ({"__metadata__": {"slowllm": '{"protocol": 2}'}}, b"", "speaks protocol 2, and this slowllm protocol 1"),
        ({"__metadata__": {"slowllm": '{"protocol": 1}'}}, b"", "lacks meta or compressed"),
        ({"__metadata__": {"slowllm": "x" * (MAX_META_BYTES + 1)}}, b"", "more than the 65,536 allowed"),
        (header_of({"a": []}), b"", "is not described by"),
        (header_of({"": entry("F32", [], 0, 4)}), bytes(4), "is not described by"),
        (header_of({"a": {**entry("F32", [], 0, 4), "more": 1}}), bytes(4), "is not described by"),
        (header_of({"a": entry("C64", [1], 0, 8)}), bytes(8), "unknown dtype 'C64'"),
        (header_of({"a": entry("F32", [-1], 0, 4)}), bytes(4), "impossible shape"),
        (header_of({"a": entry("F32", [1.0], 0, 4)}), bytes(4), "impossible shape"),  # type: ignore[list-item]
        (header_of({"a": entry("F32", [1] * 9, 0, 4)}), bytes(4), "impossible shape"),
        (header_of({"a": entry("F32", [0, 1 << 40, 1 << 40], 0, 0)}), b"", "impossible shape"),
        (header_of({"a": {**entry("F32", [1], 0, 4), "data_offsets": [0]}}), bytes(4), "impossible data_offsets"),
        (header_of({"a": entry("F32", [2], 0, 4)}), bytes(4), "does not fill the bytes"),
        (header_of({"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}), bytes(5), "not aligned"),
        (header_of({"a": entry("F32", [1], 4, 8)}), bytes(8), "begins at byte 4 of the tensors, not at 0"),
        (header_of({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}), bytes(4), "begins at byte 0"),
        (header_of({"a": entry("F32", [1], 0, 4)}), bytes(8), "the message has 8 of them"),
        (header_of({"a": entry("F32", [2], 0, 8)}), bytes(4), "ends behind the message's end"),
        (header_of({"a": entry("BOOL", [1], 0, 1)}), b"\2", "other than 0 and 1"),
        (header_of({str(n): entry("U8", [0], 0, 0) for n in range(MAX_TENSORS + 1)}), b"", "1025 tensors"),
        (header_of({}, compressed={"a": ["int8", "float32"]}), b"", "not how, or it is not there"),
        (header_of({"a": entry("I8", [1], 0, 1)}, compressed={"a": "int8"}), b"\1", "not how, or it is not there"),
        (header_of({"a": entry("I8", [1], 0, 1)}, compressed={"a": ["int8", "int64"]}), b"\1", "not a floating one"),
        (header_of({"a": entry("I8", [1], 0, 1)}, compressed={"a": ["zip", "float32"]}), b"\1", "unknown way 'zip'"),
        (header_of({"a": entry("I8", [1], 0, 1)}, compressed={"a": ["int8", "float32"]}), b"\1", "no scales"),
        (header_of({"a": entry("I8", [4], 0, 4)}, compressed={"a": ["float16", "float32"]}), bytes(4), "has the dtype torch.int8"),
        (header_of({"scales:a": entry("F32", [2], 0, 8), "a": entry("I8", [4], 8, 12)}, compressed={"a": ["int8", "float32"]}), bytes(12), r"scales of shape \[2\], not \[1\]"),
        (header_of({"scales:a": entry("F32", [1], 0, 4), "a": entry("I8", [4], 4, 8)}, compressed={"a": ["int8", "float32"]}), b"\0\0\x80\x7f" + bytes(4), "negative or not finite"),
        (header_of({"scales:a": entry("F32", [1], 0, 4), "a": entry("I8", [4], 4, 8)}, compressed={"a": ["int8", "float32"], "scales:a": ["float16", "float32"]}), bytes(8), "scales of another tensor"),
    ],
)  # fmt: skip
def test_each_fault_of_a_message_is_named(header: object, data: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode(message_of(header, data))


@pytest.mark.parametrize("length", [0, 7, 8])
def test_a_message_without_a_header_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match="has no header"):
        decode(bytes(length))


def test_a_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ProtocolError, match="claims 268,435,457 bytes, more than the 268,435,456 allowed"):
        body_bytes((MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"))


@pytest.mark.parametrize(
    "body",
    [
        message_of(b"{" + b'"a":[' * 40_000),
        message_of(b'{"a":[' + b"[]," * 80_000 + b"[]]}"),
        message_of(b'{"a":[' + b'"ab",' * 50_000 + b'""]}'),
        message_of({"__metadata__": {"slowllm": '{"meta":[' + "{}," * 21_000 + "{}]}"}}),
        message_of(header_of({"a": entry("I8", [1 << 20], 0, 1 << 20)}, compressed={"a": ["int8", "float64"]}), bytes(MIB)),
        message_of(header_of({"a": entry("F64", [0, 1 << 61], 0, 0)})),
    ],
)  # fmt: skip
def test_a_hostile_message_is_refused_within_sixteen_mebibytes(body: bytearray) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(body, max_bytes=4 * MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB


def test_what_takes_too_much_when_restored_is_refused() -> None:
    body = joined(
        encode({}, {"hidden": torch.ones(1000, dtype=torch.float64)}, compression={"hidden": "int8"})
    )
    assert len(body) < 2000
    with pytest.raises(ProtocolError, match="has 8,000 bytes when restored, more than the 2,000 allowed"):
        decode(body, max_bytes=2000)


@pytest.mark.parametrize(
    ("meta", "tensors", "options", "match"),
    [
        ({"a": float("nan")}, {}, {}, "cannot be written as JSON"),
        ({"a": {1: 2}}, {}, {}, "a name is not a string"),
        ({"a": object()}, {}, {}, "cannot be written as JSON"),
        ({"a": "x" * MAX_META_BYTES}, {}, {}, "more than the 65,536 allowed"),
        ({}, {"c": torch.ones(1, dtype=torch.complex64)}, {}, "complex64, which a message cannot carry"),
        ({}, {"c": torch.ones([1] * 9)}, {}, "more than 8 dimensions"),
        ({}, {"n" * 300: torch.ones(1)}, {}, "a name of more than 256 letters"),
        ({}, {str(n): torch.ones(1) for n in range(1025)}, {}, "1025 tensors, more than the 1024"),
        ({}, {"n" * 250 + str(n): torch.ones(1) for n in range(1000)}, {}, "the message's header has"),
        ({}, {"a": torch.ones(1000)}, {"max_bytes": 4000}, r"has 4,\d\d\d bytes, more than the 4,000 that the peer takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_is_named(meta: Any, tensors: Any, options: Any, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        encode(meta, tensors, **options)


def test_a_compression_of_a_tensor_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="gradient is to be compressed but is none of the tensors hidden"):
        encode({}, {"hidden": torch.ones(1)}, compression={"gradient": "int8"})
