"""Draw matrices as trained ones are spread: heavy tails, and rows and columns of unequal size.

A pool is a matrix that was drawn and coded once. Tensors are written as repeats of it, each from another row and with its columns
shifted, so that the disk and not the generator is the limit. The arrays of one tensor, such as codes and scales, are cut alike.
Knows no names of tensors and no formats.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

# Degrees of freedom of Student's t: the largest of a million weights is about 15 times their deviation.
DEGREES = 4.5
# Deviation of the logarithms of the sizes of rows, and of those of columns.
SPREAD = 0.35
# Of each row of the embedding, this much lies along a direction that all have in common, as hidden states of trained models have.
COMMON = 0.25
# The period of that direction, and the step by which columns are shifted.
STEP = 128
_WRITTEN_AT_ONCE = 1 << 25

# Arrays of a coded matrix by their names, each (units, lines of a unit, steps of a line, elements of a step). A unit is what is
# coded together, such as 128 rows; arrays without steps have one.
Pool = Mapping[str, Tensor]
# Codes a matrix in float32.
Encode = Callable[[Tensor], Pool]


def heavy_tailed(*shape: int, generator: torch.Generator) -> Tensor:
    """Return numbers of Student's t-distribution with a deviation of one, float32, by Bailey's polar method."""
    one = torch.rand(shape, generator=generator).clamp_(min=1e-7)
    size = one.pow_(-2 / DEGREES).sub_(1).mul_(DEGREES - 2).clamp_(min=0).sqrt_()
    return size.mul_(torch.rand(shape, generator=generator).mul_(2 * math.pi).cos_())


def matrix(num_rows: int, num_columns: int, deviation: float, generator: torch.Generator) -> Tensor:
    """Return a heavy-tailed matrix whose rows and columns have log-normal sizes, float32."""
    drawn = heavy_tailed(num_rows, num_columns, generator=generator)
    for side in ((num_rows, 1), (1, num_columns)):
        drawn.mul_(torch.randn(side, generator=generator).mul_(SPREAD).exp_())
    return drawn.mul_(deviation / math.exp(2 * SPREAD**2))


def common_direction(width: int) -> Tensor:
    """Return the direction that hidden states have in common: (width,) of plus and minus one, of period `STEP`."""
    signs = torch.randint(0, 2, (STEP,), generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1)
    return signs.float().repeat(-(-width // STEP))[:width]


def generator_of(name: str, seed: int = 0) -> torch.Generator:
    """Return a generator that depends on a name and a seed alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + (seed << 32))


def place(size: int, generator: torch.Generator) -> int:
    """Return a number below `size`: where a repeat begins, or how far its columns are shifted."""
    return int(torch.randint(size, (), generator=generator))


def bytes_of(pool: Pool, part: str, num_elements: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the bytes of one array of a tensor, in pieces, uint8.

    Args:
        pool: from which the tensor is cut.
        part: name of the array in the pool.
        num_elements: of the array.
        generator: of the tensor; in the same state for each of its arrays.
    """
    array = pool[part]
    num_units, num_steps = len(array), max(other.shape[2] for other in pool.values())
    in_unit = math.prod(array.shape[1:])
    at_once = max(1, _WRITTEN_AT_ONCE // (in_unit * array.element_size()))
    left = num_elements
    while left:
        start, shift = (place(size, generator) for size in (num_units, num_steps))
        count = min(num_units - start, -(-left // in_unit))
        for first in range(start, start + count, at_once):
            piece = array[first : min(first + at_once, start + count)]
            flat = piece.roll(shift % array.shape[2], 2).reshape(-1)[:left]
            left -= len(flat)
            yield flat.view(torch.uint8)
