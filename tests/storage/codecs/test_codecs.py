"""Codecs: what is lossless keeps every bit, what is not is as near as it says, and both ways of decoding agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.errors import StoreError
from slowllm.storage.codecs import base, cpu_kernels, layout_constants
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.int8 import quantise_rows
from slowllm.storage.codecs.registry import STORE_CODECS, check_coding
from slowllm.storage.codecs.team import Team
from slowllm.storage.spans import TORCH_DTYPES, CodedArray, Coding
from tests.support.properties import num_examples

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Every number that bf16 has: zeros, subnormals, infinities, and NaN with every payload.
ALL_BITS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(2)
    yield team
    team.close()


def stored(name: str, matrix: Tensor, units: int = 1) -> tuple[Tensor, Coding]:
    """Encode a matrix in pieces of so many units, and lay the parts out as a file has them."""
    codec, width = STORE_CODECS[name], matrix.shape[-1]
    num_rows, flat = matrix.numel() // width, matrix.reshape(-1)
    layout = codec.layout(num_rows, width)
    found: dict[str, list[Tensor]] = {}
    for piece in flat.split(units * codec.unit(width)):
        for key, array in codec.encode(piece, width).items():
            found.setdefault(key, []).append(array)
    arrays = {key: torch.cat(found.pop(key)) for key in layout} | codec.finish(found)
    parts, data = [], torch.empty(0, dtype=torch.uint8)
    for key, array in arrays.items():
        assert key not in layout or (NAMES[array.dtype], tuple(array.shape)) == layout[key]
        parts.append(CodedArray(key, NAMES[array.dtype], tuple(array.shape), len(data)))
        own = array.reshape(-1).view(torch.uint8) if array.numel() else data[:0]
        data = torch.cat([data, own, torch.zeros(-len(own) % 64, dtype=torch.uint8)])
    coding = Coding(name, tuple(parts))
    check_coding("it", coding, tuple(matrix.shape))
    return data, coding


def decoded(name: str, matrix: Tensor, team: Team, first: int = 0, last: int | None = None) -> Tensor:
    data, coding = stored(name, matrix)
    parts = Parts.of(data, coding, tuple(matrix.shape))
    last = parts.num_rows if last is None else last
    out = torch.full((last - first, parts.width), math.nan, dtype=torch.bfloat16)
    STORE_CODECS[name].decode(parts, out, first, last, team)
    return out


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def test_lossless_keeps_all_65_536_numbers(team: Team) -> None:
    shuffled = ALL_BITS[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]
    # One chunk with nearly every number an escape; and the same spread over chunks of which the last is short.
    for matrix in (
        ALL_BITS.view(256, 256),
        shuffled.view(1024, 64),
        shuffled.repeat(3)[:150_000].view(-1, 400),
    ):
        assert torch.equal(bits(decoded("lossless", matrix, team)), bits(matrix))


@num_examples(60)
@given(
    num_rows=st.integers(1, 9),
    width=st.sampled_from([1, 3, 16, 100, 4096, 16_384, 40_001]),
    share=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    seed=st.integers(0, 1 << 16),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_lossless_gives_any_rows_bit_for_bit(
    num_rows: int, width: int, share: float, seed: int, cuts: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(num_rows, width, generator=generator).mul_(0.02).bfloat16()
    anything = ALL_BITS[torch.randint(1 << 16, (num_rows, width), generator=generator)]
    matrix = torch.where(torch.rand(num_rows, width, generator=generator) < share, anything, matrix)
    first, last = sorted(round(cut * num_rows) for cut in cuts)
    with_team = Team(2)
    try:
        found = decoded("lossless", matrix, with_team, first, last)
    finally:
        with_team.close()
    assert torch.equal(bits(found), bits(matrix[first:last]))


def test_lossless_takes_about_12_bits_of_a_trained_weight() -> None:
    data, _ = stored(
        "lossless", torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    )
    assert len(data) * 8 / (512 * 1024) < 12.02


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("int4", 0.1)])
def test_lossy_codecs_are_as_near_as_they_say(name: str, most: float, team: Team) -> None:
    matrix = torch.randn(96, 320, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = (decoded(name, matrix, team).float() - matrix.float()).norm() / matrix.float().norm()
    assert most / 10 < error < most


@pytest.mark.parametrize("width", [64, 100, 7])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_constant_rows_zeros_and_short_groups_are_kept(name: str, width: int, team: Team) -> None:
    matrix = torch.zeros(4, width, dtype=torch.bfloat16)
    matrix[1], matrix[2, 3], matrix[3] = 0.5, -2.0, torch.linspace(-1, 1, width).bfloat16()
    found = decoded(name, matrix, team)
    assert torch.equal(found[:2], matrix[:2])
    assert (found - matrix).abs().max() <= (0.14 if name == "int4" else 0.02)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rows_decode_alike_whatever_is_decoded_with_them(name: str, team: Team) -> None:
    matrix = torch.randn(37, 200, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = decoded(name, matrix, team)
    assert torch.equal(decoded(name, matrix, team, 11, 30), whole[11:30])
    assert torch.equal(decoded(name, matrix.view(1, 37, 200), team), whole)


def arrays_of(name: str, matrix: Tensor) -> Mapping[str, np.ndarray]:
    data, coding = stored(name, matrix)
    return {key: value.numpy() for key, value in Parts.of(data, coding, tuple(matrix.shape)).arrays.items()}


@pytest.mark.skipif(
    not layout_constants.IS_COMPILED, reason="numba is not installed, so there is one way only"
)
def test_without_numba_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(70, 1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    matrix[3, 5:400] = 0.0
    found = arrays_of("lossless", matrix)
    given = [
        found["signs"].view(np.uint64), found["exponents"].view(np.uint64), found["bases"], found["starts"],
        found["places"].view(np.uint16), found["values"].view(np.uint16),
    ]  # fmt: skip
    one, other = (np.zeros(2 * layout_constants.CHUNK, np.uint16) for _ in range(2))
    cpu_kernels.join_chunks(*given, one, 0, 0, 2)
    monkeypatch.setattr(cpu_kernels, "_join_words", cpu_kernels._join_plain)
    cpu_kernels._join_chunks(*given, other, 0, 0, 2)
    assert (one == other).all()
    one, other = (np.zeros((70, 1000), np.uint16) for _ in range(2))
    found = arrays_of("int8", matrix)
    cpu_kernels.int8_rows(found["codes"], found["scales"], one, 0, 70)
    cpu_kernels._int8_rows_plain(found["codes"], found["scales"], other, 0, 70)
    assert (one == other).all()
    cpu_kernels.int8_codes(found["codes"], one)
    cpu_kernels._int8_codes_plain(found["codes"], other)
    assert (one == other).all()
    assert (
        torch.from_numpy(one.view(np.int16)).view(torch.bfloat16) == torch.from_numpy(found["codes"])
    ).all()
    data, coding = stored("int4", matrix)
    parts = Parts.of(data, coding, (70, 1000)).arrays
    given = [parts["codes"].numpy(), parts["scales"].float().numpy(), parts["lows"].float().numpy()]
    cpu_kernels.int4_rows(*given, one, 0, 70)
    cpu_kernels._int4_rows_plain(*given, other, 0, 70)
    assert (one == other).all()


@pytest.mark.skipif(
    not layout_constants.IS_COMPILED, reason="numba is not installed, so there is one way only"
)
def test_without_numba_int4_is_encoded_as_well(monkeypatch: pytest.MonkeyPatch, team: Team) -> None:
    matrix = torch.randn(70, 1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    one = (decoded("int4", matrix, team).float() - matrix.float()).norm()
    monkeypatch.setattr(layout_constants, "IS_COMPILED", False)
    other = (decoded("int4", matrix, team).float() - matrix.float()).norm()
    assert one == pytest.approx(float(other), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, 47, 48, 130])
def test_int8_products_are_those_of_the_integers(num_rows: int, dtype: torch.dtype, team: Team) -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(90, 256, generator=generator).bfloat16()
    x = torch.randn(num_rows, 256, generator=generator).to(dtype)
    x[0, 7], x[-1, 200] = 40.0, -9.0  # outliers
    data, coding = stored("int8", matrix)
    parts = Parts.of(data, coding, (90, 256))
    found = STORE_CODECS["int8"].multiply(x, parts, 10, 80, team)
    assert found is not None
    # The method by hand, in 64 bits.
    outlier = x.abs() >= 6
    codes, scales = quantise_rows(x.masked_fill(outlier, 0))
    rows = parts.arrays["codes"][10:80].double() * parts.arrays["scales"][10:80, None].double()
    wanted = codes.double() * scales[:, None].double() @ rows.T + x.masked_fill(~outlier, 0).double() @ rows.T
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2  # one or two roundings to the dtype
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    # And near the product that was meant.
    true = x.double() @ matrix[10:80].double().T
    assert (found.double() - true).norm() <= 0.02 * true.norm()


def test_an_outlier_coarsens_no_other_row(team: Team) -> None:
    generator = torch.Generator().manual_seed(5)
    data, coding = stored("int8", torch.randn(64, 128, generator=generator).bfloat16())
    parts = Parts.of(data, coding, (64, 128))
    x = torch.randn(3, 128, generator=generator).bfloat16()
    alone = STORE_CODECS["int8"].multiply(x, parts, 0, 64, team)
    x[1, 5] = 1000.0
    beside = STORE_CODECS["int8"].multiply(x, parts, 0, 64, team)
    assert alone is not None
    assert beside is not None
    assert torch.equal(alone[[0, 2]], beside[[0, 2]])


def test_where_most_activations_are_outliers_the_matrix_is_decoded(team: Team) -> None:
    data, coding = stored("int8", torch.ones(8, 128, dtype=torch.bfloat16))
    parts = Parts.of(data, coding, (8, 128))
    assert STORE_CODECS["int8"].multiply(torch.full((2, 128), 7.0), parts, 0, 8, team) is None


@pytest.mark.parametrize("num_rows", [1, 13])
def test_few_rows_times_int4_are_those_of_the_decoded_matrix(
    num_rows: int, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "TILE_BYTES", 10_000)  # several tiles
    generator = torch.Generator().manual_seed(6)
    data, coding = stored("int4", torch.randn(90, 200, generator=generator).bfloat16())
    parts = Parts.of(data, coding, (90, 200))
    whole = torch.empty(90, 200, dtype=torch.bfloat16)
    STORE_CODECS["int4"].decode(parts, whole, 0, 90, team)
    x = torch.randn(num_rows, 200, generator=generator).bfloat16()
    found = STORE_CODECS["int4"].multiply(x, parts, 5, 85, team)
    assert found is not None
    wanted = x.float() @ whole[5:85].float().T
    assert (found.float() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    assert STORE_CODECS["int4"].multiply(x.repeat(60, 1), parts, 5, 85, team) is None


@num_examples(40)
@given(seed=st.integers(0, 1 << 16))
def test_damaged_parts_write_nowhere_else(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data, coding = stored("lossless", torch.randn(9, 8000, generator=generator).bfloat16())
    begin = next(part.offset for part in coding.parts if part.name == "starts")
    data[begin:] = torch.randint(256, (len(data) - begin,), generator=generator).to(torch.uint8)
    parts = Parts.of(data, coding, (9, 8000))
    room = torch.full((9 * 8000 + 128,), 7.0, dtype=torch.bfloat16)
    with_team = Team(1)
    STORE_CODECS["lossless"].decode(parts, room[64:-64].view(9, 8000), 0, 9, with_team)
    with_team.close()
    assert (room[:64] == 7).all()
    assert (room[-64:] == 7).all()


def test_parts_that_do_not_make_the_matrix_are_refused() -> None:
    for name in STORE_CODECS:
        _, coding = stored(name, torch.ones(4, 100, dtype=torch.bfloat16))
        for shape in ((4, 164), (5, 100), (400,)):
            with pytest.raises(StoreError, match=r"^it: its parts do not make a matrix of shape \["):
                check_coding("it", coding, shape)
        with pytest.raises(StoreError, match="do not make"):
            check_coding("it", Coding(name, coding.parts[:-1]), (4, 100))
    with pytest.raises(StoreError, match=r"^it: its codec 'int3' is unknown; a newer slowllm may know it$"):
        check_coding("it", Coding("int3", ()), (4, 100))
