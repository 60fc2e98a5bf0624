"""Hand weights over in the dtype that the model computes in, one matrix at a time.

A layer between the stops and the carousel. Where storage and compute dtype differ, a small tensor is cast when its
stop comes; a matrix is handed over as a `SwappedWeight`, which claims the compute dtype and is cast into one kept
buffer by each operation that reads it. The buffer is overwritten by the next operation, so nothing may keep it:
autograd, which sits above, saves the `SwappedWeight` and has it cast again in backward.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from slowllm.checkpoint import Placement
from slowllm.errors import UnsupportedError
from slowllm.stops import Stops, Weights

# These pick elements and change none, so that only what they pick is cast: rows of an embedding.
_PICKS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
}
# Has no alias in its schema, and is one all the same.
_UNSAFE_VIEWS = {torch.ops.aten._unsafe_view.default}


def swap_bytes(stops: Sequence[Sequence[Placement]], dtypes: Mapping[str, torch.dtype]) -> tuple[int, int]:
    """Return the sizes of the kept buffers: for all small tensors of a stop, and for the largest matrix."""
    small, large = 0, 0
    for stop in stops:
        sizes = [
            _cast_bytes(p, dtypes[p.name]) for p in stop if dtypes[p.name] != p.dtype and _is_small(p.shape)
        ]
        small = max(small, sum(sizes))
        for p in stop:
            if dtypes[p.name] != p.dtype and not _is_small(p.shape):
                large = max(large, _cast_bytes(p, dtypes[p.name]))
    return small, large


def _is_small(shape: Sequence[int]) -> bool:
    return len(shape) < 2


def _cast_bytes(placement: Placement, dtype: torch.dtype) -> int:
    # Each tensor begins on a cache line.
    return -(-math.prod(placement.shape) * dtype.itemsize // 64) * 64


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements from the first to the last of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


class SwappedWeight(Tensor):
    """A weight that is stored in one dtype and computed with in another.

    Views of it are again such weights, rows are picked as stored and then cast, and every other operation reads
    it through the kept buffer; where two are read at once and the second does not fit, through a fresh tensor.
    """

    stored: Tensor
    buffer: Tensor

    # Without this, torch would make results of this class as well.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: Tensor, dtype: torch.dtype, buffer: Tensor) -> SwappedWeight:
        """Wrap `stored`; `buffer` is uint8 and at least as large as the cast weight."""
        weight: SwappedWeight = Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=dtype,
            device=stored.device,
        )
        weight.stored, weight.buffer = stored, buffer
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SwappedWeight({tuple(self.shape)}, {self.stored.dtype} as {self.dtype})"

    def cast(self, offset: int = 0) -> Tensor:
        """Return the weight in the compute dtype, at `offset` bytes of the kept buffer."""
        shape, strides = self.stored.shape, self.stored.stride()
        # A view keeps its layout, so that the product is the one that a view of a resident weight gives; only an
        # expanded one, whose elements lie on each other, is written out.
        if any(stride == 0 and length > 1 for length, stride in zip(shape, strides, strict=True)):
            strides = torch.empty(shape, device="meta").stride()
        extent = _extent(shape, strides)
        num_bytes = extent * self.dtype.itemsize
        room = self.buffer[offset : offset + num_bytes]
        flat = room.view(self.dtype) if len(room) == num_bytes else torch.empty(extent, dtype=self.dtype)
        return flat.as_strided(shape, strides).copy_(self.stored)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given.get(argument.name), SwappedWeight):
                raise UnsupportedError(f"a streamed weight cannot be written to ({func})")
        is_view = func in _UNSAFE_VIEWS or any(
            value.alias_info is not None and not value.alias_info.is_write for value in schema.returns
        )
        if is_view:
            # In inference mode composite operations come whole, and `to`, say, is a view only where it does nothing.
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            first = args[0]
            assert isinstance(first, SwappedWeight), "a view is of its first argument"
            if func is torch.ops.aten.view.dtype:
                raise UnsupportedError(
                    f"the bytes of a streamed weight cannot be seen as another dtype ({func})"
                )
            # Outside of inference mode: a view that is an inference tensor cannot have a normal tensor for its base.
            with torch.inference_mode(False):
                views = func(first.stored, *args[1:], **kwargs)
                return tree_map(
                    lambda value: (
                        SwappedWeight(value, first.dtype, first.buffer)
                        if isinstance(value, Tensor)
                        else value
                    ),
                    views,
                )
        if func in _PICKS and isinstance(args[0], SwappedWeight):
            return func(args[0].stored, *args[1:], **kwargs).to(args[0].dtype)
        offset = 0

        def plain(value: Any) -> Any:
            nonlocal offset
            if not isinstance(value, SwappedWeight):
                return value
            found = value.cast(offset)
            offset += -(-_extent(found.shape, found.stride()) * found.dtype.itemsize // 64) * 64
            return found

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


class CastStops:
    """Stops whose weights are in the compute dtype.

    Args:
        stops: that hand out weights as stored.
        dtypes: compute dtype of every tensor, by name.
        buffer_bytes: from `swap_bytes`.
    """

    def __init__(
        self, stops: Stops, dtypes: Mapping[str, torch.dtype], buffer_bytes: tuple[int, int]
    ) -> None:
        self.num_stops = stops.num_stops
        self._stops = stops
        self._dtypes = dtypes
        self._small, self._large = (torch.empty(size, dtype=torch.uint8) for size in buffer_bytes)

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a stop; see `Stops.visit`."""
        with self._stops.visit(stop, upcoming) as stored:
            offset = 0
            weights: dict[str, Tensor] = {}
            for name, tensor in stored.items():
                dtype = self._dtypes[name]
                if tensor.dtype == dtype:
                    weights[name] = tensor
                elif _is_small(tensor.shape):
                    num_bytes = tensor.numel() * dtype.itemsize
                    kept = self._small[offset : offset + num_bytes].view(dtype).view(tensor.shape)
                    weights[name] = kept.copy_(tensor)
                    offset += -(-num_bytes // 64) * 64
                else:
                    weights[name] = SwappedWeight(tensor, dtype, self._large)
            yield weights
