"""Packed integers are decoded to (code - zero) * scale, rounded to the dtype of the scales and once more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import CheckpointError
from slowllm.storage.codecs import awq, gptq, torch_kernels
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import Team
from tests.support.packed_checkpoints import awq_packed, packed
from tests.support.properties import num_examples

NAN, INF = float("nan"), float("inf")
# Of float16: subnormal ones, the largest, and some whose products are not normal numbers.
SPECIAL = [
    0.0,
    -0.0,
    6e-8,
    6.2e-5,
    2.0**-14,
    -3e-5,
    65504.0,
    256.0,
    255.0,
    -260.0,
    NAN,
    INF,
    -INF,
    0.01,
    1e-3,
]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(2)
    yield made
    made.close()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether numbers are equal, signs of zeros included, and NaN where NaN is."""
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())


def matrix_of(
    codec: str, bits: int, rows: int, width: int, group: int, is_ordered: bool, dtype: torch.dtype, seed: int
) -> tuple[Parts, torch.Tensor]:
    """Return a matrix of random codes and scales, and its weights in the dtype of the scales, by plain operations."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-width // group)
    codes = torch.randint(0, 2**bits, (width, rows), generator=draw)
    zeros = torch.randint(1 if codec == "gptq" else 0, 2**bits, (groups, rows), generator=draw)
    scales = (torch.randn(groups, rows, generator=draw) * 0.01).to(dtype)
    if seed % 2:
        places = torch.randint(0, scales.numel(), (scales.numel() // 2 + 1,), generator=draw)
        picked = torch.randint(0, len(SPECIAL), (len(places),), generator=draw)
        scales.view(-1)[places] = torch.tensor(SPECIAL).to(dtype)[picked]
    of_column = torch.arange(width) // group
    if is_ordered:
        of_column = of_column[torch.randperm(width, generator=draw)]
    weights = (codes - zeros[of_column]).to(dtype) * scales[of_column]
    if codec == "awq":
        arrays = {"codes": awq_packed(codes), "zeros": awq_packed(zeros), "scales": scales}
    else:
        stored = zeros - int(codec == "gptq")
        arrays = {"codes": packed(codes, bits), "zeros": packed(stored.T, bits).T, "scales": scales}
    if is_ordered:
        arrays["order"] = of_column.int()
    return Parts(
        {name: array.contiguous() for name, array in arrays.items()}, rows, width, (1, group)
    ), weights.T


CASES = st.one_of(
    st.tuples(st.sampled_from(["gptq", "gptq_v2"]), st.sampled_from([2, 3, 4, 8]), st.booleans()),
    st.just(("awq", 4, False)),
)


@num_examples(40)
@given(
    CASES,
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 200),
    st.tuples(st.integers(0, 95), st.integers(1, 96)),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_any_rows_of_any_groups_are_those_of_plain_operations(
    case: tuple[str, int, bool],
    rows: int,
    width: int,
    group: int,
    cut: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    codec, bits, is_ordered = case
    parts, weights = matrix_of(codec, bits, 32 * rows, 32 * width, group, is_ordered, dtype, seed)
    first = cut[0] % parts.num_rows
    last = min(parts.num_rows, first + cut[1])
    team = Team(1)
    for wanted_dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((last - first, parts.width), 7.0, dtype=wanted_dtype)
        CODECS[codec].decode(parts, out, first, last, team)
        assert same(out, weights[first:last].to(wanted_dtype))
        torch_kernels.decode(codec, parts, out.zero_(), first, last)
        assert same(out, weights[first:last].to(wanted_dtype))
    team.close()


@pytest.mark.parametrize("codec", ["gptq_v2", "awq"])
def test_every_float16_times_every_number_is_what_torch_says(codec: str, team: Team) -> None:
    """All 65,536 scales, each with the codes 0 to 15 and the zeros 0 to 15."""
    scales = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).view(16, 4096)
    codes = torch.arange(16)[:, None].expand(16, 4096).repeat(16, 1)
    zeros = torch.arange(16)[:, None].expand(16, 4096)
    pack = awq_packed if codec == "awq" else (lambda numbers: packed(numbers, 4))
    packed_zeros = awq_packed(zeros) if codec == "awq" else packed(zeros.T, 4).T
    arrays = {"codes": pack(codes), "zeros": packed_zeros.contiguous(), "scales": scales.contiguous()}
    parts = Parts({name: array.contiguous() for name, array in arrays.items()}, 4096, 256, (1, 16))
    weights = ((codes - zeros.repeat_interleave(16, 0)).half() * scales.repeat_interleave(16, 0)).T
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(4096, 256, dtype=dtype)
        CODECS[codec].decode(parts, out, 0, 4096, team)
        assert same(out, weights.to(dtype))


def test_a_wide_matrix_is_decoded_in_chunks(team: Team) -> None:
    parts, weights = matrix_of("awq", 4, 64, 9000, 128, False, torch.float16, 2)
    out = torch.empty(64, 9000)
    CODECS["awq"].decode(parts, out, 0, 64, team)
    assert same(out, weights.float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_that_wrapped_around_are_found_again(bits: int, team: Team) -> None:
    """GPTQModel subtracts one from each place of a word at once: a zero of zero takes from its neighbour."""
    zeros = torch.randint(0, 2**bits, (2, 32), generator=torch.Generator().manual_seed(bits))
    zeros[:, ::3] = 0
    codes = torch.randint(0, 2**bits, (64, 32), generator=torch.Generator().manual_seed(bits))
    ones = sum(1 << shift for shift in range(0, 32, bits))
    ones -= (1 << 32) if ones >> 31 else 0
    arrays = {"codes": packed(codes, bits), "scales": torch.full((2, 32), 0.01).half()}
    arrays["zeros"] = packed(zeros.T, bits).T.contiguous() - ones
    parts = Parts(arrays, 32, 64, (1, 32))
    wanted = ((codes - zeros.repeat_interleave(32, 0)).half() * torch.tensor(0.01).half()).T.float()
    out = torch.empty(32, 64)
    CODECS["gptq"].decode(parts, out, 0, 32, team)
    assert same(out, wanted)
    assert same(gptq.decode_rows(parts, 0, 32, torch.float32), wanted)


@pytest.mark.parametrize("codec", ["gptq", "gptq_v2", "awq"])
def test_without_a_compiler_the_bits_are_the_same(
    codec: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, weights = matrix_of(codec, 4, 64, 96, 24, False, torch.float16, 3)
    for module in (gptq, awq):
        monkeypatch.setattr(module, "IS_COMPILED", False)
        monkeypatch.setattr(module, "_TILE_WEIGHTS", 1000)
    out = torch.empty(50, 96, dtype=torch.bfloat16)
    CODECS[codec].decode(parts, out, 7, 57, team)
    assert same(out, weights[7:57].bfloat16())


@pytest.mark.parametrize("place", [-1, 4])
def test_a_group_that_there_is_not_is_refused(place: int, team: Team) -> None:
    parts, _ = matrix_of("gptq", 4, 32, 64, 16, True, torch.float16, 0)
    parts.arrays["order"][5] = place
    with pytest.raises(
        CheckpointError, match=f"a g_idx of the checkpoint names group {place} of a matrix that has 4"
    ):
        CODECS["gptq"].decode(parts, torch.empty(32, 64), 0, 32, team)
    assert torch_kernels._WHOLE["gptq"](parts, 0, 32, torch.float32).shape == (32, 64)


def test_an_order_that_is_none_is_not_looked_up(team: Team) -> None:
    parts, weights = matrix_of("gptq", 4, 32, 64, 16, False, torch.float16, 0)
    parts = Parts({**parts.arrays, "order": (torch.arange(64) // 16).int()}, 32, 64, (1, 16))
    assert len(gptq._order_of(parts)) == 0
    out = torch.empty(32, 64)
    CODECS["gptq"].decode(parts, out, 0, 32, team)
    assert same(out, weights.float())


def test_arrays_that_do_not_make_the_matrix_are_not_taken() -> None:
    codec = CODECS["gptq"]
    good = {"codes": ("I32", (8, 96)), "zeros": ("I32", (4, 12)), "scales": ("F16", (4, 96))}
    assert codec.has_parts(good, 96, 64, (1, 16))
    assert codec.has_parts({**good, "order": ("I32", (64,))}, 96, 64, (1, 16))
    assert not codec.has_parts({**good, "order": ("I32", (63,))}, 96, 64, (1, 16))
    assert not codec.has_parts(good, 96, 64, (1, 32))
    assert not codec.has_parts(good, 96, 64, ())
    assert not codec.has_parts(good, 96, 60, (1, 16))
    assert not codec.has_parts({**good, "scales": ("F32", (4, 96))}, 96, 64, (1, 16))
    assert not codec.has_parts({**good, "codes": ("I32", ())}, 96, 64, (1, 16))
    codec = CODECS["awq"]
    good = {"codes": ("I32", (64, 12)), "zeros": ("I32", (4, 12)), "scales": ("F16", (4, 96))}
    assert codec.has_parts(good, 96, 64, (1, 16))
    assert not codec.has_parts(good, 95, 64, (1, 16))
    assert not codec.has_parts(good, 96, 64, (1, 0))
    assert not codec.has_parts({**good, "zeros": ("U8", (4, 12))}, 96, 64, (1, 16))
