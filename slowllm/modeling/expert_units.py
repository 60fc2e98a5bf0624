"""Cut the experts of a model's blocks into units, each of which is brought when a router asks for it.

Knows transformers' classes of experts and where tensors lie on disk; reads no weight.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from slowllm.errors import ArchitectureError
from slowllm.modeling.experts import ExpertLayout, expert_layouts
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.spans import TORCH_DTYPES, CodedArray, CodedRows, Coding, Placement, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertUnits:
    """The experts of one module.

    Attributes:
        layout: of one of them.
        units: the matrices of each, in the order of `ExpertLayout.matrices`; biases come with the block.
    """

    layout: ExpertLayout
    units: tuple[tuple[Placement, ...], ...]

    @property
    def name(self) -> str:
        """Of the module in the model."""
        return self.layout.name

    @property
    def full_names(self) -> tuple[str, ...]:
        """The names in the model of the parameters that the units hold."""
        return tuple(f"{self.name}.{key}" for key in self.layout.matrices)

    def key(self, parameter: str, number: int) -> str:
        """Return the name of an expert's tensor among the weights of its unit."""
        return unit_key(f"{self.name}.{parameter}", number)


def unit_key(name: str, number: int) -> str:
    """Return the name of one expert's matrix of a parameter that holds those of all."""
    return f"{name}[{number}]"


def find_units(
    model: PreTrainedModel, blocks: Sequence[str], placements: Mapping[str, Placement]
) -> list[ExpertUnits]:
    """Return the experts of some blocks, in the order of the blocks.

    Args:
        model: a skeleton.
        blocks: their names.
        placements: of the parameters.
    Raises:
        ArchitectureError: experts cannot be taken apart.
    """
    return [
        _units_of(layout, placements)
        for block in blocks
        for layout in expert_layouts(model.get_submodule(block), block)
    ]


def can_cut(model: PreTrainedModel, blocks: Sequence[str], placements: Mapping[str, Placement]) -> bool:
    """Whether blocks have experts, each of which can be read by itself."""
    try:
        return bool(find_units(model, blocks, placements))
    except ArchitectureError as error:
        log.info("%s; all experts of a block are read together", error)
        return False


def _units_of(layout: ExpertLayout, placements: Mapping[str, Placement]) -> ExpertUnits:
    cut = [list(cut_experts(placements[f"{layout.name}.{key}"])) for key in layout.matrices]
    return ExpertUnits(layout, tuple(zip(*cut, strict=True)))


def cut_experts(placement: Placement) -> Iterator[Placement]:
    """Yield the placement of each matrix (R, K) of a parameter (E, R, K).

    Raises:
        ArchitectureError: the matrices are coded together.
    """
    runs = sorted(placement.runs, key=lambda run: run.target)
    targets = [run.target for run in runs]
    for number in range(placement.shape[0]):
        pieces: list[tuple[int, int]] = []
        coding: Coding | None = None
        # A coding without arrays is planned by its config only.
        if placement.coding is None or not placement.coding.arrays:
            coding = placement.coding
            num_bytes = placement.num_bytes // placement.shape[0]
            pieces.append((number * num_bytes, num_bytes))
        else:
            coding, num_bytes = _cut(placement, placement.coding, number, pieces, runs, targets)
        own = tuple(_taken(runs, targets, pieces))
        assert sum(run.num_bytes for run in own) == num_bytes, "arrays are covered by runs"
        yield Placement(unit_key(placement.name, number), placement.shape[1:], placement.dtype, own, coding)


