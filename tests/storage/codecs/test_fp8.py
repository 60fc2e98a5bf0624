"""Float8 is decoded to the numbers that torch says its bits are, times the scale, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.storage.codecs import fp8, fp8_kernels, torch_kernels
from slowllm.storage.codecs.base import Parts, bits_of
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import Team
from tests.support.properties import num_examples

SPECIAL = [0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"), 448.0, 2.0**-126]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(2)
    yield made
    made.close()


def parts_of(
    rows: int, width: int, group: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Parts:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, width), generator=draw, dtype=torch.uint8)
    grid = (-(-rows // group[0]), -(-width // group[1]))
    scales = torch.randn(grid, generator=draw).mul_(3).exp_()
    for place in range(min(scales.numel(), 3)):
        scales.view(-1)[int(torch.randint(0, scales.numel(), (1,), generator=draw))] = SPECIAL[
            (seed + place) % 8
        ]
    if dtype == torch.uint8:
        scales = torch.randint(0, 256, grid, generator=draw).float()
    return Parts({"scales": scales.to(dtype), "codes": codes}, rows, width, group)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether numbers are equal, signs of zeros included, and NaN where NaN is."""
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())


def decoded(parts: Parts, first: int, last: int, dtype: torch.dtype, team: Team) -> torch.Tensor:
    out = torch.full((last - first, parts.width), 7.0, dtype=dtype)
    CODECS["fp8"].decode(parts, out, first, last, team)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_is_the_number_that_torch_says(dtype: torch.dtype, team: Team) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    for scale in (1.0, *SPECIAL):
        parts = Parts({"scales": torch.full((1, 1), scale), "codes": codes}, 4, 64, (4, 64))
        wanted = (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)
        assert same(decoded(parts, 0, 4, dtype, team), wanted)


@num_examples(60)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.tuples(st.integers(1, 50), st.integers(1, 320)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8]),
    st.tuples(st.integers(0, 39), st.integers(1, 40)),
    st.integers(0, 1000),
)
def test_any_rows_of_any_blocks_are_those_of_torchs_operations(
    rows: int, width: int, group: tuple[int, int], dtype: torch.dtype, cut: tuple[int, int], seed: int
) -> None:
    parts = parts_of(rows, width, group, seed, dtype)
    first = cut[0] % rows
    last = min(rows, first + cut[1])
    team = Team(1)
    for out in (torch.float32, torch.bfloat16):
        wanted = fp8.decode_rows(parts, first, last, out)
        assert same(decoded(parts, first, last, out, team), wanted)
        on_device = torch.empty_like(wanted)
        torch_kernels.decode("fp8", parts, on_device, first, last)
        assert same(on_device, wanted)
    team.close()


def test_a_scale_that_is_any_nan_makes_nan(team: Team) -> None:
    for bits in (0x7FFFFFFF, 0x7F800001, -1):
        scales = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
        parts = Parts({"scales": scales, "codes": torch.ones(1, 4, dtype=torch.uint8)}, 1, 4, (1, 4))
        assert decoded(parts, 0, 1, torch.bfloat16, team).isnan().all()


@pytest.mark.parametrize("columns", [1, 128, 700, 2048, 2049, 5000, 9000])
def test_rows_longer_than_a_piece_are_decoded_as_others(columns: int, team: Team) -> None:
    parts = parts_of(5, 8777, (2, columns), columns)
    wanted = fp8.decode_rows(parts, 0, 5, torch.bfloat16)
    assert same(decoded(parts, 0, 5, torch.bfloat16, team), wanted)


def test_columns_may_have_scales_of_their_own(team: Team) -> None:
    parts = parts_of(12, 300, (4, 1), 3)
    for dtype in (torch.float32, torch.bfloat16):
        assert same(decoded(parts, 1, 11, dtype, team), fp8.decode_rows(parts, 1, 11, dtype))


def test_without_a_compiler_the_bits_are_the_same() -> None:
    parts = parts_of(30, 100, (7, 33))
    codes, scales = parts.arrays["codes"].numpy(), parts.arrays["scales"].numpy()
    out, plain = torch.zeros(20, 100, dtype=torch.bfloat16), torch.zeros(20, 100, dtype=torch.bfloat16)
    with np.errstate(all="ignore"):
        fp8_kernels.to_bfloat16(codes, scales, 7, 33, bits_of(out), 5, 5, 25)
        fp8_kernels._to_bfloat16_plain(codes, scales, 7, 33, bits_of(plain), 5, 5, 25)
    assert same(out, plain)
    wide, other = np.zeros((20, 100), np.float32), np.zeros((20, 100), np.float32)
    with np.errstate(all="ignore"):
        fp8_kernels.to_float32(codes, scales, 7, 33, wide, 5, 5, 25)
        fp8_kernels._to_float32_plain(codes, scales, 7, 33, other, 5, 5, 25)
    assert same(torch.from_numpy(wide), torch.from_numpy(other))


def test_rows_of_several_matrices_are_decoded_as_one(team: Team) -> None:
    one, two = parts_of(10, 64, (4, 32), 1), parts_of(6, 64, (6, 64), 2)
    whole = Parts({}, 16, 64, (), (("fp8", 0, one), ("fp8", 10, two)))
    wanted = torch.cat([fp8.decode_rows(own, 0, own.num_rows, torch.float32) for own in (one, two)])
    for first, last in ((0, 16), (3, 12), (11, 13), (9, 10)):
        out = torch.empty(last - first, 64)
        CODECS["stacked"].decode(whole, out, first, last, team)
        assert same(out, wanted[first:last])
        torch_kernels.decode("stacked", whole, out.zero_(), first, last)
        assert same(out, wanted[first:last])


def test_arrays_that_do_not_make_the_matrix_are_not_taken() -> None:
    codec = CODECS["fp8"]
    good = {"scales": ("F32", (2, 3)), "codes": ("U8", (9, 40))}
    assert codec.has_parts(good, 9, 40, (5, 16))
    assert not codec.has_parts(good, 9, 40, (4, 16))
    assert not codec.has_parts(good, 9, 40, ())
    assert not codec.has_parts({**good, "scales": ("I32", (2, 3))}, 9, 40, (5, 16))
    assert not codec.has_parts({"codes": ("U8", (9, 40))}, 9, 40, (5, 16))
    assert CODECS["stacked"].has_parts({}, 9, 40)
    assert not CODECS["stacked"].has_parts(good, 9, 40)
