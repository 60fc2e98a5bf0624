"""A softmax over a vocabulary whose logits come tile by tile, so that tokens x vocabulary is never held.

An online softmax (Milakov and Gimelshein, 2018): the sum of exponentials is kept relative to the highest logit so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Columns of logits that are held in fp32 at a time: 8,192 x 1,024 tokens are 34 MB.
TILE_COLUMNS = 8192


def tiles_of(weight: Tensor, bias: Tensor | None, first: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Cut rows of the head into tiles.

    Args:
        weight: (V', H), the rows of consecutive tokens.
        bias: (V',) of these tokens.
        first: the token of the first row.
    Yields:
        the first token of a tile, its rows and its bias.
    """
    for start in range(0, len(weight), TILE_COLUMNS):
        tile = slice(start, min(start + TILE_COLUMNS, len(weight)))
        yield first + start, weight[tile], None if bias is None else bias[tile]


class OnlineSoftmax:
    """The sums over R rows of logits, and the logits of N tokens.

    Args:
        num_rows: R.
        rows: (N,) int64, the row in which each token is looked up.
        tokens: (N,) int64.
    Attributes:
        highest: (R,) float32, the highest logit so far.
        total: (R,) float32, the sum of exp(logit - highest) so far.
        token_logits: (N,) float32, NaN before the token's tile was added.
    """

    def __init__(self, num_rows: int, rows: Tensor, tokens: Tensor) -> None:
        self._rows, self._tokens = rows, tokens
        self.highest = torch.full((num_rows,), -math.inf, dtype=torch.float32, device=tokens.device)
        self.total = torch.zeros_like(self.highest)
        self.token_logits = self.highest.new_full((len(tokens),), math.nan)

    def add(self, logits: Tensor, first: int, tile_highest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add a tile of the vocabulary.

        Args:
            logits: (R, W) float32; overwritten with exp(logit - highest), the highest after this tile.
            first: the token of the first column.
            tile_highest: (R,) the highest logit of each row.
        Returns:
            the factor (R,) for sums that are relative to the highest logit before this tile; which of the N tokens
            stand in this tile; and their columns.
        """
        columns = self._tokens - first
        here = ((columns >= 0) & (columns < logits.shape[-1])).nonzero().flatten()
        self.token_logits[here] = logits[self._rows[here], columns[here]]
        peak = torch.maximum(self.highest, tile_highest)
        scale = torch.where(peak == self.highest, 1.0, (self.highest - peak).exp())
        self.total.mul_(scale).add_(logits.sub_(peak[:, None]).exp_().sum(-1))
        self.highest.copy_(peak)
        return scale, here, columns[here]

    def normalizers(self) -> Tensor:
        """Return the logarithm (R,) of the sum of each row's exponentials, once every tile was added."""
        return self.highest + self.total.log()
