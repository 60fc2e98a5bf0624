"""Hand weights over in the dtype that the model computes in, one matrix at a time.

A layer between the stops and the carousel. Where storage and compute dtype differ, a small tensor is cast when its
stop is visited; a matrix is handed over as a `LazyWeight`, which claims the compute dtype and is cast into one shared
buffer by each operation that reads it. The next operation overwrites the buffer, so nothing may keep a view of it:
autograd, which sits above, saves the `LazyWeight` and has it cast again in backward. A coded matrix of a store is
handed over in the same way: an operation that reads it decodes it, or multiplies it as stored where its codec can.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from slowllm.errors import CheckpointError
from slowllm.rounding import round_up
from slowllm.storage.codecs import layout_constants
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import codec_of
from slowllm.storage.codecs.team import Team
from slowllm.storage.spans import TORCH_DTYPES, CodedArray, Placement
from slowllm.streaming.buffers import Buffer
from slowllm.streaming.kept_matrix import KeptMatrix
from slowllm.streaming.lazy_weight import CACHE_LINE_BYTES, CodedMatrix, LazyWeight
from slowllm.streaming.stops import Stops, Weights

log = logging.getLogger(__name__)


def cast_buffer_bytes(
    stops: Sequence[Sequence[Placement]], dtypes: Mapping[str, torch.dtype], picked: Collection[str] = ()
) -> tuple[int, int]:
    """Return the sizes of the cast buffers: for all small tensors of a stop, and for the largest matrix.

    Args:
        stops: the tensors of each.
        dtypes: compute dtype of every tensor, by name.
        picked: tensors of several matrices, of which each operation reads one.
    """
    small, large = 0, 0
    for stop in stops:
        small_of_stop = 0
        for p in stop:
            if p.coding is None and dtypes[p.name] == p.dtype:
                continue
            is_picked = p.name in picked
            num_bytes = round_up(
                math.prod(p.shape[1:] if is_picked else p.shape) * dtypes[p.name].itemsize, CACHE_LINE_BYTES
            )
            # One of several may begin within a cache line.
            num_bytes += CACHE_LINE_BYTES if is_picked else 0
            if _is_small(p.shape):
                small_of_stop += num_bytes
            else:
                large = max(large, num_bytes)
        small = max(small, small_of_stop)
    return small, large


def kept_buffer_bytes(stops: Sequence[Sequence[Placement]], dtypes: Mapping[str, torch.dtype]) -> int:
    """Return the size of a buffer for all coded matrices of the largest stop, decoded; experts are left out."""
    return max((sum(_kept_bytes(p, dtypes[p.name]) for p in stop) for stop in stops), default=0)


def _kept_bytes(placement: Placement, dtype: torch.dtype) -> int:
    """Return the bytes of a matrix that riders may share, decoded, on whole cache lines; 0 of another tensor."""
    if placement.coding is None or len(placement.shape) != 2 or not codec_of(placement.coding).is_decoded:
        return 0
    return round_up(math.prod(placement.shape) * dtype.itemsize, CACHE_LINE_BYTES)


def _is_small(shape: Sequence[int]) -> bool:
    return len(shape) < 2


def _allocate(device: torch.device, num_bytes: int) -> Tensor:
    """Return uint8 memory; on the CPU already faulted in, or the first matrices would wait for it page by page."""
    if device.type != "cpu":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return torch.from_numpy(Buffer(num_bytes).bytes[:num_bytes])


def coded_shape(placement: Placement) -> tuple[int, ...]:
    """Return the shape of a coded parameter as its matrices are coded."""
    if placement.coding is None or not placement.coding.is_transposed:
        return placement.shape
    return (*placement.shape[:-2], placement.shape[-1], placement.shape[-2])


def _refuse_damaged(placement: Placement, stored: Tensor) -> None:
    """Refuse a coded parameter with scales that are no numbers, or that are not there, before any product is made of them.

    Raises:
        CheckpointError: one is NaN or infinite, or zero where it is divided by, or a column has one that there is not.
    """
    assert placement.coding is not None, "asked of coded tensors only"
    for coding in (placement.coding, *(rows.coding for rows in placement.coding.rows)):
        codec, arrays = codec_of(coding), {array.name: array for array in coding.parts}
        for array in coding.parts:
            values = _values_of(array, stored)
            if values.is_floating_point():
                if not bool(values.isfinite().all()):
                    raise _damage(placement, array, f"has NaN or infinity among its {array.name}")
                if array.name in codec.divisors and not bool(values.all()):
                    raise _damage(placement, array, f"is zero, and its {array.name} is divided by")
            elif array.dtype == "U8" and array.name in codec.nan_bytes:
                if any(bool((values == code).any()) for code in codec.nan_bytes[array.name]):
                    raise _damage(placement, array, f"has NaN among its {array.name}")
            elif array.name in codec.picks:
                dimension, least = codec.picks[array.name]
                count = arrays["scales"].shape[dimension]
                low, high = (int(bound) for bound in values.aminmax())
                if low < least or high >= count:
                    wrong = low if low < least else high
                    raise _damage(placement, array, f"names group {wrong} of a matrix that has {count}")


def _values_of(array: CodedArray, stored: Tensor) -> Tensor:
    dtype = TORCH_DTYPES[array.dtype]
    return stored[array.offset : array.offset + math.prod(array.shape) * dtype.itemsize].view(dtype)


def _damage(placement: Placement, array: CodedArray, said: str) -> CheckpointError:
    run = next(run for run in placement.runs if run.target <= array.offset < run.target + run.num_bytes)
    return CheckpointError(f"{run.span.path.name}: {run.span.name} {said}; fetch this shard again")


def coded_matrix(placement: Placement, stored: Tensor, team: Team) -> CodedMatrix:
    """Return a coded parameter whose bytes are in memory."""
    assert placement.coding is not None, "only coded tensors come here"
    parts = Parts.of(stored, placement.coding, coded_shape(placement))
    return CodedMatrix(codec_of(placement.coding), parts, team)


def coded_weight(
    placement: Placement,
    stored: Tensor,
    dtype: torch.dtype,
    buffer: Tensor,
    team: Team,
    kept: KeptMatrix | None = None,
) -> LazyWeight:
    """Return a coded parameter whose bytes are in memory as a weight that is decoded when it is used, or once, to `kept`."""
    coded = coded_matrix(placement, stored, team)
    shape = torch.empty(coded_shape(placement), dtype=placement.dtype, device="meta")
    # Also where the matrices are square.
    if placement.coding is not None and placement.coding.is_transposed:
        shape = shape.transpose(-1, -2)
    return LazyWeight(shape, dtype, buffer, coded, kept)


class CastStops(Stops):
    """Stops whose weights are in the compute dtype. Owns the threads that decode; close it.

    Args:
        stops: that hand out weights as stored.
        placements: of every tensor of a stop.
        dtypes: compute dtype of every tensor, by name.
        buffer_bytes: from `cast_buffer_bytes`.
        devices: where stops hand their weights out; each has buffers of its own.
        kept_bytes: of a buffer in which the coded matrices of a stop stay decoded while several riders pass it, from
            `kept_buffer_bytes`; 0 to have each decoded for each rider. On the processor only.

    Attributes:
        num_waiting: returns how many riders wait at a stop; where one does, nothing is kept.
    """

    def __init__(
        self,
        stops: Stops,
        placements: Sequence[Sequence[Placement]],
        dtypes: Mapping[str, torch.dtype],
        buffer_bytes: tuple[int, int],
        devices: Sequence[torch.device] = (torch.device("cpu"),),
        kept_bytes: int = 0,
    ) -> None:
        self.num_stops = stops.num_stops
        self._stops, self._dtypes = stops, dtypes
        self._coded = {p.name: p for stop in placements for p in stop if p.coding is not None}
        self._team = Team(torch.get_num_threads()) if self._coded else None
        self._checked: set[str] = set()
        if self._coded and not layout_constants.IS_COMPILED and torch.device("cpu") in devices:
            log.warning(
                "numba is not installed, so weights are decoded by numpy, several times slower; "
                "install it with: pip install numba"
            )
        self._small, self._large = (
            {device: _allocate(device, size) for device in devices} for size in buffer_bytes
        )
        self._kept = _allocate(torch.device("cpu"), kept_bytes) if kept_bytes else None
        self.num_waiting: Callable[[int], int] = lambda stop: 1

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        with self._stops.visit(stop, upcoming) as stored, contextlib.ExitStack() as leaving:
            offset, kept_offset = 0, 0
            is_shared = self._kept is not None and self.num_waiting(stop) > 1
            weights: dict[str, Tensor] = {}
            for name, tensor in stored.items():
                dtype = self._dtypes[name]
                if name in self._coded:
                    kept = self._room(self._coded[name], tensor, dtype, kept_offset) if is_shared else None
                    if kept is not None:
                        leaving.callback(kept.leave)
                        kept_offset += _kept_bytes(self._coded[name], dtype)
                    weights[name] = self._coded_weight(self._coded[name], tensor, dtype, kept)
                elif tensor.dtype == dtype:
                    weights[name] = tensor
                elif _is_small(tensor.shape):
                    num_bytes = tensor.numel() * dtype.itemsize
                    memory = self._small[tensor.device][offset : offset + num_bytes]
                    weights[name] = memory.view(dtype).view(tensor.shape).copy_(tensor)
                    offset += round_up(num_bytes, CACHE_LINE_BYTES)
                else:
                    weights[name] = LazyWeight(tensor, dtype, self._large[tensor.device])
            yield weights

    def _room(
        self, placement: Placement, stored: Tensor, dtype: torch.dtype, offset: int
    ) -> KeptMatrix | None:
        """Return room for a decoded matrix at `offset` of the buffer; None where there is none."""
        num_bytes = _kept_bytes(placement, dtype)
        if self._kept is None or not num_bytes or stored.device.type != "cpu":
            return None
        if offset + num_bytes > len(self._kept):
            return None
        size = math.prod(placement.shape) * dtype.itemsize
        memory = self._kept[offset : offset + size].view(dtype)
        return KeptMatrix(memory.view(-1, coded_shape(placement)[-1]))

    def _coded_weight(
        self, placement: Placement, stored: Tensor, dtype: torch.dtype, kept: KeptMatrix | None
    ) -> LazyWeight:
        assert self._team is not None, "created where anything is coded"
        if placement.name not in self._checked:
            _refuse_damaged(placement, stored)
            self._checked.add(placement.name)
        return coded_weight(placement, stored, dtype, self._large[stored.device], self._team, kept)

    def close(self) -> None:
        """End the threads that decode."""
        if self._team is not None:
            self._team.close()
