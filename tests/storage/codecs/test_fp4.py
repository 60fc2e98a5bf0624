"""Float4 is decoded to the numbers of transformers' table, times the scale, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from slowllm.storage.codecs import fp4, fp4_kernels, torch_kernels
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.layout_constants import IS_COMPILED
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import Team
from tests.support.properties import num_examples
from tests.support.same_numbers import same_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"), 2.0**-126, 3e-39]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(2)
    yield made
    made.close()


def parts_of(
    rows: int, width: int, group: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Parts:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, width // 2), generator=draw, dtype=torch.uint8)
    grid = (-(-rows // group[0]), -(-width // group[1]))
    scales = torch.randn(grid, generator=draw).mul_(3).exp_()
    for place in range(min(scales.numel(), 3)):
        scales.view(-1)[place] = SPECIAL[(seed + place) % 8]
    if dtype == torch.uint8:
        scales = torch.randint(0, 256, grid, generator=draw).float()
    return Parts({"scales": scales.to(dtype), "codes": codes}, rows, width, group)


def decoded(parts: Parts, first: int, last: int, dtype: torch.dtype, team: Team) -> torch.Tensor:
    out = torch.full((last - first, parts.width), 7.0, dtype=dtype)
    CODECS["fp4"].decode(parts, out, first, last, team)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_the_pair_of_transformers(dtype: torch.dtype, team: Team) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    for scale in (1.0, *SPECIAL):
        scales = torch.full((4, 4), scale)
        parts = Parts({"scales": scales, "codes": codes}, 4, 128, (1, 32))
        wanted = Fp8Dequantize(None)._dequantize_one(codes.view(torch.int8), scales, output_dtype=dtype)
        assert same_numbers(decoded(parts, 0, 4, dtype, team), wanted)


@pytest.mark.parametrize("first", [0, 3])
def test_scales_that_are_exponents_have_a_loop_of_their_own(
    first: int, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    parts = Parts({"scales": exponents, "codes": codes}, 256, 512, (1, 32))
    wanted = fp4.decode_rows(parts, 0, 256, torch.bfloat16)
    assert same_numbers(decoded(parts, first, 256, torch.bfloat16, team), wanted[first:])
    if IS_COMPILED:
        monkeypatch.delattr(fp4, "decode_scaled")
    assert same_numbers(decoded(parts, 3, 252, torch.bfloat16, team), wanted[3:252])


@num_examples(60)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.tuples(st.integers(1, 50), st.integers(1, 320)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8]),
    st.tuples(st.integers(0, 39), st.integers(1, 40)),
    st.integers(0, 1000),
)
def test_any_rows_of_any_blocks_are_those_of_torchs_operations(
    rows: int, half: int, group: tuple[int, int], dtype: torch.dtype, cut: tuple[int, int], seed: int
) -> None:
    parts = parts_of(rows, 2 * half, group, seed, dtype)
    first = cut[0] % rows
    last = min(rows, first + cut[1])
    team = Team(1)
    for out in DTYPES:
        wanted = fp4.decode_rows(parts, first, last, out)
        assert same_numbers(decoded(parts, first, last, out, team), wanted)
        on_device = torch.empty_like(wanted)
        torch_kernels.decode("fp4", parts, on_device, first, last)
        assert same_numbers(on_device, wanted)
    team.close()


@pytest.mark.parametrize("columns", [1, 33, 64, 20000])
def test_rows_longer_than_a_piece_are_decoded_whole(columns: int, team: Team) -> None:
    parts = parts_of(3, 10000, (2, columns), 5)
    for dtype in DTYPES:
        assert same_numbers(decoded(parts, 1, 3, dtype, team), fp4.decode_rows(parts, 1, 3, dtype))


def test_without_a_compiler_the_bits_are_the_same() -> None:
    codes = torch.arange(256, dtype=torch.uint8).numpy()
    bits, plain = np.zeros(512, np.uint32), np.zeros(512, np.uint32)
    fp4_kernels.widen_row(codes, bits)
    fp4_kernels._widen_plain(codes, plain)
    assert (bits == plain).all()
    scales = np.arange(1, 20, dtype=np.float32) / 3
    row = bits.view(np.float32).copy()
    fp4_kernels.scale_row(row, scales[:16], 33)
    fp4_kernels._scale_plain(plain.view(np.float32), scales[:16], 33)
    assert (row.view(np.uint32) == plain).all()


def test_arrays_that_do_not_make_the_matrix_are_not_taken() -> None:
    codec = CODECS["fp4"]
    good = {"scales": ("F32", (2, 3)), "codes": ("U8", (9, 20))}
    assert codec.has_parts(good, 9, 40, (5, 16))
    assert not codec.has_parts(good, 9, 40, (4, 16))
    assert not codec.has_parts(good, 9, 40, ())
    assert not codec.has_parts(good, 9, 41, (5, 16))
    assert not codec.has_parts({**good, "scales": ("I32", (2, 3))}, 9, 40, (5, 16))
    assert not codec.has_parts({"codes": ("U8", (9, 20))}, 9, 40, (5, 16))
