"""4 bits a weight, with a scale and an offset for every 64."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.rounding import ceil_div
from slowllm.storage.codecs import layout_constants
from slowllm.storage.codecs.base import MIN_INTEGER_ROWS, Parts, PartShapes, StoreCodec, bits_of, tiles_of
from slowllm.storage.codecs.team import Team


class Int4(StoreCodec):
    """Four bits a weight, with a scale and a lowest value in bfloat16 for every 64 weights of a row.

    The range of a group is shrunk a little where that lowers its squared error.
    """

    name: ClassVar[str] = "int4"
    is_exact: ClassVar[bool] = False
    passes: ClassVar[float] = 0.8
    group: ClassVar[int] = 64
    shrinks: ClassVar[tuple[float, ...]] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)

    def layout(self, num_rows: int, width: int) -> PartShapes:
        groups = ceil_div(width, self.group)
        return {
            "codes": ("U8", (num_rows, groups * self.group // 2)),
            "scales": ("BF16", (num_rows, groups)),
            "lows": ("BF16", (num_rows, groups)),
        }

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        groups = ceil_div(width, self.group)
        values = piece.view(-1, width).float()
        # A last group that is not full is filled with its own last weight, which does not widen its range.
        missing = groups * self.group - width
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], 1).view(-1, groups, self.group)
        if layout_constants.IS_COMPILED:
            return self._encode_compiled(values)
        low, high = values.aminmax(dim=-1)
        middle, half = (low + high) / 2, (high - low) / 2
        best = torch.full_like(low, math.inf)
        scales, lows = torch.zeros_like(low), torch.zeros_like(low)
        for shrink in self.shrinks:
            step = (2 * shrink * half / 15).bfloat16().float()
            start = (middle - shrink * half).bfloat16().float()
            error = (self._codes(values, step, start) * step[..., None] + start[..., None] - values).square_()
            total = error.sum(-1)
            is_better = total < best
            best = torch.where(is_better, total, best)
            scales, lows = torch.where(is_better, step, scales), torch.where(is_better, start, lows)
        codes = self._codes(values, scales, lows).to(torch.uint8)
        half_group = self.group // 2
        packed = codes[..., :half_group] | codes[..., half_group:] << 4
        return {"codes": packed.flatten(1), "scales": scales.bfloat16(), "lows": lows.bfloat16()}

    def _encode_compiled(self, values: Tensor) -> dict[str, Tensor]:
        from slowllm.storage.codecs import cpu_kernels

        num_rows, groups, _ = values.shape
        packed = torch.zeros(num_rows, groups * self.group // 2, dtype=torch.uint8)
        scales, lows = torch.zeros(num_rows, groups), torch.zeros(num_rows, groups)
        cpu_kernels.int4_encode(
            values.view(num_rows, -1).numpy(), np.array(self.shrinks, np.float32), packed.numpy(), scales.numpy(),
            lows.numpy(), 0, num_rows,
        )  # fmt: skip
        return {"codes": packed, "scales": scales.bfloat16(), "lows": lows.bfloat16()}

    @staticmethod
    def _codes(values: Tensor, scales: Tensor, lows: Tensor) -> Tensor:
        tiny = torch.finfo(torch.float32).tiny
        return ((values - lows[..., None]) / scales.clamp(min=tiny)[..., None]).round_().clamp_(0, 15)

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        def work(low: int, high: int) -> None:
            self._decode_rows(parts, out[low - first : high - first], low, high)

        team.share(work, first, last)

    def multiply(
        self, x: Tensor, parts: Parts, first: int, last: int, team: Team, bias: Tensor | None = None
    ) -> Tensor | None:
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or len(x) >= MIN_INTEGER_ROWS:
            return None
        product = x.new_empty(len(x), last - first)

        def work(low: int, high: int) -> None:
            for tile, buffer in tiles_of(low, high, parts.width, x.dtype):
                self._decode_rows(parts, buffer, tile.start, tile.stop)
                product[:, tile.start - first : tile.stop - first] = F.linear(x, buffer)

        team.share(work, first, last)
        return product if bias is None else product.add_(bias)

    def _decode_rows(self, parts: Parts, out: Tensor, first: int, last: int) -> None:
        from slowllm.storage.codecs import cpu_kernels

        codes = parts.arrays["codes"][first:last].numpy()
        scales, lows = (parts.arrays[name][first:last].float().numpy() for name in ("scales", "lows"))
        cpu_kernels.int4_rows(codes, scales, lows, bits_of(out), 0, last - first)
