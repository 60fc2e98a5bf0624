"""The keys and values of rows that share a batch for a while: rows join, rows leave, and padding before all goes.

Rows begin in different columns, with padding on the left, so that all continue in the same column. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def can_merge(config: Any) -> bool:
    """Return whether every block keeps plain keys and values, which can be padded and put together.

    Args:
        config: of the model.
    """
    layers = DynamicCache(config=config.get_text_config()).layers
    return all(type(layer) is DynamicLayer for layer in layers)


class RowCache:
    """Keys and values of the rows of a batch.

    Args:
        cache: as transformers' models use it, with plain layers only.
        mask: (B, L) int64, 1 where a position holds a token of its row.
    """

    def __init__(self, cache: DynamicCache, mask: Tensor) -> None:
        self.cache, self.mask = cache, mask

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, the tokens of each row."""
        return self.mask.sum(-1)

    def extend(self) -> None:
        """Note that every row got one token more."""
        self.mask = F.pad(self.mask, (0, 1), value=1)

    def join(self, other: RowCache) -> None:
        """Take the rows of another batch behind the own ones."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        ours, theirs = length - self.mask.shape[1], length - other.mask.shape[1]
        for layer, joining in zip(self.layers(), other.layers(), strict=True):
            if not layer.is_initialized:  # its block takes those of another
                continue
            layer.keys = torch.cat([_pad(layer.keys, ours), _pad(joining.keys, theirs)])
            layer.values = torch.cat([_pad(layer.values, ours), _pad(joining.values, theirs)])
            joining.reset()
        self.mask = torch.cat([F.pad(self.mask, (ours, 0)), F.pad(other.mask, (theirs, 0))])

    def rows(self, rows: Sequence[int]) -> RowCache:
        """Return a copy of some rows, at least one, without columns that hold padding in all of them; each as often as named."""
        kept = torch.tensor(rows)
        mask = self.mask[kept]
        first = int(mask.any(0).nonzero()[0])
        copied = DynamicCache()
        for layer in self.layers():
            own = DynamicLayer()
            copied.layers.append(own)
            if not layer.is_initialized:
                continue
            own.dtype, own.device, own.is_initialized = layer.dtype, layer.device, True
            index = kept.to(layer.device)
            own.keys, own.values = _cut(layer.keys, index, first), _cut(layer.values, index, first)
        return RowCache(copied, mask[:, first:])

    def beginning(self, length: int) -> RowCache:
        """Return a copy of the first tokens of a single row without padding."""
        copied = self.rows([0])
        for layer in copied.layers():
            if layer.is_initialized:
                layer.keys, layer.values = _first(layer.keys, length), _first(layer.values, length)
        return RowCache(copied.cache, copied.mask[:, :length])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the rows that are not named."""
        # Layer by layer in `rows`, but the old ones stay until all are copied: rows that stay are the larger part seldom.
        kept = self.rows(rows)
        self.cache, self.mask = kept.cache, kept.mask

    def layers(self) -> list[DynamicLayer]:
        """Return the keys and values of each block; a block that takes those of another has none."""
        return cast(list[DynamicLayer], self.cache.layers)


def _pad(tensor: Tensor | None, num_columns: int) -> Tensor:
    """Put columns of zeros before keys or values (B, heads, L, D)."""
    assert tensor is not None, "a layer that was computed has keys and values"
    return F.pad(tensor, (0, 0, num_columns, 0)) if num_columns else tensor


def _cut(tensor: Tensor | None, rows: Tensor, first: int) -> Tensor:
    assert tensor is not None, "as above"
    return tensor[rows, :, first:]


def _first(tensor: Tensor | None, length: int) -> Tensor:
    assert tensor is not None, "as above"
    return tensor[:, :, :length].clone()  # a view would keep the rest
