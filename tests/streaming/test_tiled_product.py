"""Products with tiles of a coded matrix have the bits of products with the whole matrix, at real widths too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.storage.codecs import tiles
from slowllm.storage.codecs.base import Codec, Parts, StoreCodec
from slowllm.storage.codecs.fp8 import Fp8
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import OneThread, Team
from slowllm.streaming.kept_matrix import KeptMatrix
from slowllm.streaming.lazy_weight import CodedMatrix, LazyWeight, multiply_each


class Counting(Fp8):
    """Float8, or a stack of it, that says which rows were decoded at a time."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.ranges: list[tuple[int, int]] = []

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        self.ranges.append((first, last))
        self.codec.decode(parts, out, first, last, team)


@pytest.fixture(params=[1, 2, 3])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    team = Team(request.param)
    yield team
    team.close()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tiles of as few rows as there can be."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "ALL_TILES_BYTES", 1)


def coded(num_rows: int, width: int, seed: int = 0) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_rows, width), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    scales = torch.rand(-(-num_rows // 128), -(-width // 128), generator=generator) / 1000
    return Parts({"scales": scales, "codes": codes}, num_rows, width, (128, 128))


def weight_of(parts: Parts, team: Team, shape: tuple[int, ...] = ()) -> tuple[LazyWeight, Counting, Tensor]:
    """Return a coded weight, its codec and the decoded weight."""
    shape = shape or (parts.num_rows, parts.width)
    codec = Counting(CODECS["stacked"] if parts.rows else Fp8())
    plain = torch.empty(parts.num_rows, parts.width, dtype=torch.bfloat16)
    codec.codec.decode(parts, plain, 0, parts.num_rows, OneThread())
    buffer = torch.full((2 * plain.numel() // (shape[0] if len(shape) == 3 else 1),), 0xFF, dtype=torch.uint8)
    stored = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return (
        LazyWeight(stored, torch.bfloat16, buffer, CodedMatrix(codec, parts, team)),
        codec,
        plain.view(shape),
    )


def of_threads(number: int, compute: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, weight, bias: F.linear(x, weight),
    "linear with bias": F.linear,
    "rows of batches": lambda x, weight, bias: F.linear(x[:, None], weight, bias)[:, 0],
    "rows of batches of batches": lambda x, weight, bias: F.linear(x[:, None, None], weight, bias)[:, 0, 0],
    "strided rows": lambda x, weight, bias: F.linear(x.repeat(2, 1, 1).transpose(0, 1), weight, bias).flatten(
        0, 1
    ),
    "mm": lambda x, weight, bias: torch.mm(x, weight.t()),
    "addmm": lambda x, weight, bias: torch.addmm(bias, x, weight.t()),
    "some rows": lambda x, weight, bias: F.linear(x, weight[128:384], bias[128:384]),
    "some outputs": lambda x, weight, bias: x @ weight.t()[:, 256:],
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", ["graph", "no graph", "inference"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("num_rows", [1, 2, 13, 64])
def test_products_have_the_bits_of_the_whole(num_rows: int, product: str, mode: str, team: Team) -> None:
    weight, codec, plain = weight_of(coded(640, 384), team)
    compute = PRODUCTS[product]
    x, bias = torch.randn(num_rows, 384).bfloat16(), torch.randn(640).bfloat16()
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "graph"):
        mine, other = (x.clone().requires_grad_(mode == "graph") for _ in range(2))
        found, wanted = compute(mine, weight, bias), compute(other, plain, bias)
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()
        assert found.is_inference() == wanted.is_inference()
    # torch makes other operations of these before a weight sees them, so the whole is decoded for them.
    if product not in ("strided rows", "some outputs"):
        assert {last - first for first, last in codec.ranges} == {128}
    if mode == "graph":
        cotangent = torch.randn_like(found)
        found.backward(cotangent)
        wanted.backward(cotangent)
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("num_outputs", "width"),
    [
        (4096, 4096),
        (1024, 8192),
        (2048, 7168),
        (5760, 2880),
        pytest.param(28672, 8192, marks=pytest.mark.long),
        pytest.param(8192, 28672, marks=pytest.mark.long),
        pytest.param(18944, 3584, marks=pytest.mark.long),
    ],
)
def test_at_real_widths_the_bits_are_those_of_the_whole(num_outputs: int, width: int, threads: int) -> None:
    team = Team(threads)
    weight, codec, plain = weight_of(coded(num_outputs, width), team)
    bias = torch.randn(num_outputs).bfloat16()
    for num_rows in (1, 2, 13, 64, 128, 129):
        x = torch.randn(num_rows, width).bfloat16()
        for compute in (PRODUCTS["linear"], PRODUCTS["addmm"]):
            assert torch.equal(
                compute(x, weight, bias), of_threads(threads, lambda c=compute, x=x: c(x, plain, bias))
            )
    team.close()
    # Only the last x has more rows than pay.
    assert codec.ranges[-2:] == [(0, num_outputs)] * 2
    most = max(last - first for first, last in codec.ranges[:-2])
    assert most == tiles.TILE_ROWS or 2 * width * most * threads <= tiles.ALL_TILES_BYTES
    assert most * threads < num_outputs or most * threads == num_outputs > most


@pytest.mark.usefixtures("small_tiles")
def test_experts_are_multiplied_in_tiles(team: Team) -> None:
    own = [coded(256, 128, seed) for seed in range(4)]
    parts = Parts({}, 1024, 128, (), tuple(("fp8", 256 * n, one) for n, one in enumerate(own)))
    weight, codec, plain = weight_of(parts, team, (4, 256, 128))
    x = torch.randn(30, 128).bfloat16()
    offs = torch.tensor([13, 13, 14, 30], dtype=torch.int32)
    found = torch._grouped_mm(x, weight.transpose(-2, -1), offs=offs)
    assert torch.equal(found, torch._grouped_mm(x, plain.transpose(-2, -1), offs=offs))
    # The second has no rows, and every other tile is decoded once.
    assert sorted(codec.ranges) == [(n, n + 128) for n in range(0, 1024, 128) if not 256 <= n < 512]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "has_tiles"),
    [(3, 640, True), (3, 601, True), (128, 640, True), (129, 640, False), (3, 255, False)],
)
def test_what_has_no_tiles_is_decoded_whole(
    num_rows: int, num_outputs: int, has_tiles: bool, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, codec, plain = weight_of(coded(num_outputs, 384), team)
    x = torch.randn(num_rows, 384).bfloat16()
    assert torch.equal(F.linear(x, weight), F.linear(x, plain))
    assert (len(codec.ranges) > 1) == has_tiles
    codec.ranges.clear()
    # Along the coded rows, sums would be cut.
    along = torch.randn(3, num_outputs).bfloat16()
    assert torch.equal(torch.mm(along, weight), torch.mm(along, plain))
    monkeypatch.setattr(tiles, "_has_same_bits", lambda *_: False)
    assert torch.equal(F.linear(x, weight), F.linear(x, plain))
    assert codec.ranges == [(0, num_outputs)] * 2


def test_an_error_in_a_tile_reaches_the_caller(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codec, _ = weight_of(coded(640, 384), team)

    def fail(*args: object) -> None:
        raise MemoryError("no room for a tile")

    monkeypatch.setattr(codec, "decode", fail)
    with pytest.raises(MemoryError, match="no room"):
        F.linear(torch.randn(2, 384).bfloat16(), weight)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("first_rows", [1, 600])
def test_what_is_kept_is_decoded_once_and_forgotten_when_the_stop_is_left(
    first_rows: int, team: Team
) -> None:
    weight, codec, plain = weight_of(coded(640, 384), team)
    room = torch.full((640, 384), float("nan"), dtype=torch.bfloat16)
    weight.kept = KeptMatrix(room)
    for num_rows in (first_rows, 2, 600, 13):
        x, bias = torch.randn(num_rows, 384).bfloat16(), torch.randn(640).bfloat16()
        assert torch.equal(F.linear(x, weight, bias), F.linear(x, plain, bias))
        assert torch.equal(torch.mm(x, weight[128:256].t()), torch.mm(x, plain[128:256].t()))
    assert sum(last - first for first, last in codec.ranges) == 640
    assert torch.equal(room, plain)
    weight.kept.leave()
    room.fill_(float("nan"))
    codec.ranges.clear()
    assert torch.equal(F.linear(x, weight), F.linear(x, plain))
    assert sum(last - first for first, last in codec.ranges) == 640


def test_no_graph_holds_what_is_kept(team: Team) -> None:
    """Backward decodes again, also when others have been decoded to the same memory."""
    weight, _, plain = weight_of(coded(640, 384), team)
    room = torch.empty(640, 384, dtype=torch.bfloat16)
    weight.kept = KeptMatrix(room)
    x, other = (torch.randn(5, 384).bfloat16().requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    found, wanted = F.linear(x, weight).square().sum(), F.linear(other, plain).square().sum()
    weight.kept.leave()
    room.fill_(float("nan"))
    found.backward()
    wanted.backward()
    assert x.grad is not None
    assert other.grad is not None
    assert torch.equal(x.grad, other.grad)


def inputs_of(lengths: Sequence[int], width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randn(length, width, generator=generator).bfloat16() for length in lengths]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2), (64, 5), (1, 129, 2)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_several_inputs_have_the_bits_of_each_alone_and_each_row_is_decoded_once(
    lengths: tuple[int, ...], is_transposed: bool, team: Team
) -> None:
    weight, codec, plain = weight_of(coded(640, 384), team)
    xs = inputs_of(lengths, 384)
    given = weight.t() if is_transposed else weight
    found = multiply_each(xs, given, is_transposed=is_transposed)
    assert all(torch.equal(one, F.linear(x, plain)) for one, x in zip(found, xs, strict=True))
    assert sum(last - first for first, last in codec.ranges) == 640
    assert (len(codec.ranges) == 1) == (max(lengths) > tiles.MAX_ROWS)


@pytest.mark.usefixtures("small_tiles")
def test_several_inputs_of_a_matrix_stored_by_columns_have_the_bits_of_each_alone(team: Team) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (1, 640, 12, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (1, 640, 12), dtype=torch.uint8, generator=generator)
    parts = Parts({"scales": scales, "codes": codes}, 384, 640)
    plain = torch.empty(384, 640, dtype=torch.bfloat16)
    CODECS["mxfp4"].decode(parts, plain, 0, 384, OneThread())
    stored = torch.empty(384, 640, dtype=torch.bfloat16, device="meta")
    buffer = torch.empty(0, dtype=torch.uint8)  # with room for nothing
    weight = LazyWeight(stored, torch.bfloat16, buffer, CodedMatrix(CODECS["mxfp4"], parts, team))
    xs = inputs_of((1, 4, 2), 384)
    assert CODECS["mxfp4"].multiply_each(xs, parts, 0, 384, team, is_plain=True) is not None
    found = multiply_each(xs, weight, is_transposed=True)
    assert all(torch.equal(one, x @ plain) for one, x in zip(found, xs, strict=True))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_codec_that_multiplies_in_its_own_way_does_so_for_each_input(name: str, team: Team) -> None:
    codec = CODECS[name]
    assert isinstance(codec, StoreCodec)
    matrix = torch.randn(256, 384, generator=torch.Generator().manual_seed(2)).bfloat16()
    parts = codec.join([codec.encode(matrix.flatten(), 384)], 256, 384)
    stored = torch.empty(256, 384, dtype=torch.bfloat16, device="meta")
    buffer = torch.empty(2 * 256 * 384, dtype=torch.uint8)
    weight = LazyWeight(stored, torch.bfloat16, buffer, CodedMatrix(codec, parts, team))
    xs = inputs_of((1, 4, 60, 2), 384)
    xs[1][0] *= 50  # outliers, of one input only
    alone = [F.linear(x, weight) for x in xs]
    assert all(map(torch.equal, multiply_each(xs, weight), alone))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_several_inputs_of_a_weight_in_memory_are_multiplied_one_by_one(is_transposed: bool) -> None:
    plain = torch.randn(640, 384)
    xs = [torch.randn(length, 384) for length in (1, 5)]
    stored = plain.bfloat16()
    lazy = LazyWeight(stored, torch.float32, torch.empty(plain.numel() * 4, dtype=torch.uint8))
    for given, wanted in ((plain, plain), (lazy, stored.float())):
        weight = given.t() if is_transposed else given
        found = multiply_each(xs, weight, is_transposed=is_transposed)
        assert all(torch.equal(one, F.linear(x, wanted)) for one, x in zip(found, xs, strict=True))
