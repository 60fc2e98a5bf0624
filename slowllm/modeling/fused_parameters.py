"""Trace a parameter that transformers makes of several tensors (Mixtral's experts), or several that it makes of one.

We run transformers' conversion once, on small probe tensors whose elements are numbered; the result shows where each
span's elements go, so that the reader can fill a parameter straight from the file. Knows transformers; reads no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from slowllm.errors import ArchitectureError, CheckpointError
from slowllm.storage.spans import Placement, Run, Span

# A probe represents tensors thousands of times its size. A larger one means that the shapes have no common divisor.
MAX_PROBE_ELEMENTS = 1 << 24
# Slices along an inner dimension are one run a row; more runs than this would be reads of a few bytes each.
MAX_RUNS = 1 << 18


@dataclass(frozen=True)
class _Box:
    """A rectangle of elements: first index and extent along each dimension."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def long_sides(self) -> list[int]:
        """Its extents without those of one element."""
        return [extent for extent in self.extent if extent > 1]


def place_fused(
    model: PreTrainedModel,
    target: str,
    converter: WeightConverter,
    sources: list[tuple[str, Span]],
    wanted: Mapping[str, Tensor],
) -> Iterator[Placement]:
    """Run one conversion on probes, and yield where each source lands.

    Args:
        model: whose conversion it is.
        target: the first parameter that it makes.
        converter: transformers' own.
        sources: each with the pattern that its name matched.
        wanted: the model's tensors by name.
    Raises:
        CheckpointError: the sources do not fit together, or one is missing.
        ArchitectureError: a parameter cannot be filled by copying runs of bytes.
    """
    dtypes = {span.torch_dtype for _, span in sources}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{target}: its parts are stored in different dtypes, {sorted(map(str, dtypes))}"
        )
    dtype = dtypes.pop()
    lengths = [length for _, span in sources for length in span.shape]
    if len(converter.target_patterns) > 1:
        # One tensor is split into several: the boundary must not fall inside an element of the probe.
        lengths += wanted[target].shape
    scale = _probe_scale(lengths)
    if sum(math.prod(span.shape) // scale ** len(span.shape) for _, span in sources) > MAX_PROBE_ELEMENTS:
        raise ArchitectureError(
            f"{target}: its parts have shapes that cannot be traced through the conversion"
        )

    probe_run = deepcopy(converter)
    first = 0
    firsts = []
    for pattern, span in sources:
        small = tuple(length // scale for length in span.shape)
        probe = torch.arange(first, first + math.prod(small)).view(small)
        firsts.append(first)
        first += math.prod(small)
        probe_run.add_tensor(target, span.name, pattern, cast(Any, probe))
    try:
        results = probe_run.convert(target, model=model, config=model.config)
    except Exception as error:  # whatever transformers' conversion may raise where parts are missing
        raise CheckpointError(f"{target}: its {len(sources)} parts do not fit together ({error})") from error

    for name, value in results.items():
        result = (value[0] if isinstance(value, list) else value).numpy()
        if name not in wanted:
            raise ArchitectureError(
                f"{name}: transformers' conversion makes it, but the model has no such parameter"
            )
        shape = tuple(wanted[name].shape)
        runs = []
        for start, (_, span) in zip(firsts, sources, strict=True):
            small = tuple(length // scale for length in span.shape)
            located = _locate(result, start, small)
            if located is not None:
                runs += _runs(name, span, small, *located, tuple(result.shape), shape, dtype.itemsize)
        yield Placement(name, shape, dtype, _covering(name, runs, math.prod(shape) * dtype.itemsize, sources))


def _probe_scale(lengths: list[int]) -> int:
    """Return the largest common divisor that leaves every side of a probe two elements or more.

    A side of one element would hide a transposition.
    """
    common = math.gcd(*lengths) if lengths else 1
    smallest = min((length for length in lengths if length > 1), default=1)
    return max(
        (d for d in range(1, common + 1) if common % d == 0 and (d == 1 or smallest // d >= 2)), default=1
    )


def _locate(result: np.ndarray, first: int, small: tuple[int, ...]) -> tuple[_Box, _Box, bool] | None:
    """Find the elements of one probe in a converted tensor: the box read, the box filled, and whether in order.

    Returns None if no element of the probe is there. In NumPy: a large mixture has tens of thousands of parts, and torch
    takes a millisecond for each.
    """
    size = math.prod(small)
    index = np.argwhere((result >= first) & (result < first + size))
    if not len(index):
        return None
    target, rows = _box_around(index)
    values = result[rows] - first
    if values.size != len(index):
        return target, target, False
    source, rows = _box_around(
        np.stack(np.unravel_index(values.ravel(), small), 1) if small else np.zeros((1, 0), dtype=int)
    )
    # The same elements in row-major order mean no transposition, only new or dropped axes of length one.
    is_in_order = np.array_equal(np.arange(size).reshape(small)[rows].ravel(), values.ravel())
    return source, target, is_in_order and source.long_sides == target.long_sides


def _box_around(index: np.ndarray) -> tuple[_Box, tuple[slice, ...]]:
    """Return the smallest box that contains all elements, as a `_Box` and as slices."""
    low, high = index.min(0).tolist(), (index.max(0) + 1).tolist()
    box = _Box(tuple(low), tuple(b - a for a, b in zip(low, high, strict=True)))
    return box, tuple(slice(a, b) for a, b in zip(low, high, strict=True))


def _runs(
    name: str,
    span: Span,
    small: tuple[int, ...],
    source: _Box,
    target: _Box,
    is_in_order: bool,
    probe_shape: tuple[int, ...],
    shape: tuple[int, ...],
    itemsize: int,
) -> list[Run]:
    """Scale a box up to the real shapes, and cut it into runs of bytes."""
    if not is_in_order:
        raise ArchitectureError(
            f"{name}: transformers reorders {span.name} on loading, which cannot be read in place; "
            "save the model with transformers' save_pretrained(save_original_format=False) first"
        )
    if len(probe_shape) != len(shape) or any(
        real % probe for real, probe in zip(shape, probe_shape, strict=True)
    ):
        _refuse_parts(name, shape, span)

    def real(box: _Box, whole: tuple[int, ...], probe: tuple[int, ...]) -> _Box:
        factors = [a // b for a, b in zip(whole, probe, strict=True)]
        return _Box(
            tuple(a * f for a, f in zip(box.start, factors, strict=True)),
            tuple(a * f for a, f in zip(box.extent, factors, strict=True)),
        )

    source, target = real(source, span.shape, small), real(target, shape, probe_shape)
    if source.long_sides != target.long_sides:
        _refuse_parts(name, shape, span)
    source_rows, source_length = _rows(source, span.shape)
    target_rows, target_length = _rows(target, shape)
    length = math.gcd(source_length, target_length)
    starts = zip(
        _split(source_rows, source_length, length), _split(target_rows, target_length, length), strict=True
    )
    return [Run(span, a * itemsize, b * itemsize, length * itemsize) for a, b in starts]


def _refuse_parts(name: str, shape: tuple[int, ...], span: Span) -> NoReturn:
    raise CheckpointError(
        f"{name} needs shape {list(shape)}, which parts such as {span.name} {list(span.shape)} do not make; "
        "one is missing from the checkpoint, or config.json and the weights do not belong together"
    )


def _rows(box: _Box, shape: tuple[int, ...]) -> tuple[list[int], int]:
    """Return the first element of each contiguous row of a box, and the length of the rows."""
    length, axis = 1, len(shape)
    while axis > 0:
        axis -= 1
        length *= box.extent[axis]
        if box.extent[axis] != shape[axis]:
            break
    strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
    count = math.prod(box.extent[:axis])
    if count > MAX_RUNS:
        raise ArchitectureError(f"a tensor of shape {list(shape)} would have to be read in {count:,} pieces")
    offset = sum(start * stride for start, stride in zip(box.start, strides, strict=True))
    starts = [offset]
    for a in range(axis):
        starts = [start + i * strides[a] for start in starts for i in range(box.extent[a])]
    return starts, length


def _split(starts: list[int], length: int, piece: int) -> Iterator[int]:
    for start in starts:
        yield from range(start, start + length, piece)


def _covering(name: str, runs: list[Run], num_bytes: int, sources: list[tuple[str, Any]]) -> tuple[Run, ...]:
    """Check that runs fill a parameter exactly once, and join adjacent ones.

    Raises:
        CheckpointError: a part is missing or is there twice.
        ArchitectureError: the runs are too many.
    """
    runs.sort(key=lambda run: run.target)
    joined: list[Run] = []
    position = 0
    for run in runs:
        if run.target != position:
            break
        position += run.num_bytes
        last = joined[-1] if joined else None
        if last and last.span == run.span and last.source + last.num_bytes == run.source:
            joined[-1] = Run(last.span, last.source, last.target, last.num_bytes + run.num_bytes)
        else:
            joined.append(run)
    if len(joined) > MAX_RUNS:
        raise ArchitectureError(f"{name}: would have to be read in {len(joined):,} pieces")
    if position != num_bytes:
        raise CheckpointError(
            f"{name}: the {len(sources)} parts found fill {position:,} of its {num_bytes:,} bytes; "
            "a tensor is missing from the checkpoint"
        )
    return tuple(joined)
