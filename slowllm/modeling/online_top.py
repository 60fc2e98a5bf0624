"""The likeliest tokens over a vocabulary whose logits come tile by tile, so that tokens x vocabulary is never held.

Tokens are ordered by their logits, and among equal ones by their ids, the lower first: `torch.topk` does not say which
of equal ones it takes, and in bf16 many are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose candidates are ordered at a time: keys of eight bytes for 64 rows of a tile are 4 MB.
ROWS_AT_ONCE = 64
# Columns of which the highest logit is looked at first.
GROUP_COLUMNS = 64
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
        if not bool((tile_highest > lowest).any()):
            return
        # Few are higher. To look at the maximum of each group first takes a fifth of the time.
        num_grouped = logits.shape[1] // GROUP_COLUMNS * GROUP_COLUMNS
        groups = logits[:, :num_grouped].unflatten(1, (-1, GROUP_COLUMNS))
        is_better = groups.amax(-1) > lowest[:, None]
        for start in range(0, len(logits), ROWS_AT_ONCE):
            own = slice(start, start + ROWS_AT_ONCE)
            row, group = is_better[own].nonzero().unbind(1)
            self._add_better(own, lowest[own], groups[own][row, group], row, group * GROUP_COLUMNS + first)
        if num_grouped < logits.shape[1]:
            rest, row = logits[:, num_grouped:], torch.arange(len(logits), device=logits.device)
            self._add_better(slice(None), lowest, rest, row, torch.full_like(row, num_grouped + first))

    def _add_better(self, own: slice, lowest: Tensor, logits: Tensor, row: Tensor, first: Tensor) -> None:
        """Add the logits that are higher than the lowest kept.

        Args:
            own: the rows (S,) that are meant.
            lowest: (S,) float32, the lowest logit that each of them keeps.
            logits: (G, W') float32, groups of columns.
            row: (G,) int64, the row of each group among those that are meant, ascending.
            first: (G,) int64, the token of each group's first column.
        """
        group, column = (logits > lowest[row][:, None]).nonzero().unbind(1)
        if not len(group):
            return
        keys, row = _keys_of(logits[group, column], first[group] + column), row[group]
        counts = row.bincount(minlength=len(lowest))
        ends = counts.cumsum(0)
        candidates = keys.new_full((len(lowest), int(counts.max())), _NO_TOKEN)
        candidates[row, torch.arange(len(row), device=row.device) - (ends - counts)[row]] = keys
        self._keep_best(own, candidates)

    def _keep_best(self, rows: slice, candidates: Tensor) -> None:
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
