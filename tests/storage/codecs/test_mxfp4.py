"""Experts in mxfp4 are decoded to the bits of transformers' dequantisation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from slowllm.storage.codecs import mxfp4, torch_kernels
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import Team
from tests.support.properties import num_examples
from tests.support.same_numbers import same_numbers

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(2)
    yield made
    made.close()


def parts_of(experts: int, rows: int, blocks: int, seed: int = 0) -> Parts:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, rows, blocks, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(0, 256, (experts, rows, blocks), generator=draw, dtype=torch.uint8)
    return Parts({"codes": codes, "scales": scales}, experts * blocks * 32, rows)


def wanted_of(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    arrays = parts.arrays
    whole: torch.Tensor = convert_moe_packed_tensors(arrays["codes"], arrays["scales"], dtype=dtype)
    return whole.view(-1, parts.width)


def decoded(parts: Parts, first: int, last: int, dtype: torch.dtype, team: Team) -> torch.Tensor:
    out = torch.full((last - first, parts.width), 7.0, dtype=dtype)
    CODECS["mxfp4"].decode(parts, out, first, last, team)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale_is_the_number_of_transformers(dtype: torch.dtype, team: Team) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    parts = Parts({"codes": codes, "scales": scales}, 512, 256)
    assert same_numbers(decoded(parts, 0, 512, dtype, team), wanted_of(parts, dtype))


@num_examples(40)
@given(
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 3),
    st.tuples(st.integers(0, 287), st.integers(1, 288)),
    st.integers(0, 1000),
)
def test_any_rows_are_those_of_transformers(
    experts: int, rows: int, blocks: int, cut: tuple[int, int], seed: int
) -> None:
    parts = parts_of(experts, rows, blocks, seed)
    first = cut[0] % parts.num_rows
    last = min(parts.num_rows, first + cut[1])
    team = Team(1)
    for dtype in DTYPES:
        wanted = wanted_of(parts, dtype)[first:last]
        assert same_numbers(decoded(parts, first, last, dtype, team), wanted)
        assert same_numbers(mxfp4.decode_rows(parts, first, last, dtype), wanted)
        on_device = torch.empty_like(wanted)
        torch_kernels.decode("mxfp4", parts, on_device, first, last)
        assert same_numbers(on_device, wanted)
    team.close()


def test_arrays_may_begin_at_any_address(team: Team) -> None:
    parts = parts_of(2, 40, 2)
    wanted = decoded(parts, 3, 90, torch.bfloat16, team)
    for shift in (1, 2, 3):
        moved = {}
        for name, array in parts.arrays.items():
            memory = torch.empty(array.numel() + shift, dtype=torch.uint8)
            moved[name] = memory[shift:].view(array.shape).copy_(array)
        found = decoded(Parts(moved, parts.num_rows, parts.width), 3, 90, torch.bfloat16, team)
        assert same_numbers(found, wanted)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_without_a_compiler_the_bits_are_the_same(
    dtype: torch.dtype, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(2, 40, 2)
    compiled = decoded(parts, 5, 100, dtype, team)
    monkeypatch.setattr(mxfp4, "IS_COMPILED", False)
    assert same_numbers(decoded(parts, 5, 100, dtype, team), compiled)
    assert not len(decoded(parts, 5, 5, dtype, team))


def test_arrays_that_do_not_make_the_experts_are_not_taken() -> None:
    codec = CODECS["mxfp4"]
    good = {"codes": ("U8", (2, 5, 3, 16)), "scales": ("U8", (2, 5, 3))}
    assert codec.has_parts(good, 192, 5)
    assert not codec.has_parts(good, 96, 5)
    assert not codec.has_parts(good, 192, 6)
    assert not codec.has_parts(good, 192, 5, (32,))
    assert not codec.has_parts({**good, "scales": ("F32", (2, 5, 3))}, 192, 5)
    assert not codec.has_parts({**good, "codes": ("U8", (2, 5, 3, 8))}, 192, 5)
    assert not codec.has_parts({"codes": good["codes"]}, 192, 5)