def _cut(
    placement: Placement,
    coding: Coding,
    number: int,
    pieces: list[tuple[int, int]],
    runs: Sequence[Run],
    targets: Sequence[int],
) -> tuple[Coding, int]:
    """Return the coding of one matrix and its bytes; add to `pieces` where these are in the whole.

    `runs` are the placement's, in the order of their `targets`.
    """
    count, *shape = placement.shape
    num_rows, width = (shape[1], shape[0]) if coding.is_transposed else (shape[0], shape[1])
    offset = 0

    def moved(array: CodedArray, first: int, length: int, lead: tuple[int, ...]) -> CodedArray:
        """Return `length` bytes of an array, from `first`, as an array of its own."""
        nonlocal offset
        pieces.append((array.offset + first, length))
        own = CodedArray(array.name, array.dtype, (*lead, *array.shape[1:]), offset)
        offset += length
        return own

    def size_of(array: CodedArray) -> int:
        return math.prod(array.shape) * TORCH_DTYPES[array.dtype].itemsize

    if coding.rows:
        first, end = number * num_rows, (number + 1) * num_rows
        starts = [rows.first for rows in coding.rows]
        here = coding.rows[bisect_left(starts, first) : bisect_left(starts, end)]
        if sum(rows.num_rows for rows in here) != num_rows or any(r.coding.rows for r in here):
            raise ArchitectureError(f"{placement.name}: its experts are not coded one by one")
        order = _in_memory_order(
            [(place, array) for place, rows in enumerate(here) for array in rows.coding.parts], runs, targets
        )
        parts: list[list[CodedArray]] = [[] for _ in here]
        for place, array in order:
            parts[place].append(moved(array, 0, size_of(array), array.shape[:1]))
        rows = tuple(
            CodedRows(one.first - first, one.num_rows, replace(one.coding, parts=tuple(own)))
            for one, own in zip(here, parts, strict=True)
        )
        return replace(coding, rows=rows), offset
    if any(not array.shape or array.shape[0] % count for array in coding.parts):
        raise ArchitectureError(f"{placement.name}: its experts are coded together; let blocks be read whole")
    order_of_parts = sorted(coding.parts, key=lambda array: -TORCH_DTYPES[array.dtype].itemsize)
    by_name = {
        array.name: moved(
            array, number * (size_of(array) // count), size_of(array) // count, (array.shape[0] // count,)
        )
        for array in order_of_parts
    }
    own_parts = tuple(by_name[array.name] for array in coding.parts)
    shapes = {array.name: (array.dtype, array.shape) for array in own_parts}
    if not CODECS[coding.codec].has_parts(shapes, num_rows, width, coding.group):
        raise ArchitectureError(f"{placement.name}: its experts are coded together; let blocks be read whole")
    return replace(coding, parts=own_parts), offset


def _in_memory_order(
    arrays: Sequence[tuple[int, CodedArray]], runs: Sequence[Run], targets: Sequence[int]
) -> list[tuple[int, CodedArray]]:
    """Return the arrays of one expert in the order in which they lie in memory.

    As on disk where each then begins at a multiple of its element, so that they are read as they lie there; else those of wide
    elements come first.
    """

    def in_file(item: tuple[int, CodedArray]) -> tuple[str, int]:
        run = runs[bisect_right(targets, item[1].offset) - 1]
        return str(run.span.path), run.span.offset + run.source + item[1].offset - run.target

    order, offset = sorted(arrays, key=in_file), 0
    for _, array in order:
        itemsize = TORCH_DTYPES[array.dtype].itemsize
        if offset % itemsize:
            return sorted(arrays, key=lambda item: -TORCH_DTYPES[item[1].dtype].itemsize)
        offset += math.prod(array.shape) * itemsize
    return order


def _taken(runs: Sequence[Run], targets: Sequence[int], pieces: Sequence[tuple[int, int]]) -> Iterator[Run]:
    """Yield what brings some pieces of a tensor's bytes, each piece (first, length) behind the one before.

    Args:
        runs: of the whole tensor, in the order of their `targets`.
    """
    target = 0
    for first, length in pieces:
        for place in range(bisect_right(targets, first) - 1, len(runs)):
            run = runs[place]
            if run.target >= first + length:
                break
            begin, end = max(first, run.target), min(first + length, run.target + run.num_bytes)
            yield Run(run.span, run.source + begin - run.target, target + begin - first, end - begin)
        target += length
