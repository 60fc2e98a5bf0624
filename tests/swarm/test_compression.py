"""Each compression loses what it says, and refuses what it cannot carry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.errors import InputError, ProtocolError
from slowllm.options import COMPRESSIONS
from slowllm.swarm.compression import compress, restore, wire_bytes
from slowllm.swarm.messages import decode, encode


def through(tensor: Tensor, how: str) -> Tensor:
    """Return a tensor as it comes out of a message."""
    data = bytearray(b"".join(encode({}, {"hidden": tensor}, compression={"hidden": how})))
    return decode(data[8:])[1]["hidden"]


@st.composite
def rows(draw: st.DrawFn, largest: float = 3e38) -> Tensor:
    """Return (3, 4) float32 values of any magnitude up to the largest."""
    values = draw(st.lists(st.floats(-largest, largest), min_size=12, max_size=12))
    return torch.tensor(values, dtype=torch.float32).view(3, 4)


@given(rows())
def test_int8_loses_half_of_a_rows_scale(tensor: Tensor) -> None:
    found = through(tensor, "int8")
    largest = tensor.abs().amax(-1, keepdim=True).double()
    bound = (largest / 127 * (0.5 + 1e-4)).clamp_min(1.5e-36)
    assert bool(((found.double() - tensor.double()).abs() <= bound).all())


def test_float16_keeps_its_own_numbers() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    tensor = every[every.isfinite()].float()
    assert torch.equal(through(tensor, "float16"), tensor)


@given(rows(65000.0))
def test_float16_loses_two_to_the_minus_eleven(tensor: Tensor) -> None:
    error = (through(tensor, "float16") - tensor).abs()
    assert bool((error <= (tensor.abs() * 2**-11).clamp_min(2**-25)).all())


@given(rows())
def test_bfloat16_loses_two_to_the_minus_eight(tensor: Tensor) -> None:
    error = (through(tensor, "bfloat16").double() - tensor.double()).abs()
    assert bool((error <= (tensor.abs().double() * 2**-8).clamp_min(1e-38)).all())


@pytest.mark.parametrize("how", COMPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 7)])
def test_dtype_and_shape_come_back(how: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    found = through(tensor, how)
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.allclose(found.float(), tensor.float(), atol=0.05)
    if how == "none" or (how == str(dtype).removeprefix("torch.")):
        assert torch.equal(found, tensor)
    data = b"".join(encode({}, {"hidden": tensor}, compression={"hidden": how}))
    head = 16 + int.from_bytes(data[8:16], "little")
    assert wire_bytes({"hidden": tensor}, {"hidden": how}) == len(data) - head


def test_int8_rows_of_zeros_and_of_tiny_numbers_become_zeros() -> None:
    tensor = torch.tensor([[0.0, 0.0], [1e-40, -1e-41], [1.0, -0.5]])
    found = through(tensor, "int8")
    assert torch.equal(found[:2], torch.zeros(2, 2))
    assert found[2, 0] == 1.0


def test_int8_sends_a_quarter_of_the_bytes() -> None:
    tensor = torch.randn(64, 1024)
    assert sum(map(len, encode({}, {"a": tensor}, compression={"a": "int8"}))) < 0.26 * 4 * tensor.numel()


@pytest.mark.parametrize("how", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(how: str, value: float) -> None:
    with pytest.raises(ProtocolError, match="hidden has a NaN or an infinity, which cannot be sent as"):
        compress("hidden", torch.tensor([[1.0, value]]), how)


@pytest.mark.parametrize(
    ("tensor", "how"),
    [
        (torch.tensor([70000.0]), "float16"),
        (torch.tensor([torch.finfo(torch.float32).max]), "bfloat16"),
        (torch.tensor([65504.0], dtype=torch.float16), "bfloat16"),
        (torch.tensor([1e300], dtype=torch.float64), "int8"),
    ],
)
def test_what_would_become_infinite_is_refused(tensor: Tensor, how: str) -> None:
    with pytest.raises(ProtocolError, match=r"hidden has a value of magnitude .*, too large to be sent as"):
        compress("hidden", tensor, how)


def test_unknown_ways_and_tensors_that_are_not_floating_are_refused() -> None:
    with pytest.raises(
        InputError, match="compression 'zip' is unknown; use one of none, bfloat16, float16, int8"
    ):
        compress("hidden", torch.ones(1), "zip")
    with pytest.raises(InputError, match=r"positions of dtype torch\.int64 cannot be compressed"):
        compress("positions", torch.ones(1, dtype=torch.int64), "int8")
    with pytest.raises(ProtocolError, match="of the dtype 'int64', which is not a floating one"):
        restore("hidden", torch.ones(1, dtype=torch.int8), torch.ones(1), "int8", "int64")
