"""Caches whose keys and values are elsewhere: labels stand in their place, one number for each row and position.

transformers, PEFT or a draft may reorder, crop, repeat, select or fan out such a cache by its own code. From the labels
before a call it is then read what the holder of the keys and values has to do with them: nothing, a crop, rows, or a
gather of rows and positions (`Move`). The holder does it with `move_layer`.

Knows the layers of transformers' caches; knows no network and no blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from slowllm.errors import InputError, SessionError, UnsupportedError, counted
from slowllm.modeling.shared_cache import Pair

# Layers that a holder can keep: keys and values of positions, and nothing that depends on their order.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
# More positions than any call has: a label is the number of its call times this, and the number of its place in the call.
_PLACES = 1 << 32
_HELD = "_slowllm_held"


@dataclass(frozen=True)
class Move:
    """What to do with keys and values (B, heads, L, head_dim) before a call.

    Attributes:
        rows: (B',) or (B', L') int64: the row that each row, or each position of a row, is taken from; None for all as
            they are.
        positions: (B', L') int64: the position that each is taken from; None for all from the first on.
        length: L', how many positions are kept.
    """

    length: int
    rows: Tensor | None = None
    positions: Tensor | None = None


@dataclass(eq=False)
class Held:
    """What the holder keeps of one layer of a cache.

    Attributes:
        kept: where; None where nothing is kept.
        labels: (B, L) int64, in the order in which the holder has them.
    """

    kept: Any = None
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        """Return itself: copies of a cache have their keys and values in one place."""
        return self


class LabelSource:
    """Makes labels, each once. One for all caches of a model."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def new(self, batch: int, length: int) -> Tensor:
        """Return labels (B, T) that were never used."""
        return next(self._numbers) * _PLACES + torch.arange(batch * length).view(batch, length)


def held_of(layer: CacheLayerMixin) -> Held | None:
    """Return what the holder keeps of a layer; None where the layer has keys and values of its own, or is new."""
    held: Held | None = layer.__dict__.get(_HELD)
    return held


def check_kinds(cache: Cache) -> None:
    """Refuse a cache whose layers others cannot keep.

    Raises:
        UnsupportedError: a layer holds other things than keys and values of positions as they come.
    """
    for layer in cache.layers:
        # A subclass of ours grows as its parent does, and says so itself.
        if not isinstance(layer, DynamicLayer) or (
            type(layer) not in _PLAIN_LAYERS and type(layer).__module__.startswith("transformers.")
        ):
            raise UnsupportedError(
                f"a cache with layers of kind {type(layer).__name__} cannot be kept by other machines: only growing keys and "
                "values (DynamicCache) can; recurrent states, static and quantised caches cannot"
            )


def check_rows(layer: CacheLayerMixin, num_rows: int) -> None:
    """Refuse a call of other rows than a layer holds, keys and values or labels.

    Raises:
        InputError: the message has both numbers.
    """
    # A subclass of ours may hold rows that it fans out.
    keys = layer.keys if layer.is_initialized and type(layer) in _PLAIN_LAYERS else None
    if keys is not None and keys.numel() and len(keys) != num_rows:
        raise InputError(
            f"the call has {counted(num_rows, 'row')}, but the cache that it continues has {counted(len(keys), 'row')}; select "
            "the cache's rows first (batch_select_indices, hypo_ids), or begin another cache"
        )


def adopt(layer: CacheLayerMixin, source: LabelSource) -> Pair | None:
    """Put labels in the place of a layer's keys and values; return these, which the holder begins with.

    Returns:
        keys and values (B, heads, L, head_dim); None where the layer is new, or has labels already.
    """
    if held_of(layer) is not None:
        return None
    held = Held()
    layer.__dict__[_HELD] = held
    keys, values = layer.keys, layer.values
    if not layer.is_initialized or keys is None or values is None or not keys.numel():
        return None
    held.labels = source.new(keys.shape[0], keys.shape[-2])
    layer.keys = layer.values = held.labels[:, None, :, None]
    return keys, values


def step(layer: CacheLayerMixin, labels: Tensor) -> Move | None:
    """Append labels (B, T) to a layer by its own rules.

    Returns:
        what the holder has to do before it appends the keys and values of the call; None for nothing.
    Raises:
        SessionError: the layer has labels that the holder does not keep any more.
    """
    held = held_of(layer)
    assert held is not None, "adopt() comes first"
    as_tensors = labels[:, None, :, None]
    if type(layer) is DynamicSlidingWindowLayer:
        # What such a layer returns is less than what it keeps where it records the past.
        wanted = layer.keys[:, 0, :, 0] if layer.is_initialized and layer.keys is not None else labels[:, :0]
        layer.update(as_tensors, as_tensors)
        assert layer.keys is not None, "it was updated"
        kept = layer.keys[:, 0, :, 0]
    else:
        full, _ = layer.update(as_tensors, as_tensors)
        kept = full[:, 0, :, 0]
        wanted = kept[:, : -labels.shape[1]]
    move = _move_between(held.labels, wanted)
    held.labels = kept
    return move


def _move_between(have: Tensor, want: Tensor) -> Move | None:
    """Return how the labels that the holder has (B, L) become those that are wanted (B', L')."""
    if torch.equal(have, want) or (not have.numel() and not want.numel()):
        return None
    length = want.shape[1]
    if not want.numel():
        return Move(0)
    if want.shape[0] == have.shape[0] and torch.equal(want, have[:, :length]):
        return Move(length)
    known, order = have.flatten().sort()
    wanted = want.flatten().contiguous()
    found = torch.searchsorted(known, wanted).clamp(max=len(known) - 1) if len(known) else wanted[:0]
    if not torch.equal(known[found], wanted):
        raise SessionError(
            "the cache has positions whose keys and values are not kept any more; caches that were copied share what is "
            "kept, so go on with one of the copies only"
        )
    places = order[found]
    places = places.view(want.shape)
    rows, positions = places // have.shape[1], places % have.shape[1]
    if torch.equal(positions, torch.arange(length).expand_as(positions)) and bool(
        (rows == rows[:, :1]).all()
    ):
        return Move(length, rows[:, 0].contiguous())
    return Move(length, rows, positions)


def move_layer(layer: CacheLayerMixin, move: Move) -> None:
    """Do with the keys and values of a layer what a move says.

    Raises:
        SessionError: it asks for rows or positions that are not there.
    """
    if (
        not isinstance(layer, DynamicLayer)
        or layer.keys is None
        or layer.values is None
        or not layer.keys.numel()
    ):
        raise SessionError("the session has no keys and values yet, but the call moves some")
    batch, length = layer.keys.shape[0], layer.keys.shape[-2]
    for noun, index, limit in (("row", move.rows, batch), ("position", move.positions, length)):
        if index is None or not index.numel():
            continue
        lowest, highest = int(index.min()), int(index.max())
        if not 0 <= lowest <= highest < limit:
            raise SessionError(
                f"a move names {noun} {lowest if lowest < 0 else highest}, but the session has {counted(limit, noun)} from 0 on"
            )
    if move.length > length and move.positions is None:
        raise SessionError(f"a move keeps {move.length} of {length} positions")
    layer.keys = _moved(layer.keys, move, -2)
    layer.values = _moved(layer.values, move, -2)
    indexer_keys = getattr(layer, "indexer_keys", None)
    if indexer_keys is not None and indexer_keys.numel():
        layer.indexer_keys = _moved(indexer_keys[:, None], move, -2)[:, 0]  # type: ignore[attr-defined]


def _moved(tensor: Tensor, move: Move, dim: int) -> Tensor:
    """Return a tensor (B, heads, L, D) after a move."""
    assert dim == -2, "positions are the last dimension but one"
    if move.positions is not None:
        assert move.rows is not None, "positions are given with their rows"
        return tensor.transpose(1, 2)[move.rows, move.positions].transpose(1, 2).contiguous()
    tensor = tensor[:, :, : move.length]
    return tensor if move.rows is None else tensor.index_select(0, move.rows)


def pretend_length(layer: CacheLayerMixin, batch: int, length: int, dtype: torch.dtype) -> None:
    """Let a layer that no block here appends to tell the length from which masks and positions are made.

    It takes no memory for the positions.
    """
    assert isinstance(layer, DynamicLayer), "new_cache makes no others"
    if not length:
        layer.reset()
        return
    # Not empty, because an empty tensor means a length of 0 to transformers.
    stand_in = torch.zeros(1, dtype=dtype).expand(batch, 1, length, 1)
    layer.keys = layer.values = stand_in
    layer.dtype, layer.device, layer.is_initialized = dtype, stand_in.device, True
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def is_as_configured(cache: Cache, configured: Cache) -> bool:
    """Return whether the layers of a cache are those that transformers makes by the config; else all keep every position.

    Raises:
        UnsupportedError: the layers are of several other kinds.
    """
    kinds = [type(layer) for layer in cache.layers[: len(configured.layers)]]
    if kinds == [type(layer) for layer in configured.layers[: len(kinds)]]:
        return True
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise UnsupportedError(
            "a cache with other windows than the config has cannot be kept by other machines"
        )
    return False
