"""A weight that is cast, decoded or multiplied as it is stored, where an operation reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from slowllm.errors import UnsupportedError
from slowllm.storage.codecs import torch_kernels
from slowllm.storage.codecs.base import TILE_BYTES, Codec, Parts, Team

# These pick elements and change none, so that only what they pick is cast: rows of an embedding.
_PICKS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
}


# Where a coded weight may be multiplied as it is: the places of the other matrix, of the weight, and of the bias.
_PRODUCTS: dict[Any, tuple[int, int, int]] = {
    torch.ops.aten.linear.default: (0, 1, 2),
    torch.ops.aten.mm.default: (0, 1, 2),
    torch.ops.aten.addmm.default: (1, 2, 0),
}


# Has no alias in its schema, and is one all the same.
_UNSAFE_VIEWS = {torch.ops.aten._unsafe_view.default}


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements from the first to the last of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix as its codec stored it, in memory.

    Attributes:
        codec: that decodes it.
        parts: the stored arrays.
        team: threads that share the decoding.
    """

    codec: Codec
    parts: Parts
    team: Team

    def decode(self, out: Tensor, first: int, last: int) -> None:
        """Write the rows `first` to `last` to `out` (last - first, K), contiguous and of any floating dtype."""
        if out.device.type != "cpu":
            parts = self.parts
            torch_kernels.decode(self.codec.name, parts.arrays, parts.num_rows, parts.width, out, first, last)
            return
        if out.dtype == torch.bfloat16:
            self.codec.decode(self.parts, out, first, last, self.team)
            return
        rows = max(1, TILE_BYTES // (2 * self.parts.width))
        tile = torch.empty(min(rows, last - first), self.parts.width, dtype=torch.bfloat16)
        for begin in range(first, last, rows):
            end = min(begin + rows, last)
            self.codec.decode(self.parts, tile[: end - begin], begin, end, self.team)
            out[begin - first : end - first] = tile[: end - begin]


class LazyWeight(Tensor):
    """A weight that is stored in one dtype, or coded, and computed with in another.

    Views of it are again such weights, rows are picked as stored and then cast, and every other operation reads
    it through the kept buffer; where two are read at once and the second does not fit, through a fresh tensor. Of a
    coded weight, `stored` is a meta tensor: views of it say which elements are meant.
    """

    stored: Tensor
    buffer: Tensor
    coded: CodedMatrix | None

    # Without this, torch would make results of this class as well.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, stored: Tensor, dtype: torch.dtype, buffer: Tensor, coded: CodedMatrix | None = None
    ) -> LazyWeight:
        """Wrap `stored`; `buffer` is uint8 and at least as large as the cast weight."""
        weight: LazyWeight = Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=dtype,
            device=buffer.device,
        )
        weight.stored, weight.buffer, weight.coded = stored, buffer, coded
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, {self.stored.dtype} as {self.dtype})"

    def cast(self, offset: int = 0) -> Tensor:
        """Return the weight in the compute dtype, at `offset` bytes of the kept buffer."""
        if self.coded is not None:
            return self._decode(self.coded, offset)
        shape, strides = self.stored.shape, self.stored.stride()
        # A view keeps its layout, so that the product is the one that a view of a resident weight gives; only an
        # expanded one, whose elements lie on each other, is written out.
        if any(stride == 0 and length > 1 for length, stride in zip(shape, strides, strict=True)):
            strides = torch.empty(shape, device="meta").stride()
        return self._room(_extent(shape, strides), offset).as_strided(shape, strides).copy_(self.stored)

    def _decode(self, coded: CodedMatrix, offset: int) -> Tensor:
        """Decode the rows that the view touches, and return it on them."""
        shape, strides, start = self.stored.shape, self.stored.stride(), self.stored.storage_offset()
        width = coded.parts.width
        first, last = start // width, -(-(start + _extent(shape, strides)) // width)
        flat = self._room((last - first) * width, offset)
        coded.decode(flat.view(-1, width), first, last)
        return flat.as_strided(shape, strides, flat.storage_offset() + start - first * width)

    def _room(self, num_elements: int, offset: int) -> Tensor:
        num_bytes = num_elements * self.dtype.itemsize
        room = self.buffer[offset : offset + num_bytes]
        return (
            room.view(self.dtype)
            if len(room) == num_bytes
            else torch.empty(num_elements, dtype=self.dtype, device=self.device)
        )

    def _rows(self, is_transposed: bool) -> tuple[int, int] | None:
        """Return the rows of the coded matrix that a two-dimensional view is, if it is whole rows of it."""
        shape, strides, start = self.stored.shape, self.stored.stride(), self.stored.storage_offset()
        assert self.coded is not None, "asked of coded weights only"
        width = self.coded.parts.width
        order = (1, 0) if is_transposed else (0, 1)
        if len(shape) != 2 or start % width or shape[order[1]] != width:
            return None
        if strides[order[1]] != 1 or (strides[order[0]] != width and shape[order[0]] > 1):
            return None
        return start // width, start // width + shape[order[0]]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given.get(argument.name), LazyWeight):
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
            assert isinstance(first, LazyWeight), "a view is of its first argument"
            if func is torch.ops.aten.view.dtype:
                raise UnsupportedError(
                    f"the bytes of a streamed weight cannot be seen as another dtype ({func})"
                )
            # Outside of inference mode: a view that is an inference tensor cannot have a normal tensor for its base.
            with torch.inference_mode(False):
                views = func(first.stored, *args[1:], **kwargs)
                return tree_map(
                    lambda value: (
                        LazyWeight(value, first.dtype, first.buffer, first.coded)
                        if isinstance(value, Tensor)
                        else value
                    ),
                    views,
                )
        if func in _PRODUCTS and (product := _product(func, args, kwargs)) is not None:
            return product
        if func in _PICKS and isinstance(args[0], LazyWeight) and args[0].coded is None:
            return func(args[0].stored, *args[1:], **kwargs).to(args[0].dtype)
        offset = 0

        def plain(value: Any) -> Any:
            nonlocal offset
            if not isinstance(value, LazyWeight):
                return value
            found = value.cast(offset)
            offset += -(-_extent(found.shape, found.stride()) * found.dtype.itemsize // 64) * 64
            return found

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def _product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a product with a coded weight that its codec can make without decoding it; else None."""
    at_x, at_weight, at_bias = _PRODUCTS[func]
    x, weight = args[at_x], args[at_weight]
    bias = args[at_bias] if at_bias < len(args) else kwargs.get("bias")
    plain = (x, bias)
    if not isinstance(weight, LazyWeight) or weight.coded is None:
        return None
    if any(isinstance(value, LazyWeight) for value in plain) or kwargs.keys() & {"alpha", "beta"}:
        return None
    rows = weight._rows(is_transposed=func is not torch.ops.aten.linear.default)
    if rows is None or x.dtype != weight.dtype or not x.numel():
        return None
    coded = weight.coded
    found = coded.codec.multiply(x.reshape(-1, x.shape[-1]), coded.parts, *rows, coded.team)
    if found is None:
        return None
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], -1)
