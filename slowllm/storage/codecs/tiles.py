"""Multiply a few rows with a matrix that is decoded tile by tile: a tile is multiplied while it is in a cache.

The bits are those of a product with the whole matrix, in bfloat16. That holds where torch sums a column alike however many
others there are, which is tried out once for each shape on the processor at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.rounding import ceil_div, round_up
from slowllm.storage.codecs.team import Team

# With more rows, the product takes longer than to write the decoded matrix and to read it again.
MAX_ROWS = 128
# Of the decoded tiles of all threads together, which are to stay in the cache that processors share, and of one of them at
# least: each product of torch's costs ten microseconds beside its work, so a tile is not to be small.
ALL_TILES_BYTES = 8 << 20
TILE_BYTES = 1 << 20
# A tile has whole multiples of so many rows.
TILE_ROWS = 128
# Rows of the matrix by which it is tried out whether tiles have the bits of the whole.
_TRIAL_ROWS = 512


# Writes rows of a matrix, from one to another, to a tensor (n, K).
DecodeRows = Callable[[Tensor, int, int], None]


def multiply_tiles(
    xs: Sequence[Tensor],
    num_rows: int,
    decode: DecodeRows,
    team: Team,
    bias: Tensor | None = None,
) -> list[Tensor] | None:
    """Return products with a matrix, transposed, each by itself; None where tiles do not pay, or might have other bits.

    Args:
        xs: at least one, of shapes (M, K), on the processor.
        num_rows: R of the matrix (R, K).
        decode: in the dtype of xs.
        team: shares the work.
        bias: (R,) that is added before the result is rounded, as torch does it; None for none.
    Returns:
        (M, R) for each, in its dtype.
    """
    dtype, width = torch.bfloat16, xs[0].shape[1]
    if any(x.dtype != dtype or x.device.type != "cpu" or not 0 < len(x) <= MAX_ROWS for x in xs):
        return None
    num_threads = torch.get_num_threads()
    if num_rows < 2 * TILE_ROWS or not all(
        _has_same_bits(length, width, num_threads) for length in {len(x) for x in xs}
    ):
        return None
    rows = _tile_rows(num_rows, width, team.num_threads)
    outs = [torch.empty(len(x), num_rows, dtype=dtype) for x in xs]

    def work(first: int, last: int) -> None:
        tile = torch.empty(rows, width, dtype=dtype)
        # In the mode in which both inference tensors and others may be written to, and no graph is made.
        with torch.inference_mode():
            for begin in range(first * rows, min(last * rows, num_rows), rows):
                end = min(begin + rows, num_rows)
                decode(tile[: end - begin], begin, end)
                own = None if bias is None else bias[begin:end]
                for x, out in zip(xs, outs, strict=True):
                    out[:, begin:end] = F.linear(x, tile[: end - begin], own)

    team.share(work, 0, ceil_div(num_rows, rows))
    return outs


def _tile_rows(num_rows: int, width: int, num_threads: int) -> int:
    """Return the rows of a tile: so many that each thread has as many tiles as the others."""
    num_bytes = max(TILE_BYTES, ALL_TILES_BYTES // num_threads)
    most = max(1, num_bytes // (2 * width * TILE_ROWS)) * TILE_ROWS
    num_tiles = round_up(ceil_div(num_rows, most), num_threads)
    return round_up(ceil_div(num_rows, num_tiles), TILE_ROWS)


@functools.lru_cache(maxsize=1024)
def _has_same_bits(num_rows: int, width: int, num_threads: int) -> bool:
    """Try out whether products of this shape have the same bits in tiles, computed by one thread each, and as a whole."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(num_rows)
        x = torch.randn(num_rows, width, generator=generator).bfloat16()
        # Of a length that no width has in common, so that rows differ; drawing all would take a tenth of a second.
        some = torch.randn(65_537, generator=generator).bfloat16()
        matrix = some.repeat(_TRIAL_ROWS * width // len(some) + 1)[: _TRIAL_ROWS * width].view(-1, width)
        whole = F.linear(x, matrix)
        torch.set_num_threads(1)
        try:
            tiles = [F.linear(x, tile) for tile in matrix.split(TILE_ROWS)]
        finally:
            torch.set_num_threads(num_threads)
        return torch.equal(torch.cat(tiles, 1), whole)
