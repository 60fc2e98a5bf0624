"""A weight that is cast, decoded or multiplied as stored at the moment an operation reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from slowllm.errors import UnsupportedError
from slowllm.rounding import ceil_div, round_up
from slowllm.storage.codecs import torch_kernels
from slowllm.storage.codecs.base import TILE_BYTES, Codec, Parts
from slowllm.storage.codecs.team import Team
from slowllm.streaming.kept_matrix import KeptMatrix

# Each tensor in a cast buffer begins on a cache line.
CACHE_LINE_BYTES = 64
# These operations pick elements and change none, so only the picked ones are cast: rows of an embedding.
_PICKS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
}
# Products that a codec may compute without decoding the weight: the argument positions of the other matrix, of the
# weight, and of the bias.
_PRODUCTS: dict[Any, tuple[int, int, int]] = {
    torch.ops.aten.linear.default: (0, 1, 2),
    torch.ops.aten.mm.default: (0, 1, 2),
    torch.ops.aten.addmm.default: (1, 2, 0),
}
# A product of groups of rows, each with a matrix of its own: the experts of a mixture.
_GROUPED = torch.ops.aten._grouped_mm.default
# Its schema declares no alias, but it returns a view.
_UNSAFE_VIEWS = {torch.ops.aten._unsafe_view.default}


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first to the last of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix in memory, as its codec stored it.

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
            torch_kernels.decode(self.codec.name, self.parts, out, first, last)
            return
        if out.dtype == torch.bfloat16 or self.codec.decodes_to_any:
            self.codec.decode(self.parts, out, first, last, self.team)
            return
        rows = max(1, TILE_BYTES // (2 * self.parts.width))
        tile = torch.empty(min(rows, last - first), self.parts.width, dtype=torch.bfloat16)
        for begin in range(first, last, rows):
            end = min(begin + rows, last)
            self.codec.decode(self.parts, tile[: end - begin], begin, end, self.team)
            out[begin - first : end - first] = tile[: end - begin]

    def pick(self, rows: Tensor, dtype: torch.dtype, shape: Sequence[int] = (-1,)) -> Tensor | None:
        """Return some rows (N,), as (*shape, K) in a dtype; None where a row is not coded by itself."""
        parts = self.codec.pick(self.parts, rows)
        if parts is None:
            return None
        out = torch.empty(len(rows), parts.width, dtype=dtype, device=rows.device)
        replace(self, parts=parts).decode(out, 0, len(rows))
        return out.view(*shape, parts.width)


class LazyWeight(Tensor):
    """A weight that is stored in one dtype, or coded, and computed with in another.

    A view of it is a lazy weight too. Operations that pick rows pick them as stored and cast the result. Every other
    operation reads the weight from the cast buffer; where one operation reads two weights and the second does not
    fit there, from a fresh tensor. `stored` of a coded weight is a meta tensor, whose views say which elements are
    meant. A coded weight that several riders use is decoded once, to `kept`.
    """

    stored: Tensor
    buffer: Tensor
    coded: CodedMatrix | None
    kept: KeptMatrix | None

    # Without this, torch would wrap the results of operations in this class as well.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        stored: Tensor,
        dtype: torch.dtype,
        buffer: Tensor,
        coded: CodedMatrix | None = None,
        kept: KeptMatrix | None = None,
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
        weight.stored, weight.buffer, weight.coded, weight.kept = stored, buffer, coded, kept
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, {self.stored.dtype} as {self.dtype})"

    # These do not pass through torch's dispatcher.
    def numpy(self, *, force: bool = False) -> Any:
        """Return an array of the weight's values in the compute dtype."""
        return self.detach().clone().numpy(force=force)

    def tolist(self) -> Any:
        """Return the weight's values as nested lists."""
        return self.detach().clone().tolist()

    @property
    def is_multiplied_as_stored(self) -> bool:
        """Whether its codec multiplies in a way of its own, with other bits than those of the decoded matrix."""
        return self.coded is not None and type(self.coded.codec).multiply is not Codec.multiply

    def cast(self, offset: int = 0) -> Tensor:
        """Return the weight in the compute dtype, at `offset` bytes of the cast buffer."""
        if self.coded is not None:
            return self._decode(self.coded, offset)
        shape, strides = self.stored.shape, self.stored.stride()
        # A view keeps its layout, so that a product has the bits of one with a view of a resident weight. Only an
        # expanded view, whose elements overlap, is written out.
        if any(stride == 0 and length > 1 for length, stride in zip(shape, strides, strict=True)):
            strides = torch.empty(shape, device="meta").stride()
        return self._allocate(_extent(shape, strides), offset).as_strided(shape, strides).copy_(self.stored)

    def _decode(self, coded: CodedMatrix, offset: int) -> Tensor:
        """Decode the rows that the view touches, and return the view of them."""
        shape, strides, start = self.stored.shape, self.stored.stride(), int(self.stored.storage_offset())
        width = coded.parts.width
        if self.kept is not None:
            whole = self.kept.rows(lambda out: coded.decode(out, 0, coded.parts.num_rows))
            if whole is not None:
                return whole.as_strided(shape, strides, int(whole.storage_offset()) + start)
        first, last = start // width, ceil_div(start + _extent(shape, strides), width)
        flat = self._allocate((last - first) * width, offset)
        coded.decode(flat.view(-1, width), first, last)
        return flat.as_strided(shape, strides, flat.storage_offset() + start - first * width)

    def _picked(self, func: Any, args: Sequence[Any]) -> Tensor | None:
        """Return the rows that an operation picks of a whole coded matrix, decoded alone; None where this cannot be."""
        assert self.coded is not None, "asked of coded weights only"
        if func is torch.ops.aten.embedding.default:
            ids = args[0]
        elif func is torch.ops.aten.index_select.default and args[0] == 0:
            ids = args[1]
        elif func is torch.ops.aten.index.Tensor and len(args[0]) == 1:
            ids = args[0][0]
        else:
            return None
        num_rows = self.coded.parts.num_rows
        if (
            self._rows(is_transposed=False) != (0, num_rows)
            or ids.is_floating_point()
            or ids.dtype == torch.bool
        ):
            return None
        flat = ids.reshape(-1).long()
        if func is torch.ops.aten.index.Tensor:
            flat = torch.where(flat < 0, flat + num_rows, flat)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_rows:
            raise IndexError(f"a row is picked that is not among {num_rows}")
        return self.coded.pick(flat, self.dtype, ids.shape)

    def _allocate(self, num_elements: int, offset: int) -> Tensor:
        """Return memory at `offset` of the cast buffer, or fresh memory where the buffer is too short."""
        num_bytes = num_elements * self.dtype.itemsize
        memory = self.buffer[offset : offset + num_bytes]
        if len(memory) == num_bytes:
            return memory.view(self.dtype)
        return torch.empty(num_elements, dtype=self.dtype, device=self.device)

    def _rows(self, is_transposed: bool) -> tuple[int, int] | None:
        """Return which rows of the coded matrix a two-dimensional view shows; None if they are not whole rows."""
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
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(arguments.get(argument.name), LazyWeight):
                raise UnsupportedError(f"a streamed weight cannot be written to ({func})")
        if func in _UNSAFE_VIEWS or any(
            value.alias_info is not None and not value.alias_info.is_write for value in schema.returns
        ):
            return _view(func, args, kwargs)
        if func in _PRODUCTS and (product := _product(func, args, kwargs)) is not None:
            return product
        if func is _GROUPED and (product := _grouped_product(*args, **kwargs)) is not None:
            return product
        if func in _PICKS and isinstance(args[0], LazyWeight):
            if args[0].coded is None:
                return func(args[0].stored, *args[1:], **kwargs).to(args[0].dtype)
            if (picked := args[0]._picked(func, args[1:])) is not None:
                return picked
        offset = 0

        def plain(value: Any) -> Any:
            nonlocal offset
            if not isinstance(value, LazyWeight):
                return value
            cast = value.cast(offset)
            offset += round_up(_extent(cast.shape, cast.stride()) * cast.dtype.itemsize, CACHE_LINE_BYTES)
            return cast

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def _view(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # In inference mode composite operations are not split up first: `to`, for one, is a view only where it changes nothing.
    result = func.decompose(*args, **kwargs)
    if result is not NotImplemented:
        return result
    weight = args[0]
    assert isinstance(weight, LazyWeight), "a view is of its first argument"
    if func is torch.ops.aten.view.dtype:
        raise UnsupportedError(f"the bytes of a streamed weight cannot be seen as another dtype ({func})")

    def wrap(value: Any) -> Any:
        is_tensor = isinstance(value, Tensor)
        return (
            LazyWeight(value, weight.dtype, weight.buffer, weight.coded, weight.kept) if is_tensor else value
        )

    # Outside of inference mode: a view that is an inference tensor cannot have a normal tensor for its base.
    with torch.inference_mode(False):
        return tree_map(wrap, func(weight.stored, *args[1:], **kwargs))


def _grouped_product(
    x: Any,
    weight: Any,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Return a grouped product for which only the matrices are cast that have rows, one after the other; else None.

    On the processor, torch's own is a loop of these very products; a device has a kernel for all of them.
    """
    if isinstance(x, LazyWeight) or not isinstance(weight, LazyWeight) or weight.device.type != "cpu":
        return None
    if x.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None or out_dtype is not None:
        return None
    out = torch.empty(len(x), weight.shape[2], dtype=weight.dtype)
    begin = 0
    for number, end in enumerate(offs.tolist()):
        if begin < end:
            one = LazyWeight(weight.stored[number], weight.dtype, weight.buffer, weight.coded)
            if (product := _tiled(x[begin:end], one)) is not None:
                out[begin:end] = product
                begin = end
                continue
            # Where a matrix begins on a cache line is where it begins in the whole: products may depend on it.
            place = int(one.stored.storage_offset()) * weight.dtype.itemsize % CACHE_LINE_BYTES
            torch.mm(x[begin:end], one.cast(place), out=out[begin:end])
        begin = end
    return out


def _tiled(x: Any, weight: LazyWeight) -> Tensor | None:
    """Return `x` times a coded matrix, decoded tile by tile to the bits of the whole; None where this cannot be."""
    coded = weight.coded
    if coded is None or weight.is_multiplied_as_stored or x.dtype != weight.dtype:
        return None
    if (rows := weight._rows(is_transposed=True)) is None:
        return None
    return coded.codec.multiply(x, coded.parts, *rows, coded.team)


def multiply_each(xs: Sequence[Tensor], weight: Tensor, *, is_transposed: bool = False) -> list[Tensor]:
    """Multiply several inputs with one weight, each with the bits that it has alone; the weight is cast or decoded once.

    Args:
        xs: (M, K) in the compute dtype.
        weight: (R, K), or (K, R) if transposed, in memory or lazy.
        is_transposed: whether it is multiplied as it is, and not as `linear` does.
    Returns:
        (M, R) for each.
    """
    multiply = torch.mm if is_transposed else torch.nn.functional.linear
    if len(xs) > 1 and isinstance(weight, LazyWeight) and not weight.is_multiplied_as_stored:
        if (found := _in_tiles(xs, weight, is_transposed=is_transposed)) is not None:
            return found
        weight = weight.cast()
    return [multiply(x, weight) for x in xs]


def _in_tiles(xs: Sequence[Tensor], weight: LazyWeight, *, is_transposed: bool) -> list[Tensor] | None:
    """Return the products of inputs with a coded matrix that is decoded tile by tile; None where this cannot be."""
    coded = weight.coded
    if coded is None or weight.kept is not None or any(x.dtype != weight.dtype or not x.numel() for x in xs):
        return None
    if (rows := weight._rows(is_transposed=is_transposed)) is not None:
        return coded.codec.multiply_each(xs, coded.parts, *rows, coded.team)
    if is_transposed and (rows := weight._rows(is_transposed=False)) is not None:
        return coded.codec.multiply_each(xs, coded.parts, *rows, coded.team, is_plain=True)
    return None


def _product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a product with a coded weight that can be computed without decoding all of it first; else None."""
    x_place, weight_place, bias_place = _PRODUCTS[func]
    x, weight = args[x_place], args[weight_place]
    bias = args[bias_place] if bias_place < len(args) else kwargs.get("bias")
    if not isinstance(weight, LazyWeight) or weight.coded is None:
        return None
    if any(isinstance(value, LazyWeight) for value in (x, bias)) or kwargs.keys() & {"alpha", "beta"}:
        return None
    if weight.kept is not None:  # decoded once for several riders
        return None
    if x.dtype != weight.dtype or not x.numel() or (bias is not None and bias.dim() != 1):
        return None
    coded, flat = weight.coded, x.reshape(-1, x.shape[-1])
    # There torch rounds the product before it adds the bias, elsewhere only the sum.
    later = bias if x.dim() > 2 and not x.is_contiguous() else None
    bias = None if later is not None else bias
    if (rows := weight._rows(is_transposed=func is not torch.ops.aten.linear.default)) is not None:
        product = coded.codec.multiply(flat, coded.parts, *rows, coded.team, bias)
    elif func is torch.ops.aten.mm.default and (rows := weight._rows(is_transposed=False)) is not None:
        product = coded.codec.multiply_plain(flat, coded.parts, *rows, coded.team)
    else:
        return None
    if product is None:
        return None
    if later is not None:
        product += later
    return product.view(*x.shape[:-1], -1)
