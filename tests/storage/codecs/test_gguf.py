"""Blocks of GGUF files are decoded to the bits of ggml's reference in Python, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from slowllm.storage.codecs import gguf, layout_constants, torch_kernels
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.gguf import GGUF_CODECS
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import OneThread, Team
from slowllm.storage.gguf import BLOCKS
from tests.storage.codecs.test_fp8 import same
from tests.support.properties import num_examples

KINDS = [*BLOCKS, "f32", "f16", "bf16"]
# Bits of float16 numbers that scales may be: zeros, subnormal and largest numbers, infinities, NaN.
SCALES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x7FFF, 0xFC01]
# Where a block of each type has float16 numbers.
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "iq4_nl": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,),
    "iq1_s": (0,), "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
}  # fmt: skip


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(2)
    yield made
    made.close()


def parts_of(kind: str, rows: int, num_blocks: int, seed: int, group: tuple[int, ...] = ()) -> Parts:
    codec = CODECS[f"gguf-{kind}"]
    assert isinstance(codec, gguf.Gguf)
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows, num_blocks, codec.block_bytes), dtype=np.uint8)
    for place in HALVES.get(kind, ()):
        for _ in range(2):
            row, block = draw.integers(rows), draw.integers(num_blocks)
            blocks[row, block, place : place + 2] = np.array(
                [SCALES[draw.integers(len(SCALES))]], "<u2"
            ).view(np.uint8)
    return Parts({"blocks": torch.from_numpy(blocks).view(rows, -1)}, rows, num_blocks * codec.weights, group)


def reference(kind: str, parts: Parts) -> torch.Tensor:
    blocks = parts.arrays["blocks"].numpy()
    if kind in ("f32", "f16"):
        return torch.from_numpy(blocks.view(np.float32 if kind == "f32" else np.float16).astype(np.float32))
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind.upper()]))


def decoded(name: str, parts: Parts, first: int, last: int, dtype: torch.dtype, team: Team) -> torch.Tensor:
    out = torch.full((last - first, parts.width), 7.0, dtype=dtype)
    CODECS[name].decode(parts, out, first, last, team)
    return out


@num_examples(40)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.integers(1, 5),
    st.tuples(st.integers(0, 11), st.integers(1, 12)),
    st.integers(0, 1000),
)
def test_any_rows_are_those_of_the_reference(
    kind: str, rows: int, num_blocks: int, cut: tuple[int, int], seed: int
) -> None:
    parts = parts_of(kind, rows, num_blocks, seed)
    first = cut[0] % rows
    last = min(rows, first + cut[1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = reference(kind, parts)[first:last].to(dtype)
        assert same(decoded(f"gguf-{kind}", parts, first, last, dtype, OneThread()), wanted)
        on_device = torch.empty_like(wanted)
        torch_kernels.decode(f"gguf-{kind}", parts, on_device, first, last)
        assert same(on_device, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scale_and_every_byte_of_codes_is_decoded(kind: str, team: Team) -> None:
    codec = CODECS[f"gguf-{kind}"]
    assert isinstance(codec, gguf.Gguf)
    blocks = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 2 * codec.block_bytes)
    for place in HALVES.get(kind, ()):
        scales = np.array([SCALES[number % len(SCALES)] for number in range(256)], "<u2").view(np.uint8)
        blocks[:, place : place + 2] = torch.from_numpy(scales).view(256, 2)
    parts = Parts({"blocks": blocks}, 256, 2 * codec.weights)
    for dtype in (torch.float32, torch.bfloat16):
        assert same(decoded(codec.name, parts, 0, 256, dtype, team), reference(kind, parts).to(dtype))


@pytest.mark.parametrize("kind", ["q4_k", "q8_0", "f16"])
@pytest.mark.parametrize("group", [(8, 2, 1), (3, 4, 2), (1, 6, 4)])
def test_rows_in_another_order_are_put_in_the_models(kind: str, group: tuple[int, ...], team: Team) -> None:
    rows = 2 * int(np.prod(group))
    parts = parts_of(kind, rows, 2, 5, group)
    wanted = reference(kind, parts).view(2, *group, -1).transpose(1, 2).reshape(rows, -1)
    assert same(decoded(f"gguf-{kind}", parts, 0, rows, torch.float32, team), wanted)
    assert same(decoded(f"gguf-{kind}", parts, 3, 9, torch.bfloat16, team), wanted[3:9].bfloat16())
    on_device = torch.empty(5, parts.width)
    torch_kernels.decode(f"gguf-{kind}", parts, on_device, 2, 7)
    assert same(on_device, wanted[2:7])
    picked = CODECS[f"gguf-{kind}"].pick(parts, torch.tensor([7, 0, 7]))
    assert picked is not None
    assert same(decoded(f"gguf-{kind}", picked, 0, 3, torch.float32, team), wanted[[7, 0, 7]])


@pytest.mark.parametrize("kind", ["q4_k", "f16"])
@pytest.mark.parametrize("group", [(2, 6, 3, 3), (3, 2, 1, 4), (1, 5, 1, 1)])
def test_rows_of_groups_are_put_together(kind: str, group: tuple[int, ...], team: Team) -> None:
    size = group[0] * sum(group[1:])
    parts = parts_of(kind, 2 * size, 2, 5, group)
    wanted = []
    for half in reference(kind, parts).split(size):
        pieces = half.split([group[0] * length for length in group[1:]])
        wanted.append(torch.cat([piece.view(group[0], -1, parts.width) for piece in pieces], 1).flatten(0, 1))
    assert same(decoded(f"gguf-{kind}", parts, 0, 2 * size, torch.float32, team), torch.cat(wanted))
    on_device = torch.empty(5, parts.width)
    torch_kernels.decode(f"gguf-{kind}", parts, on_device, 2, 7)
    assert same(on_device, torch.cat(wanted)[2:7])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_one_is_subtracted_before_rounding(kind: str, team: Team) -> None:
    values = torch.tensor([[1.0, 1.01, 0.5, 3.0]]).to(
        {"f32": torch.float32, "f16": torch.float16}.get(kind, torch.bfloat16)
    )
    parts = Parts({"blocks": values.view(torch.uint8)}, 1, 4)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = (values.float() - 1).to(dtype)
        assert same(decoded(f"gguf-{kind}-plus-one", parts, 0, 1, dtype, team), wanted)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_without_a_compiler_the_bits_are_the_same(
    kind: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(kind, 9, 3, 11)
    compiled = decoded(f"gguf-{kind}", parts, 0, 9, torch.bfloat16, team)
    monkeypatch.setattr(layout_constants, "IS_COMPILED", False)
    assert same(decoded(f"gguf-{kind}", parts, 0, 9, torch.bfloat16, team), compiled)


def test_arrays_that_do_not_make_the_matrix_are_not_taken() -> None:
    codec = CODECS["gguf-q4_k"]
    assert codec.has_parts({"blocks": ("U8", (6, 288))}, 6, 512)
    assert codec.has_parts({"blocks": ("U8", (6, 288))}, 6, 512, (3, 2, 1))
    assert not codec.has_parts({"blocks": ("U8", (6, 288))}, 6, 512, (4, 2, 1))
    assert not codec.has_parts({"blocks": ("U8", (6, 288))}, 6, 512, (3, 2))
    assert codec.has_parts({"blocks": ("U8", (6, 288))}, 6, 512, (1, 4, 1, 1))
    assert not codec.has_parts({"blocks": ("U8", (6, 288))}, 6, 512, (2, 4, 1, 1))
    assert not codec.has_parts({"blocks": ("U8", (6, 287))}, 6, 512)
    assert not codec.has_parts({"blocks": ("U8", (6, 144))}, 6, 300)
    assert not codec.has_parts({}, 6, 512)
    assert CODECS["fp8"].pick(CODECS["fp8"].example(), torch.tensor([0])) is None


def test_every_type_has_a_codec() -> None:
    assert {codec.kind for codec in GGUF_CODECS} == set(KINDS)
