"""What bitsandbytes stored is decoded to what bitsandbytes dequantises it to."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as package
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.storage.codecs import bnb, torch_kernels
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import Team
from tests.support.bnb_checkpoints import scales_of
from tests.support.properties import num_examples

SPECIAL = torch.tensor([0.0, -0.0, 1e-45, 1e38, float("inf"), float("nan"), -1.0, 2.0**-126])


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(2)
    yield made
    made.close()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether numbers are equal, signs of zeros included, and NaN where NaN is."""
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())


def nibbles_of(rows: int, width: int, block: int, is_nested: bool, seed: int) -> tuple[Parts, torch.Tensor]:
    """Return a matrix of random codes and tables, and its weights in float32 by plain operations."""
    draw = torch.Generator().manual_seed(seed)
    size = rows * width
    blocks = -(-size // block)
    codes = torch.randint(0, 256, (-(-size // 2),), generator=draw, dtype=torch.uint8)
    table, arrays = torch.randn(16, generator=draw), {}
    if is_nested:
        short = torch.randint(0, 256, (blocks,), generator=draw, dtype=torch.uint8)
        arrays = {
            "scale_table": torch.randn(256, generator=draw),
            "scale_scales": torch.rand(-(-blocks // 256), generator=draw),
        }
        scales = arrays["scale_table"][short.int()]
        scales = scales * arrays["scale_scales"].repeat_interleave(256)[:blocks] + 0.3
    else:
        scales = torch.randn(blocks, generator=draw)
        scales[:: 1 + seed % 5] = SPECIAL[torch.arange(len(scales[:: 1 + seed % 5])) % 8]
    numbers = torch.tensor([nibble for byte in codes.tolist() for nibble in (byte >> 4, byte & 15)])[:size]
    weights = table[numbers] * scales.repeat_interleave(block)[:size]
    arrays |= {"codes": codes, "table": table, "scales": short if is_nested else scales}
    return Parts(arrays, rows, width, (block,), (), 0.3), weights.view(rows, width)


@num_examples(60)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([32, 64, 2048]),
    st.booleans(),
    st.tuples(st.integers(0, 39), st.integers(1, 40)),
    st.integers(0, 1000),
)
def test_any_rows_of_any_blocks_are_those_of_plain_operations(
    rows: int, width: int, block: int, is_nested: bool, cut: tuple[int, int], seed: int
) -> None:
    parts, weights = nibbles_of(rows, width, block, is_nested, seed)
    first = cut[0] % rows
    last = min(rows, first + cut[1])
    team = Team(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((last - first, width), 7.0, dtype=dtype)
        CODECS["bnb_4bit"].decode(parts, out, first, last, team)
        assert same(out, weights[first:last].to(dtype))
        torch_kernels.decode("bnb_4bit", parts, out.zero_(), first, last)
        assert same(out, weights[first:last].to(dtype))
    team.close()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_4_bits_are_those_of_the_package(
    kind: str, is_nested: bool, dtype: torch.dtype, team: Team
) -> None:
    weight = torch.randn(300, 512, generator=torch.Generator().manual_seed(1))
    codes, state = package.quantize_4bit(weight, quant_type=kind, compress_statistics=is_nested)
    arrays = {"codes": codes.view(-1), "table": state.code, "scales": state.absmax}
    if is_nested:
        arrays |= {"scale_table": state.state2.code, "scale_scales": state.state2.absmax}
    mean = state.offset.item() if is_nested else 0.0
    out = torch.empty(300, 512, dtype=dtype)
    CODECS["bnb_4bit"].decode(Parts(arrays, 300, 512, (64,), (), mean), out, 0, 300, team)
    wanted = torch.ops.bitsandbytes.dequantize_4bit(codes, scales_of(state), 64, kind, [300, 512], dtype)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_numbers_are_those_of_the_package(dtype: torch.dtype, team: Team) -> None:
    codes = torch.arange(-128, 128).to(torch.int8).repeat(40, 3)
    scales = torch.cat([SPECIAL, torch.randn(32, generator=torch.Generator().manual_seed(1)).exp()])
    wanted = package.int8_vectorwise_dequant(codes, scales).to(dtype)
    parts = Parts({"codes": codes.view(torch.uint8), "scales": scales}, 40, 768)
    for first, last in ((0, 40), (7, 30)):
        out = torch.empty(last - first, 768, dtype=dtype)
        CODECS["bnb_8bit"].decode(parts, out, first, last, team)
        assert same(out, wanted[first:last])
        torch_kernels.decode("bnb_8bit", parts, out.zero_(), first, last)
        assert same(out, wanted[first:last])


def test_without_a_compiler_the_bits_are_the_same(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, weights = nibbles_of(30, 77, 64, True, 3)
    whole = Parts({"codes": torch.arange(60).byte().view(4, 15), "scales": torch.rand(4)}, 4, 15)
    compiled, out = torch.empty(4, 15), torch.empty(4, 15)
    CODECS["bnb_8bit"].decode(whole, compiled, 0, 4, team)
    monkeypatch.setattr(bnb, "IS_COMPILED", False)
    monkeypatch.setattr(bnb, "_TILE_WEIGHTS", 40)
    CODECS["bnb_8bit"].decode(whole, out, 0, 4, team)
    assert torch.equal(out, compiled)
    part = torch.empty(20, 77, dtype=torch.bfloat16)
    CODECS["bnb_4bit"].decode(parts, part, 5, 25, team)
    assert same(part, weights[5:25].bfloat16())


def test_arrays_that_do_not_make_the_matrix_are_not_taken() -> None:
    codec = CODECS["bnb_4bit"]
    good = {"codes": ("U8", (45,)), "table": ("F32", (16,)), "scales": ("F32", (3,))}
    nested = {**good, "scales": ("U8", (3,)), "scale_table": ("F32", (256,)), "scale_scales": ("F32", (1,))}
    assert codec.has_parts(good, 9, 10, (32,))
    assert codec.has_parts(nested, 9, 10, (32,))
    assert not codec.has_parts(good, 9, 10, ())
    assert not codec.has_parts(good, 9, 10, (64,))
    assert not codec.has_parts({**nested, "scale_scales": ("F32", (2,))}, 9, 10, (32,))
    codec = CODECS["bnb_8bit"]
    whole = {"codes": ("U8", (9, 10)), "scales": ("F32", (9,))}
    assert codec.has_parts(whole, 9, 10)
    assert not codec.has_parts(whole, 9, 10, (1,))
    assert not codec.has_parts(whole, 10, 9)
