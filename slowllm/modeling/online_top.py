"""The likeliest tokens over a vocabulary whose logits come tile by tile, so that tokens x vocabulary is never held.

Tokens are ordered by their logits, and among equal ones by their ids, the lower first: `torch.topk` does not say which
of equal ones it takes, and in bf16 many are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose candidates are ordered at a time: keys of eight bytes for 64 rows of a tile are 4 MB.
ROWS_AT_ONCE = 64
# Ids take the lower half of a key.
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1
# Below every key of a token.
_NO_TOKEN = torch.iinfo(torch.int64).min


class OnlineTop:
    """The likeliest tokens of each of R rows of logits so far.

    Args:
        num_rows: R.
        num_top: how many are kept; at most the vocabulary.
        device: of the logits.
    Attributes:
        keys: (R, num_top) int64, a token's logit and id in one number, from the likeliest on.
        log_probs: (R, num_top) float32, in nats; after `normalize`.
    """

    def __init__(self, num_rows: int, num_top: int, device: torch.device) -> None:
        self.keys = torch.full((num_rows, num_top), _NO_TOKEN, dtype=torch.int64, device=device)
        self.log_probs = torch.empty(0)

    def add(self, logits: Tensor, first: int, tile_highest: Tensor) -> None:
        """Add a tile of the vocabulary; tiles come in the order of their tokens.

        Args:
            logits: (R, W) float32 without NaN.
            first: the token of the first column.
            tile_highest: (R,) the highest logit of each row.
        """
        num_top = self.keys.shape[1]
        if first < num_top:  # there are not yet so many tokens: each is among the likeliest so far
            for start in range(0, len(logits), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                ids = torch.arange(first, first + logits.shape[1], device=logits.device)
                self._keep_best(rows, _keys_of(logits[rows], ids))
            return
        # A later token of an equal logit is behind the earlier ones, so it is none of the likeliest.
        lowest = _logits_of(self.keys[:, -1])
        better = (tile_highest > lowest).nonzero().flatten()
        for rows in better.split(ROWS_AT_ONCE) if len(better) else ():
            self._add_better(rows, logits[rows], first, lowest[rows])

    def _add_better(self, rows: Tensor, logits: Tensor, first: int, lowest: Tensor) -> None:
        """Add the few logits of some rows that are higher than the lowest kept."""
        row, column = (logits > lowest[:, None]).nonzero().unbind(1)
        keys = _keys_of(logits[row, column], column + first)
        counts = row.bincount(minlength=len(rows))
        ends = counts.cumsum(0)
        candidates = keys.new_full((len(rows), int(counts.max())), _NO_TOKEN)
        candidates[row, torch.arange(len(row), device=row.device) - (ends - counts)[row]] = keys
        self._keep_best(rows, candidates)

    def _keep_best(self, rows: slice | Tensor, candidates: Tensor) -> None:
        kept = self.keys[rows]
        self.keys[rows] = torch.cat([kept, candidates], 1).topk(kept.shape[1], sorted=True).values

    @property
    def ids(self) -> Tensor:
        """The likeliest tokens (R, num_top) int64, from the likeliest on, once every tile was added."""
        return _ID_MASK - (self.keys & _ID_MASK)

    def normalize(self, normalizers: Tensor) -> None:
        """Take the logarithm (R,) of the sum of each row's exponentials, once every tile was added."""
        self.log_probs = _logits_of(self.keys) - normalizers[:, None]


def _keys_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return numbers that order tokens by their logits, and equal ones by their ids, the lower first."""
    # As an integer, a negative float is the larger the further it is from zero; there are two zeros, which are equal.
    bits = (logits + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << _ID_BITS) | (_ID_MASK - ids)


def _logits_of(keys: Tensor) -> Tensor:
    ordered = (keys >> _ID_BITS).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
