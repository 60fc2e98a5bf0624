"""8 bits a weight and a scale a row: LLM.int8() (Dettmers et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.storage.codecs import torch_kernels
from slowllm.storage.codecs.base import MIN_INTEGER_ROWS, Parts, PartShapes, StoreCodec, bits_of, tiles_of
from slowllm.storage.codecs.team import Team

TILE_COLUMNS = 4096
# Activations this large are multiplied in 16 bit (Dettmers et al., LLM.int8(), 2022, section 3.2).
OUTLIER = 6.0


class Int8(StoreCodec):
    """LLM.int8() (Dettmers et al., 2022): a scale for each row of the matrix and for each row of activations.

    Products are of 8-bit integers, summed in 32 bits. An activation of 6 or more is an outlier: it stays in 16 bit
    and is multiplied with the decoded column, so that it does not coarsen its row's scale. Outliers are decided row by
    row, so that one row's outlier changes no other row.
    """

    name: ClassVar[str] = "int8"
    is_exact: ClassVar[bool] = False
    passes: ClassVar[float] = 0.8
    is_decoded: ClassVar[bool] = False

    def layout(self, num_rows: int, width: int) -> PartShapes:
        return {"codes": ("I8", (num_rows, width)), "scales": ("F32", (num_rows,))}

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        codes, scales = quantise_rows(piece.view(-1, width))
        return {"codes": codes, "scales": scales}

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        from slowllm.storage.codecs import cpu_kernels

        codes, scales = (parts.arrays[name][first:last].numpy() for name in ("codes", "scales"))
        bits = bits_of(out)
        team.share(lambda low, high: cpu_kernels.int8_rows(codes, scales, bits, low, high), 0, last - first)

    def multiply(
        self, x: Tensor, parts: Parts, first: int, last: int, team: Team, bias: Tensor | None = None
    ) -> Tensor | None:
        codes, scales = (parts.arrays[name][first:last] for name in ("codes", "scales"))
        is_outlier = x.abs() >= OUTLIER
        columns = is_outlier.any(0).nonzero()[:, 0]
        if len(columns) > parts.width // 8:  # with so many, decoding costs less
            return None
        inner = x.masked_fill(is_outlier, 0.0) if len(columns) else x
        small, factors = quantise_rows(inner)
        outer = torch.where(is_outlier[:, columns], x[:, columns], 0.0).float()
        product = x.new_empty(len(x), last - first)

        def finish(tile: slice, sums: Tensor) -> None:
            y = sums.mul_(factors[:, None]).mul_(scales[tile])
            if len(columns):
                y += outer @ (codes[tile, columns].float() * scales[tile, None]).T
            product[:, tile] = y

        if x.device.type != "cpu":
            finish(slice(0, last - first), torch_kernels.int8_product(small, codes))
        elif len(x) >= MIN_INTEGER_ROWS and _has_integer_products():
            # In tiles, so that the sums of 32 bits stay in the cache until they are scaled.
            for begin in range(0, last - first, TILE_COLUMNS):
                tile = slice(begin, min(begin + TILE_COLUMNS, last - first))
                finish(tile, torch._int_mm(small, codes[tile].T).float())
        else:
            _multiply_tiles(small.to(x.dtype), codes, finish, team)
        return product if bias is None else product.add_(bias)


def _multiply_tiles(x: Tensor, codes: Tensor, finish: Callable[[slice, Tensor], None], team: Team) -> None:
    """Multiply a few rows of integers with a matrix (R, K) of integers, in the dtype of `x`, which is exact for both.

    Only the sums are rounded to that dtype, which is the result's too.
    """
    from slowllm.storage.codecs import cpu_kernels

    def work(low: int, high: int) -> None:
        for tile, buffer in tiles_of(low, high, codes.shape[1], x.dtype):
            if x.dtype == torch.bfloat16:  # torch's own cast is ten times slower on some processors
                cpu_kernels.int8_codes(codes[tile].numpy(), bits_of(buffer))
            else:
                buffer.copy_(codes[tile])
            finish(tile, F.linear(x, buffer).float())

    team.share(work, 0, len(codes))


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (R, K) of a matrix, and the float32 scale (R,) of each row: its largest number over 127."""
    values = rows.float()
    scales = values.abs().amax(1) / 127
    codes = (values / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def _has_integer_products() -> bool:
    """Whether this processor multiplies int8 faster than bf16."""
    return bool(torch.cpu._is_vnni_supported())
