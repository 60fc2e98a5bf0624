"""A tensor that a checkpoint stores as several in a format of its maker, and where its bytes come to lie in memory.

Knows arrays and where they are; knows no format and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slowllm.errors import ArchitectureError
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.spans import (
    BYTES,
    DTYPE_BITS,
    TORCH_DTYPES,
    CodedArray,
    CodedRows,
    Coding,
    Placement,
    Run,
    Span,
)

# What all formats here decode to where nothing else is computed with.
DECODED = "BF16"


@dataclass(frozen=True)
class CodedPart:
    """One of the arrays that make a tensor.

    Attributes:
        name: that the codec knows it by.
        span: of its bytes.
        shape: that the codec expects.
        is_bytes: whether the codec gets words as the bytes that they are.
    """

    name: str
    span: Span
    shape: tuple[int, ...]
    is_bytes: bool = False

    @property
    def dtype(self) -> str:
        """The dtype that the codec gets: that of the span, numbers of 8 bits and fewer as bytes."""
        return "U8" if self.is_bytes or self.span.dtype in BYTES else self.span.dtype


@dataclass(frozen=True)
class CodedTensor:
    """A tensor in a maker's format.

    Attributes:
        name: that the tensor would have if it were plain.
        shape: decoded, matrices not transposed.
        codec: that decodes it.
        parts: the arrays.
        group: see `Coding`.
        is_transposed: whether the model has the transposed matrices.
        offset: see `Coding`.
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    parts: tuple[CodedPart, ...]
    group: tuple[int, ...] = ()
    is_transposed: bool = False
    offset: float = 0.0

    def __post_init__(self) -> None:
        shapes = {part.name: (part.dtype, part.shape) for part in self.parts}
        rows = math.prod(self.shape[:-1])
        assert CODECS[self.codec].has_parts(shapes, rows, self.shape[-1], self.group), "checked by its format"
        assert all(
            part.span.num_bytes * 8 == math.prod(part.shape) * DTYPE_BITS[part.dtype] for part in self.parts
        ), "the spans' own shapes are checked by its format"

    def as_plain(self) -> Span:
        """Return a span of the decoded tensor, as if it were stored; nothing is to be read from it."""
        num_bytes = math.prod(self.shape) * DTYPE_BITS[DECODED] // 8
        first = self.parts[0].span
        return Span(self.name, first.path, DECODED, self.shape, 0, num_bytes, first.stamp)


def whole_placement(target: str, tensor: CodedTensor) -> Placement:
    """Return the placement of a parameter that is one coded tensor."""
    arrays, runs = _laid_out([tensor.parts])
    shape = tensor.shape
    if tensor.is_transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    coding = Coding(tensor.codec, arrays[0], tensor.group, (), tensor.is_transposed, tensor.offset)
    return Placement(target, shape, TORCH_DTYPES[DECODED], runs, coding)


def stacked_placement(traced: Placement, tensors: Mapping[str, CodedTensor]) -> Placement:
    """Return the placement of a parameter that is put together of coded tensors, whole rows of each.

    Args:
        traced: the placement as if the tensors were plain.
        tensors: by name.
    Raises:
        ArchitectureError: a tensor lands in pieces.
    """
    row_bytes = traced.shape[-1] * traced.dtype.itemsize
    found: list[tuple[int, CodedTensor]] = []
    for run in traced.runs:
        tensor = tensors[run.span.name]
        is_whole = run.num_bytes == run.span.num_bytes and not run.source
        if (
            not is_whole
            or run.target % row_bytes
            or tensor.shape[-1] != traced.shape[-1]
            or tensor.is_transposed
        ):
            raise ArchitectureError(
                f"{traced.name}: {tensor.name} is quantised, and the model takes it apart or transposes it, which is not read"
            )
        found.append((run.target // row_bytes, tensor))
    arrays, runs = _laid_out([tensor.parts for _, tensor in found])
    rows = tuple(
        CodedRows(
            first, math.prod(tensor.shape[:-1]), Coding(tensor.codec, own, tensor.group, offset=tensor.offset)
        )
        for (first, tensor), own in zip(found, arrays, strict=True)
    )
    return replace(traced, runs=runs, coding=Coding("stacked", (), (), rows))


def ordered_runs(span: Span, order: tuple[int, ...]) -> tuple[Run, ...]:
    """Return the runs of a plain tensor whose elements lie in another order; see `storage.codecs.gguf`."""
    outer, inner, length = order
    size, itemsize = math.prod(order), DTYPE_BITS[span.dtype] // 8
    runs, target = list[Run](), 0
    for first in range(0, math.prod(span.shape), size):
        for minor in range(inner):
            for major in range(outer):
                source = first + (major * inner + minor) * length
                runs.append(Run(span, source * itemsize, target * itemsize, length * itemsize))
                target += length
    return tuple(runs)


def _laid_out(tensors: Sequence[Sequence[CodedPart]]) -> tuple[list[tuple[CodedArray, ...]], tuple[Run, ...]]:
    """Lay arrays out behind one another, those of wide elements first, so that each begins at a multiple of its element."""
    order = sorted(
        ((number, part) for number, parts in enumerate(tensors) for part in parts),
        key=lambda item: -DTYPE_BITS[item[1].dtype],
    )
    arrays: list[list[CodedArray]] = [[] for _ in tensors]
    runs, offset = list[Run](), 0
    for number, part in order:
        arrays[number].append(CodedArray(part.name, part.dtype, part.shape, offset))
        if part.span.num_bytes:
            runs.append(Run(part.span, 0, offset, part.span.num_bytes))
        offset += part.span.num_bytes
    return [tuple(own) for own in arrays], tuple(runs)
