"""The keys and values of rows that share a batch for a while: rows join, rows leave, and padding before all goes.

Rows begin in different columns, with padding on the left, so that all continue in the same column. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Keys and values of fewer tokens than this are not kept: each prompt that continues kept ones makes its first pass alone.
LEAST_TOKENS = 16


def can_merge(config: Any) -> bool:
    """Return whether every block keeps plain keys and values, which can be padded and put together.

    Args:
        config: of the model.
    """
    layers = DynamicCache(config=config.get_text_config()).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def empty_cache(config: Any) -> DynamicCache:
    """Return a cache of a model for which rows `can_merge`, with all keys and values of blocks with a window as well.

    Rows then begin in any column: it is the mask that keeps those away that are too far back.

    Args:
        config: of the text model.
    """
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in DynamicCache(config=config).layers]
    return cache


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

    def shorten(self, length: int) -> None:
        """Drop the columns behind the first so many, which a pass that failed may have left in some blocks."""
        kept = self.columns(0, length)
        self.cache, self.mask = kept.cache, kept.mask

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
            if not layer.is_initialized:
                copied.layers.append(_layer(None, None))
                continue
            index = kept.to(layer.device)
            copied.layers.append(_layer(_cut(layer.keys, index, first), _cut(layer.values, index, first)))
        return RowCache(copied, mask[:, first:])

    def columns(self, start: int, end: int) -> RowCache:
        """Return a copy of some columns of all rows."""
        copied = DynamicCache()
        for layer in self.layers():
            keys, values = (layer.keys, layer.values) if layer.is_initialized else (None, None)
            copied.layers.append(_layer(_between(keys, start, end), _between(values, start, end)))
        return RowCache(copied, self.mask[:, start:end])

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


def _between(tensor: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if tensor is None else tensor[:, :, start:end].clone()  # a view would keep the rest


def _layer(keys: Tensor | None, values: Tensor | None) -> DynamicLayer:
    """Return a layer with these keys and values; without any, for a block that takes those of another."""
    layer = DynamicLayer()
    if keys is not None and values is not None:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return layer


def behind_one_another(caches: Sequence[RowCache]) -> RowCache:
    """Return the columns of caches of the same rows, at least one, in this order."""
    joined = DynamicCache()
    for layers in zip(*(cache.layers() for cache in caches), strict=True):
        keys = [layer.keys for layer in layers if layer.keys is not None]
        values = [layer.values for layer in layers if layer.values is not None]
        joined.layers.append(_layer(torch.cat(keys, 2), torch.cat(values, 2)) if keys else _layer(None, None))
    return RowCache(joined, torch.cat([cache.mask for cache in caches], 1))
