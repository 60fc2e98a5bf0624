"""What a codec is, and what codecs share: parts of a coded tensor, threads, tiles."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from slowllm.storage.spans import TORCH_DTYPES, Coding

# Where a codec decodes before it multiplies, each thread does so in tiles that stay in the processor's cache.
TILE_BYTES = 4 << 20


# From so many rows on, integer products are faster than bf16 products of the same numbers.
MIN_INTEGER_ROWS = 48


class Team:
    """Threads that share a loop over rows, each with a processor to itself. Owned by who makes it; close it.

    Args:
        num_threads: of the team.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = max(1, num_threads)
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="slowllm-decode")
        # A product of one of these threads must not wait for torch's threads, which wait for more work on the same
        # processors. The number is the thread's own, but for threads that are still to come: hence the second call.
        before = torch.get_num_threads()
        together = threading.Barrier(self.num_threads)
        for ready in [self._pool.submit(_work_alone, together) for _ in range(self.num_threads)]:
            ready.result()
        torch.set_num_threads(before)

    def share(self, work: Callable[[int, int], object], first: int, last: int) -> None:
        """Call `work` for parts of the range that cover it once, on all threads."""
        parts = min(self.num_threads, max(1, last - first))
        cuts = [first + (last - first) * number // parts for number in range(parts + 1)]
        for one in [self._pool.submit(work, *pair) for pair in itertools.pairwise(cuts)]:
            one.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)


def _work_alone(together: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first product would set the number again
    torch.set_num_threads(1)
    together.wait()


@dataclass(frozen=True)
class Parts:
    """The stored arrays of one matrix, in memory.

    Attributes:
        arrays: by the name of the part.
        num_rows: of the matrix.
        width: of a row.
    """

    arrays: Mapping[str, Tensor]
    num_rows: int
    width: int

    @classmethod
    def of(cls, stored: Tensor, coding: Coding, shape: tuple[int, ...]) -> Parts:
        """See the parts in the bytes that hold them; nothing is copied.

        Args:
            stored: (num_bytes,) uint8.
            coding: that says where each part lies.
            shape: of the matrix.
        """
        arrays = {}
        for part in coding.parts:
            dtype = TORCH_DTYPES[part.dtype]
            num_bytes = math.prod(part.shape) * dtype.itemsize
            arrays[part.name] = (
                stored[part.offset : part.offset + num_bytes].view(dtype).view(part.shape)
                if num_bytes
                else torch.empty(part.shape, dtype=dtype, device=stored.device)
            )
        return cls(arrays, math.prod(shape[:-1]), shape[-1])


class Codec(Protocol):
    """One way to store a matrix."""

    name: ClassVar[str]
    is_exact: ClassVar[bool]
    # How often the bytes of the decoded matrix go through memory in a product of a few rows, those of the stored one
    # aside. For plans: decoding is as fast as memory where it is compiled.
    passes: ClassVar[float]

    def unit(self, width: int) -> int:
        """Return the number of weights that pieces given to `encode` must be a multiple of, but for the last."""

    def layout(self, num_rows: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype (safetensors' name) and shape of each part whose size is known before; in order."""

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        """Encode a flat piece of a matrix; the arrays of successive pieces are joined along their first axis."""

    def finish(self, loose: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """Return the further parts, in order, from the arrays of all pieces that `layout` does not name."""

    def has_parts(self, parts: Mapping[str, tuple[str, tuple[int, ...]]], num_rows: int, width: int) -> bool:
        """Whether these are the parts, with dtypes and shapes, of such a matrix: decoding trusts it."""

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        """Write the rows `first` to `last` to `out` (last - first, K), bfloat16 and contiguous."""

    def multiply(self, x: Tensor, parts: Parts, first: int, last: int, team: Team) -> Tensor | None:
        """Return `x` (M, K), bfloat16, times the rows `first` to `last`, transposed; None where it is to decode."""


def tiles_of(low: int, high: int, width: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of rows, each with room for it that stays in the cache."""
    rows = max(1, TILE_BYTES // (dtype.itemsize * width))
    room = torch.empty(min(rows, high - low), width, dtype=dtype)
    for begin in range(low, high, rows):
        end = min(begin + rows, high)
        yield slice(begin, end), room[: end - begin]


def bits_of(out: Tensor) -> np.ndarray:
    """Return the bits of a bf16 tensor as uint16, on the same memory."""
    bits: np.ndarray = out.view(torch.int16).numpy().view(np.uint16)
    return bits
