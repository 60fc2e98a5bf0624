"""What a device decodes has the bits of what the processor's loops decode; here both on the processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.storage.codecs import torch_kernels
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.layout_constants import CHUNK
from slowllm.storage.codecs.registry import STORE_CODECS
from slowllm.storage.codecs.team import Team
from tests.support.coded import coded, matrix_of
from tests.support.properties import num_examples


@num_examples(40)
@given(
    codec=st.sampled_from(sorted(STORE_CODECS)),
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 1000),
    cut=st.tuples(st.integers(0, 39), st.integers(1, 40)),
    tile=st.sampled_from([1, 500, 1 << 24]),
)
def test_any_rows_decode_to_the_bits_of_the_loops(
    codec: str, rows: int, width: int, spread: float, seed: int, cut: tuple[int, int], tile: int
) -> None:
    parts = coded(codec, matrix_of(seed, rows, width, spread))
    first = cut[0] % rows
    last = min(rows, first + cut[1])
    compare(codec, parts, first, last, tile)


@pytest.mark.parametrize("codec", sorted(STORE_CODECS))
def test_matrices_of_several_chunks_decode_to_the_bits_of_the_loops(codec: str) -> None:
    width = 1000
    parts = coded(codec, matrix_of(1, 3 * CHUNK // width + 7, width, 8.0))
    compare(codec, parts, 0, parts.num_rows, CHUNK)
    compare(codec, parts, 70, 140, 2 * CHUNK)
    compare(codec, parts, parts.num_rows - 1, parts.num_rows, CHUNK)


def compare(codec: str, parts: Parts, first: int, last: int, tile: int) -> None:
    wanted = torch.empty(last - first, parts.width, dtype=torch.bfloat16)
    team = Team(1)
    STORE_CODECS[codec].decode(parts, wanted, first, last, team)
    team.close()
    before, torch_kernels.TILE_WEIGHTS = torch_kernels.TILE_WEIGHTS, tile
    try:
        for dtype in (torch.bfloat16, torch.float32):
            out = torch.full_like(wanted, float("nan"), dtype=dtype)
            torch_kernels.decode(codec, parts, out, first, last)
            assert torch.equal(out.bfloat16().view(torch.int16), wanted.view(torch.int16))
    finally:
        torch_kernels.TILE_WEIGHTS = before


def test_a_damaged_store_writes_nowhere_else() -> None:
    parts = coded("lossless", matrix_of(0, 10, 100, 8.0))
    assert len(parts.arrays["places"])
    for starts in (torch.tensor([5, -9]), torch.tensor([10**6, 10**7]), torch.tensor([0, 3])):
        broken = {**parts.arrays, "starts": starts, "places": torch.full_like(parts.arrays["places"], -1)}
        torch_kernels.decode(
            "lossless", Parts(broken, 10, 100), torch.empty(10, 100, dtype=torch.bfloat16), 0, 10
        )


@num_examples(40)
@given(
    rows=st.integers(1, 40), width=st.integers(1, 70), outputs=st.integers(1, 70), seed=st.integers(0, 100)
)
def test_integer_products_of_any_size_are_exact(rows: int, width: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
    codes = torch.randint(-127, 128, (outputs, width), generator=generator, dtype=torch.int8)
    wanted = (x.long() @ codes.long().T).float()
    assert torch.equal(torch_kernels.int8_product(x, codes), wanted)


def test_integer_products_are_padded_to_what_a_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    plain = torch._int_mm

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.append((*a.shape, b.shape[1]))
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", product)
    for rows, width, outputs in ((1, 5, 3), (17, 8, 16), (16, 64, 7), (30, 9, 8)):
        torch_kernels.int8_product(
            torch.ones(rows, width, dtype=torch.int8), torch.ones(outputs, width, dtype=torch.int8)
        )
    assert all(m > 16 and k % 8 == 0 and n % 8 == 0 for m, k, n in seen)
    assert seen[1] == (17, 8, 16), "what fits is left as it is"
