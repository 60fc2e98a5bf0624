"""Arrays of compressed-tensors are decoded to the bits of the package's own weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.storage.codecs import (
    cpu_kernels,
    nvfp4,
    nvfp4_kernels,
    rounded,
    scaled_int,
    scaled_int_kernels,
    torch_kernels,
)
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import Team
from tests.support.compressed_checkpoints import decompressed
from tests.support.properties import num_examples
from tests.support.same_numbers import same_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"), 2.0**-126, 3e-39]
DECODERS = {
    "nvfp4": nvfp4.decode_rows,
    "fp8_rounded": rounded.decode_fp8_rows,
    "fp8_cast_scales": rounded.decode_cast_rows,
    "scaled_int": scaled_int.decode_rows,
}


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(2)
    yield made
    made.close()


def random_bytes(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


def random_scales(
    draw: torch.Generator, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> torch.Tensor:
    scales = torch.randn(shape, generator=draw).mul_(3).exp_()
    for place in range(min(scales.numel(), 3)):
        scales.view(-1)[place] = SPECIAL[(seed + place) % 8]
    return scales.to(dtype)


def nvfp4_parts(rows: int, width: int, seed: int, name: str) -> Parts:
    draw = torch.Generator().manual_seed(seed)
    width = -(-width // 16) * 16
    number = torch.tensor([SPECIAL[seed % 8] if seed % 3 else 3.7])
    arrays = {"codes": random_bytes(draw, rows, width // 2), "scales": random_bytes(draw, rows, width // 16)}
    return Parts({**arrays, name: number}, rows, width)


def grid_of(rows: int, width: int, group: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // group[0]), -(-width // group[1])


def fp8_parts(rows: int, width: int, group: tuple[int, int], dtype: torch.dtype, seed: int) -> Parts:
    draw = torch.Generator().manual_seed(seed)
    grid = grid_of(rows, width, group)
    scales = random_bytes(draw, *grid) if dtype == torch.uint8 else random_scales(draw, grid, dtype, seed)
    return Parts({"codes": random_bytes(draw, rows, width), "scales": scales}, rows, width, group)


def int_parts(
    rows: int, width: int, group: tuple[int, int], dtype: torch.dtype, seed: int, name: str, has_zeros: bool
) -> Parts:
    draw = torch.Generator().manual_seed(seed)
    per_word = {"pairs": 8, "bytes": 4, "signed": 1}[name]
    stored = width if name == "signed" else -(-width // per_word) * 4
    grid = grid_of(rows, width, group)
    arrays = {name: random_bytes(draw, rows, stored), "scales": random_scales(draw, grid, dtype, seed)}
    if has_zeros and name == "signed":
        arrays["zeros"] = random_bytes(draw, *grid)
    elif has_zeros:
        arrays["zeros"] = random_bytes(draw, -(-grid[0] // per_word), 4 * grid[1]).view(torch.int32)
    if group[0] == 1 and seed % 4 == 0:
        arrays["blocks"] = torch.randint(0, grid[1] + 2, (width,), generator=draw, dtype=torch.int32)
    return Parts(arrays, rows, width, group)


def assert_rows(codec: str, parts: Parts, cut: tuple[int, int]) -> None:
    first = cut[0] % parts.num_rows
    last = min(parts.num_rows, first + cut[1])
    team = Team(1)
    for dtype in DTYPES:
        wanted = DECODERS[codec](parts, first, last, dtype)
        out = torch.full_like(wanted, 7.0)
        CODECS[codec].decode(parts, out, first, last, team)
        assert same_numbers(out, wanted)
        torch_kernels.decode(codec, parts, out.fill_(7.0), first, last)
        assert same_numbers(out, wanted)
    team.close()


ROWS, WIDTHS = st.integers(1, 40), st.integers(1, 200)
GROUPS = st.tuples(st.integers(1, 50), st.integers(1, 220))
CUTS = st.tuples(st.integers(0, 39), st.integers(1, 40))
SEEDS = st.integers(0, 1000)
FLOATS = st.sampled_from(DTYPES)


@num_examples(40)
@given(ROWS, WIDTHS, CUTS, SEEDS, st.sampled_from(["divisor", "factor"]))
def test_any_rows_of_nvfp4_are_those_of_torchs_operations(
    rows: int, width: int, cut: tuple[int, int], seed: int, name: str
) -> None:
    assert_rows("nvfp4", nvfp4_parts(rows, width, seed, name), cut)


@num_examples(40)
@given(ROWS, WIDTHS, GROUPS, CUTS, SEEDS, st.sampled_from([*DTYPES, torch.uint8]))
def test_any_rows_of_float8_are_those_of_torchs_operations(
    rows: int, width: int, group: tuple[int, int], cut: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    assert_rows("fp8_rounded", fp8_parts(rows, width, group, dtype, seed), cut)
    assert_rows("fp8_cast_scales", fp8_parts(rows, width, group, dtype, seed), cut)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_modelopt_are_rounded_before_they_are_multiplied_with(
    dtype: torch.dtype, team: Team
) -> None:
    draw = torch.Generator().manual_seed(3)
    codes, scales = random_bytes(draw, 8, 64), torch.rand((8, 1), generator=draw) / 448
    # As modelopt 0.47 dequantises (FP8QTensor).
    wanted = codes.view(torch.float8_e4m3fn).to(dtype) * scales.to(dtype)
    parts, out = Parts({"codes": codes, "scales": scales}, 8, 64, (1, 64)), torch.empty(8, 64, dtype=dtype)
    CODECS["fp8_cast_scales"].decode(parts, out, 0, 8, team)
    assert same_numbers(out, wanted)


@num_examples(40)
@given(
    ROWS, WIDTHS, st.integers(1, 220), CUTS, SEEDS, FLOATS, st.sampled_from(["pairs", "bytes", "signed"]), st.booleans()
)  # fmt: skip
def test_any_rows_of_integers_are_those_of_torchs_operations(
    rows: int,
    width: int,
    columns: int,
    cut: tuple[int, int],
    seed: int,
    dtype: torch.dtype,
    name: str,
    zeros: bool,
) -> None:
    for group in ((1, columns), (rows, width)):
        parts = int_parts(rows, width, group, dtype, seed, name, zeros)
        shapes = {key: (_NAMES[array.dtype], tuple(array.shape)) for key, array in parts.arrays.items()}
        assert CODECS["scaled_int"].has_parts(shapes, rows, width, group)
        assert_rows("scaled_int", parts, cut)


_NAMES = {
    torch.uint8: "U8", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_the_number_of_the_package(dtype: torch.dtype, team: Team) -> None:
    """All bytes of codes with all bytes of scales for NVFP4; all codes of packed integers, with zeros."""
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8).repeat_interleave(8, 0)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    number = torch.tensor([3.7])
    parts = Parts({"codes": codes, "scales": scales, "divisor": number}, 256, 16)
    out = torch.empty(256, 16, dtype=dtype)
    CODECS["nvfp4"].decode(parts, out, 0, 256, team)
    arrays = {
        "weight_packed": codes,
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": number,
    }
    assert same_numbers(out, decompressed("nvfp4", arrays).to(dtype))

    for case, bits in (("int4 groups with zeros", 4), ("int8 groups with zeros", 8)):
        packed = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(4, 1).view(torch.int32)
        width, columns = packed.shape[1] * 32 // bits, 32 if bits == 4 else 16
        groups = width // columns
        zeros = (
            torch.arange(4 * bits * groups, dtype=torch.uint8).mul_(37).view(torch.int32).view(bits, groups)
        )
        factors = torch.rand(32, groups).to(torch.bfloat16 if bits == 4 else torch.float32)
        name = "pairs" if bits == 4 else "bytes"
        parts = Parts(
            {name: packed.view(torch.uint8), "scales": factors, "zeros": zeros}, 32, width, (1, columns)
        )
        out = torch.empty(32, width, dtype=dtype)
        CODECS["scaled_int"].decode(parts, out, 0, 32, team)
        arrays = {
            "weight_packed": packed, "weight_scale": factors, "weight_zero_point": zeros,
            "weight_shape": torch.tensor([32, width]),
        }  # fmt: skip
        assert same_numbers(out, decompressed(case, arrays).to(dtype))


def test_rows_longer_than_a_piece_are_decoded_whole() -> None:
    assert_rows("nvfp4", nvfp4_parts(3, 10000, 1, "divisor"), (1, 2))
    for columns in (1, 33, 20000):
        assert_rows("scaled_int", int_parts(3, 9999, (1, columns), torch.bfloat16, 1, "pairs", True), (1, 2))


def test_rows_whose_columns_have_an_order_are_decoded_a_few_at_a_time(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = int_parts(30, 50, (1, 10), torch.float16, 4, "pairs", True)
    assert "blocks" in parts.arrays
    monkeypatch.setattr(scaled_int, "TILE_WEIGHTS", 200)
    for dtype in DTYPES:
        assert_rows("scaled_int", parts, (3, 25))
        out = torch.empty(25, 50, dtype=dtype)
        CODECS["scaled_int"].decode(parts, out, 3, 28, team)
        assert same_numbers(out, scaled_int.decode_rows(parts, 3, 28, dtype))


def test_without_a_compiler_the_bits_are_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    bits = random_bytes(draw, 4 * 320).numpy().view(np.uint32)
    one, other = bits.copy(), bits.copy()
    cpu_kernels.settle_row(one)
    cpu_kernels._settle_plain(other)
    assert (one == other).all()
    codes = random_bytes(draw, 160).numpy()
    for loop, plain, size in (
        (scaled_int_kernels._widen_pairs_row, scaled_int_kernels._widen_pairs_plain, 320),
        (scaled_int_kernels._widen_bytes_row, scaled_int_kernels._widen_bytes_plain, 160),
    ):
        row, other_row = np.zeros(size, np.float32), np.zeros(size, np.float32)
        loop(codes, row)
        plain(codes, other_row)
        assert (row == other_row).all()
    scales, zeros = np.arange(1, 11, dtype=np.float32) / 3, np.arange(10, dtype=np.float32)
    row, other_row = (np.arange(160, dtype=np.float32) for _ in range(2))
    scaled_int_kernels._scale_row(row, scales, zeros, 17)
    scaled_int_kernels._scale_plain(other_row, scales, zeros, 17)
    assert (row == other_row).all()
    number = np.array([3.7], np.float32)
    for loop, plain in (
        (nvfp4_kernels._multiply_row, nvfp4_kernels._multiply_plain),
        (nvfp4_kernels._divide_row, nvfp4_kernels._divide_plain),
    ):
        row, other_row = (np.arange(160, dtype=np.float32) * np.float32(2.0**-120) for _ in range(2))
        loop(row, number)
        plain(other_row, number)
        assert (row == other_row).all()
        assert len(set(row.tolist())) == 160


def test_arrays_that_do_not_make_the_matrix_are_not_taken() -> None:
    codec = CODECS["scaled_int"]
    good = {
        "pairs": ("U8", (9, 20)),
        "scales": ("BF16", (9, 3)),
        "zeros": ("I32", (2, 3)),
        "blocks": ("I32", (40,)),
    }
    assert codec.has_parts(good, 9, 40, (1, 16))
    assert not codec.has_parts(good, 9, 40, (9, 16))
    assert not codec.has_parts(good, 9, 40, ())
    assert not codec.has_parts(good, 9, 41, (1, 16))
    for name in ("pairs", "scales", "zeros", "blocks"):
        assert not codec.has_parts({**good, name: ("F64", (9, 20))}, 9, 40, (1, 16))
    assert not codec.has_parts({**good, "bytes": ("U8", (9, 40))}, 9, 40, (1, 16))
    assert not codec.has_parts({**good, "more": ("U8", (9, 40))}, 9, 40, (1, 16))
    assert not codec.has_parts({"signed": ("U8", (9, 41)), "scales": ("BF16", (9, 3))}, 9, 40, (1, 16))
    codec = CODECS["nvfp4"]
    good = {"codes": ("U8", (9, 16)), "scales": ("U8", (9, 2)), "factor": ("F32", (1,))}
    assert codec.has_parts(good, 9, 32)
    assert not codec.has_parts(good, 9, 32, (1, 16))
    assert not codec.has_parts(good, 9, 33)
    assert not codec.has_parts({**good, "divisor": ("F32", (1,))}, 9, 32)
    for name in ("codes", "scales", "factor"):
        assert not codec.has_parts({**good, name: ("F64", (1,))}, 9, 32)
