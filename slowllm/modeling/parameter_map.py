"""Map checkpoint names to parameters and slices of them, by transformers' own conversion mapping.

Checkpoint names are not parameter names: transformers renames keys, adds or strips the base model's prefix, and
fuses tensors (Mixtral's experts are single tensors on disk). We run its conversions once, on small probe tensors
whose elements are numbered; the result shows where each span's elements go, so that the reader can fill a
parameter straight from the file. Knows transformers; reads no weight.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from slowllm.errors import ArchitectureError, CheckpointError
from slowllm.storage.spans import Placement, Run, Span

log = logging.getLogger(__name__)

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


def place(model: PreTrainedModel, spans: Mapping[str, Span]) -> dict[str, Placement]:
    """Return, for every parameter and persistent buffer of `model`, the bytes that fill it.

    Args:
        model: with parameters on the meta device; only names and shapes are used.
        spans: of the checkpoint, by name on disk.
    Returns:
        by parameter name. A tied parameter is listed once, under the name that the checkpoint has.
    Raises:
        CheckpointError: a parameter is missing, filled twice, or of another shape or dtype; or the checkpoint has more
            blocks than the config says.
        ArchitectureError: a parameter cannot be filled by copying runs of bytes.
    """
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    plain: dict[str, Span] = {}
    fused: dict[tuple[str, int], list[tuple[str, Span]]] = defaultdict(list)
    unexpected: list[str] = []
    for name in sorted(spans, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:  # a parameter's name already, which a renaming changed
            target, pattern = name, None
        if target not in wanted:
            unexpected.append(name)
        elif pattern is not None:
            fused[target, id(by_pattern[pattern])].append((pattern, spans[name]))
        elif target in plain:
            raise CheckpointError(f"{plain[target].name} and {name} are both {target}; one must go")
        else:
            plain[target] = spans[name]
    _refuse_unexpected_blocks(model, unexpected)

    placements: dict[str, Placement] = {}
    for target, span in plain.items():
        _check_shape(span, target, tuple(wanted[target].shape))
        runs = (Run(span, 0, 0, span.num_bytes),) if span.num_bytes else ()
        placements[target] = Placement(target, span.shape, span.torch_dtype, runs, span.coding)
    for (target, _), sources in fused.items():
        for placement in _place_fused(model, target, by_pattern[sources[0][0]], sources, wanted):
            if placement.name in placements:
                raise CheckpointError(
                    f"{placement.name} is filled twice; a tensor stands in the checkpoint twice"
                )
            placements[placement.name] = placement

    _refuse_missing(model, wanted, placements, spans)
    return placements


def _check_shape(span: Span, name: str, shape: tuple[int, ...]) -> None:
    if span.shape != shape:
        raise CheckpointError(
            f"{span.path.name}: {span.name} has shape {list(span.shape)} but {name} needs {list(shape)}; "
            "config.json and the weights do not belong together"
        )


def _refuse_unexpected_blocks(model: PreTrainedModel, unexpected: list[str]) -> None:
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unread = [name for name in unexpected if not any(pattern.search(name) for pattern in ignored)]
    # Buffers that older versions of transformers saved are harmless; another block means a config.json of another model.
    config = model.config.get_text_config()
    num_blocks = config.num_hidden_layers
    # Blocks behind the last that predict further tokens (DeepSeek-V3, GLM-4.5); transformers does not use them either.
    num_predicting = getattr(config, "num_nextn_predict_layers", None)
    num_known = num_blocks + (num_predicting if isinstance(num_predicting, int) else 0)
    for name in unread:
        match = re.search(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.", name)
        if match and int(match[1]) >= num_known:
            raise CheckpointError(
                f"{name} belongs to a block beyond the {num_blocks} that config.json names; "
                "config.json and the weights do not belong together"
            )
    if unread:
        log.warning(
            "%d tensors belong to no parameter and are not read: %s", len(unread), ", ".join(unread[:5])
        )


def _refuse_missing(
    model: PreTrainedModel,
    wanted: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    spans: Mapping[str, Span],
) -> None:
    tied = {**model.all_tied_weights_keys, **{v: k for k, v in model.all_tied_weights_keys.items()}}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name in wanted
        if name not in placements
        and tied.get(name) not in placements
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        if wrapper := _wrapper_of(spans):
            raise CheckpointError(
                f"the names of the checkpoint's tensors begin with {wrapper}, as a wrapper of torch "
                "(DistributedDataParallel, torch.compile) makes them; save the model that is inside the wrapper"
            )
        shards = sorted({span.path.name for span in spans.values()})
        raise CheckpointError(
            f"{missing[0]}{more}: missing from the checkpoint ({shards[0]}{' and others' if shards[1:] else ''}); "
            "fetch it again, or use a config.json that belongs to it"
        )


def _wrapper_of(names: Iterable[str]) -> str | None:
    """Return the prefix that wrappers of torch put before the names of a module, if all names have it."""
    prefixes = {match[0] if (match := re.match(r"(?:module\.|_orig_mod\.)+", name)) else "" for name in names}
    return prefixes.pop() or None if len(prefixes) == 1 else None


def _place_fused(
    model: PreTrainedModel,
    target: str,
    converter: WeightConverter,
    sources: list[tuple[str, Span]],
    wanted: Mapping[str, Tensor],
) -> Iterator[Placement]:
    """Run one conversion on probes, and yield where each source lands."""
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
