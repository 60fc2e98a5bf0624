"""A weight stored in one dtype computes as its cast copy does, bit for bit, gradients included."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slowllm.errors import UnsupportedError
from slowllm.storage.spans import Placement
from slowllm.streaming.cast_stops import CastStops, cast_buffer_bytes
from slowllm.streaming.lazy_weight import LazyWeight
from tests.support.properties import num_examples

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class InMemory:
    """Stops whose weights are given."""

    def __init__(self, stops: Sequence[Mapping[str, Tensor]]) -> None:
        self.num_stops = len(stops)
        self.stops = stops
        self.calls: list[tuple[int, Sequence[int]]] = []

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Mapping[str, Tensor]]:
        self.calls.append((stop, upcoming))
        yield self.stops[stop]


def placements_of(stop: Mapping[str, Tensor]) -> list[Placement]:
    return [Placement(name, tuple(tensor.shape), tensor.dtype, ()) for name, tensor in stop.items()]


def cast_stops(stops: Sequence[Mapping[str, Tensor]], dtypes: Mapping[str, torch.dtype]) -> CastStops:
    sizes = cast_buffer_bytes([placements_of(stop) for stop in stops], dtypes)
    cast = CastStops(InMemory(stops), [placements_of(stop) for stop in stops], dtypes, sizes)
    # What was left there by somebody else shows as NaN.
    cast._small[torch.device("cpu")].fill_(0xFF)
    cast._large[torch.device("cpu")].fill_(0xFF)
    return cast


def is_inside(tensor: Tensor, buffer: Tensor) -> bool:
    if not tensor.numel():
        return False
    start = tensor.data_ptr() - buffer.data_ptr()
    return 0 <= start <= start + tensor.numel() * tensor.itemsize <= buffer.numel()


# Stops

tensors = st.tuples(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)
)


@num_examples(100)
@given(
    stops=st.lists(st.lists(tensors, max_size=5), min_size=1, max_size=3),
    visits=st.lists(st.integers(0, 2), max_size=5),
)
def test_every_weight_equals_its_cast_and_the_buffers_suffice(stops: Any, visits: list[int]) -> None:
    stored: list[dict[str, Tensor]] = []
    dtypes: dict[str, torch.dtype] = {}
    for number, stop in enumerate(stops):
        stored.append({})
        for place, (dtype, shape, compute_dtype) in enumerate(stop):
            name = f"h.{number}.{place}"
            stored[-1][name] = torch.randn(shape).to(dtype)
            dtypes[name] = compute_dtype
    cast = cast_stops(stored, dtypes)
    for visit in visits:
        number = visit % len(stops)
        with cast.visit(number) as weights:
            assert weights.keys() == stored[number].keys()
            # Twice: casting a matrix leaves the small tensors as they were.
            for name, weight in [*weights.items(), *weights.items()]:
                source = stored[number][name]
                assert (weight.dtype, weight.shape) == (dtypes[name], source.shape)
                if dtypes[name] == source.dtype:
                    assert weight is source
                    continue
                inner = weight.cast() if isinstance(weight, LazyWeight) else weight
                assert torch.equal(inner, source.to(dtypes[name]))
                buffers = cast._large if isinstance(weight, LazyWeight) else cast._small
                assert not inner.numel() or is_inside(inner, buffers[torch.device("cpu")])


def test_the_buffers_are_no_larger_than_a_stop_needs() -> None:
    stops = [
        {"a": torch.zeros(100), "b": torch.zeros(3, 5), "c": torch.zeros(7)},
        {"d": torch.zeros(33, 2), "e": torch.zeros(1)},
    ]
    dtypes = dict.fromkeys("abcde", torch.bfloat16)
    # On cache lines: 200 and 14 bytes of vectors, 132 of a matrix.
    assert cast_buffer_bytes([placements_of(stop) for stop in stops], dtypes) == (256 + 64, 192)
    assert cast_buffer_bytes(
        [placements_of(stop) for stop in stops], dict.fromkeys("abcde", torch.float32)
    ) == (
        0,
        0,
    )
    assert cast_buffer_bytes([], {}) == (0, 0)


def test_the_kept_buffers_are_used_again_from_stop_to_stop() -> None:
    stops = [{"a": torch.randn(4, 4), "b": torch.randn(9)}, {"a": torch.randn(4, 4), "b": torch.randn(9)}]
    cast = cast_stops(stops, {"a": torch.bfloat16, "b": torch.bfloat16})
    places = set()
    for stop in (0, 1, 0):
        with cast.visit(stop) as weights:
            matrix = weights["a"]
            assert isinstance(matrix, LazyWeight)
            places.add((matrix.cast().data_ptr(), weights["b"].data_ptr()))
    assert len(places) == 1


def test_the_guess_is_passed_on() -> None:
    inner = InMemory([{}, {}, {}])
    cast = CastStops(inner, [], {}, (0, 0))
    assert cast.num_stops == 3
    with cast.visit(1, (2, 0)):
        pass
    assert inner.calls == [(1, (2, 0))]


# Operations


def swapped(stored: Tensor, dtype: torch.dtype) -> LazyWeight:
    """A weight with a kept buffer that just holds it."""
    num_bytes = -(-stored.numel() * dtype.itemsize // 64) * 64
    return LazyWeight(stored, dtype, torch.full((num_bytes,), 0xFF, dtype=torch.uint8))


Operation = Callable[[Tensor, Tensor], Any]


def kept_over_another(view: Tensor, weight: Tensor) -> Tensor:
    """Use a view after another operation has used the kept buffer."""
    torch.relu(weight[4:])
    return view * 2


# With x of (3, 8, 8) and a weight of (8, 8).
OPERATIONS: dict[str, Operation] = {
    "linear": F.linear,
    "linear of rows": lambda x, w: F.linear(x[0], w),
    "linear with bias": lambda x, w: F.linear(x, w, x[0, 0]),
    "Conv1D": lambda x, w: torch.addmm(x[0, 0], x[0], w),
    "matmul": lambda x, w: x @ w,
    "matmul from the left": lambda x, w: w @ x[0],
    "matmul from the left of a batch": lambda x, w: w @ x,
    "matmul with a vector": lambda x, w: w @ x[0, 0],
    "transposed": lambda x, w: x @ w.t(),
    "transposed twice": lambda x, w: x @ w.mT.transpose(0, 1),
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "rows": lambda x, w: F.linear(x, w[2:5]),
    "columns": lambda x, w: F.linear(x[..., 2:5], w[:, 2:5]),
    "every second column": lambda x, w: F.linear(x[..., ::2], w[:, ::2]),
    "one row": lambda x, w: x @ w[3],
    "chunks of rows": lambda x, w: [F.linear(x, part) for part in w.chunk(2)],
    "chunks of columns": lambda x, w: [F.linear(x[..., :4], part) for part in w.chunk(2, dim=1)],
    "split": lambda x, w: [F.linear(x, part) for part in w.split([3, 5])],
    "unbound": lambda x, w: sum(x @ row for row in w.unbind()),
    "view": lambda x, w: x[0] * w.view(4, 16).view(8, 8),
    "unsafe view": lambda x, w: kept_over_another(torch.ops.aten._unsafe_view(w, [4, 16]), w),
    "view kept": lambda x, w: kept_over_another(w[1:5], w),
    "reshaped": lambda x, w: w.t().reshape(4, 16) * 2,
    "flattened": lambda x, w: w.flatten() + w.t().flatten(),
    "three-dimensional": lambda x, w: torch.bmm(x[:2, :, :4], w.view(2, 8, 4).mT),
    "permuted": lambda x, w: w.view(2, 4, 8).permute(2, 0, 1) + 1,
    "expanded": lambda x, w: torch.bmm(x, w.expand(3, 8, 8)),
    "strided": lambda x, w: w.as_strided((4, 4), (8, 1), w.storage_offset()) * 2,
    "diagonal": lambda x, w: w.diagonal() + x[0, 0],
    "embedding": lambda x, w: F.embedding(torch.tensor([[3, 1], [0, 7]]), w),
    "embedding with padding": lambda x, w: F.embedding(torch.tensor([3, 1]), w, padding_idx=1),
    "picked": lambda x, w: w[torch.tensor([3, 3, 0])],
    "picked columns": lambda x, w: w.index_select(1, torch.tensor([3, 3, 0])),
    "gathered": lambda x, w: w.gather(1, torch.zeros(8, 1, dtype=torch.int64)),
    "with itself": lambda x, w: w @ w.t(),
    "with itself elementwise": lambda x, w: torch.maximum(w, w.t()),
    "concatenated": lambda x, w: torch.cat([w, w[:2], w.t()]),
    "stacked": lambda x, w: torch.stack([w, w.t()], dim=-1),
    "added": lambda x, w: x + w,
    "scaled": lambda x, w: w * 0.3,
    "copied": lambda x, w: w.clone(),
    "contiguous": lambda x, w: w.t().contiguous(),
    "summed": lambda x, w: w.sum(0),
    "norm": lambda x, w: w.float().norm(),
    "doubled precision": lambda x, w: w.to(torch.float64),
    "same dtype": lambda x, w: w.to(x.dtype) + 0,
    "detached": lambda x, w: F.linear(x, w.detach()),
    "parameter": lambda x, w: F.linear(x, nn.Parameter(w, requires_grad=False)),
    "where": lambda x, w: torch.where(x[0] > 0, w, x[0]),
    "added in place to another": lambda x, w: x.clone().add_(w),
    "copied into another": lambda x, w: torch.empty_like(x[0]).copy_(w),
    "written to out": lambda x, w: torch.mm(w, x[0], out=torch.empty_like(x[0])),
    "out of the left": lambda x, w: torch.mm(x[0], w, out=torch.empty_like(x[0])),
    "softmax": lambda x, w: w.softmax(-1),
    "layer norm": lambda x, w: F.layer_norm(w, (8,)),
    "empty like": lambda x, w: torch.zeros_like(w) + x[0],
}


def values_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, list) else [result]


# Forward jobs may run in inference mode, over weights that were handed over in it or before.
MODES = {"plain": (False, False), "inference": (False, True), "inference all over": (True, True)}


@pytest.mark.parametrize(("made_in", "used_in"), MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    ("stored_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_gives_the_bits_of_the_cast_copy(
    operation: Operation, stored_dtype: torch.dtype, dtype: torch.dtype, made_in: bool, used_in: bool
) -> None:
    torch.manual_seed(0)
    # Somewhere inside a larger memory, as in the ring.
    stored = torch.randn(64 + 5).to(stored_dtype)[5:].view(8, 8)
    x = torch.randn(3, 8, 8).to(dtype)
    plain = torch.zeros(64 + 5, dtype=dtype)[5:].view(8, 8)
    plain.copy_(stored)
    with torch.inference_mode(made_in):
        weight = swapped(stored, dtype)
    with torch.inference_mode(used_in):
        ours, theirs = values_of(operation(x, weight)), values_of(operation(x, plain))
    for found, wanted in zip(ours, theirs, strict=True):
        assert not isinstance(found, LazyWeight)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found, wanted)
        # Nothing that is kept lies where the next operation writes.
        assert not is_inside(found, weight.buffer)
    assert torch.equal(stored.to(dtype), plain), "the stored weight is left alone"


@pytest.mark.parametrize(
    "shape", [(1, 128, 256), (37, 128, 256), (512, 256, 64), (5, 1, 7), (3, 129, 65)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_has_the_bits_of_the_resident_one(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num_rows, width, out = shape
    stored = torch.randn(out, width).to(torch.float16)
    x = torch.randn(2, num_rows, width).to(dtype)
    bias = torch.randn(out).to(dtype)
    for added in (None, bias):
        assert torch.equal(F.linear(x, swapped(stored, dtype), added), F.linear(x, stored.to(dtype), added))


def test_gradients_are_those_of_the_cast_copies_though_the_buffer_is_shared() -> None:
    torch.manual_seed(0)
    stored = [torch.randn(8, 8).to(torch.bfloat16) for _ in range(4)]
    buffer = torch.full((8 * 8 * 4,), 0xFF, dtype=torch.uint8)

    def run(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_(True)
        y = x
        for place, weight in enumerate(weights):
            y = F.linear(y, weight).tanh() if place % 2 else torch.addmm(y.mean(0), y, weight)
        y = y * weights[0][:3] + torch.einsum("ti,oi->to", y, weights[1])
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    found = run([LazyWeight(weight, torch.float32, buffer) for weight in stored])
    for ours, theirs in zip(found, run([weight.float() for weight in stored]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_module_takes_swapped_weights_in_place_of_its_own() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).bfloat16()
    x = torch.randn(2, 5, 8).bfloat16()
    stored = {name: value.detach().float() for name, value in module.named_parameters()}
    cast = cast_stops([stored], dict.fromkeys(stored, torch.bfloat16))
    wanted = module(x)
    with cast.visit(0) as weights:
        assert any(isinstance(weight, LazyWeight) for weight in weights.values())
        assert torch.equal(torch.func.functional_call(module, dict(weights), (x,)), wanted)


def test_two_weights_of_one_operation_do_not_share_their_bytes() -> None:
    a, b = torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16()
    wanted = a.float() @ b.float()
    # Room for both, for one and a half, for one, and for none.
    for num_bytes in (128, 96, 64, 0):
        buffer = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        first, second = (LazyWeight(weight, torch.float32, buffer) for weight in (a, b))
        assert torch.equal(first @ second, wanted)


def test_only_the_rows_that_are_picked_are_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.randn(100, 8).bfloat16()
    weight = swapped(stored, torch.float32)
    monkeypatch.setattr(LazyWeight, "cast", lambda *_: pytest.fail("the whole embedding was cast"))
    rows = torch.tensor([3, 99, 3])
    for picked in (F.embedding(rows, weight), weight[rows], weight.index_select(0, rows)):
        assert torch.equal(picked, stored[rows].float())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(0, 3, 0, 5), (8, 0, 0, 0), (1, 2, 3, 2), (0, 0, 0, 0)])
def test_of_experts_only_those_with_rows_are_cast(
    sizes: tuple[int, ...], dtype: torch.dtype, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of groups has the bits, and the gradients, of torch's with the cast copy."""
    stored = torch.randn(4, 16, 24).to(torch.float16)
    x = torch.randn(sum(sizes), 16 if is_transposed else 24, dtype=dtype)
    offs = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    shapes: list[tuple[int, ...]] = []
    cast = LazyWeight.cast

    def recorded(self: LazyWeight, offset: int = 0) -> Tensor:
        shapes.append(tuple(self.shape))
        return cast(self, offset)

    monkeypatch.setattr(LazyWeight, "cast", recorded)
    found = []
    for weight in (stored.to(dtype), swapped(stored, dtype)):
        matrices = weight if is_transposed else weight.transpose(1, 2)
        rows = x.clone().requires_grad_()
        product = F.grouped_mm(rows, matrices, offs=offs)
        product.backward(torch.ones_like(product))
        found.append((product.detach(), rows.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    num_used = sum(size > 0 for size in sizes)
    assert (
        shapes
        == [(16, 24) if is_transposed else (24, 16)] * num_used
        + [(24, 16) if is_transposed else (16, 24)] * num_used
    )


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(4, 4)),
    "zero_": lambda w: w.zero_(),
    "a view": lambda w: w[:2].fill_(0),
    "an element": lambda w: w.__setitem__((0, 0), 1.0),
    "the transposed": lambda w: w.t().mul_(2),
    "normal_": nn.init.normal_,
    "out": lambda w: torch.mm(torch.ones(4, 4), torch.ones(4, 4), out=w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_streamed_weight_cannot_be_written_to(write: Callable[[Tensor], Any]) -> None:
    stored = torch.randn(4, 4).bfloat16()
    before = stored.clone()
    with pytest.raises(UnsupportedError, match=r"a streamed weight cannot be written to \(aten\."):
        write(swapped(stored, torch.float32))
    assert torch.equal(stored, before)


def test_the_bytes_of_a_streamed_weight_are_not_shown_as_another_dtype() -> None:
    # They would be those of the storage dtype.
    with pytest.raises(UnsupportedError, match="cannot be seen as another dtype"):
        swapped(torch.randn(4, 4).bfloat16(), torch.float32).view(torch.int32)


def test_a_swapped_weight_says_what_it_is() -> None:
    weight = swapped(torch.zeros(4, 2).bfloat16(), torch.float32)
    assert repr(weight) == "LazyWeight((4, 2), torch.bfloat16 as torch.float32)"
    assert (weight.dtype, weight.itemsize, weight.is_contiguous()) == (torch.float32, 4, True)
    assert math.prod(weight.shape) == weight.numel() == 8


def test_values_leave_torch_in_the_compute_dtype() -> None:
    stored = torch.randn(3, 4).bfloat16()
    weight = LazyWeight(stored, torch.float32, torch.empty(0, dtype=torch.uint8))
    assert weight.numpy().tolist() == weight.tolist() == stored.float().tolist()
