"""A cache that is filled anew by the calls in which it grew, all of them in one sweep.

Each call is a rider, and at each block they append one after the other, in their order, to the block's layer, as they did
when each of them had a sweep of its own. Before a call comes to a block, its own view of the cache only tells the length
at which it will find the layer, from which the model's code makes masks and positions.

Knows the caches of transformers; knows no spans, no network and no weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from slowllm.errors import SessionError


class Turns:
    """The layers that several calls fill, and how many of them have come to each.

    Args:
        cache: whose layers they are.
    """

    def __init__(self, cache: Cache) -> None:
        self._layers = cast(list[CacheLayerMixin], cache.layers)
        self._num_passed = [0] * len(cache.layers)
        self._lock = threading.Lock()

    def layer(self, number: int, turn: int) -> CacheLayerMixin:
        """Return a layer to the call whose turn it is, which says `pass_layer` when it has found it as it should be.

        Args:
            number: of the layer.
            turn: number of the call, from 0.
        Raises:
            SessionError: a call before it has failed, so that the layer lacks what it would continue.
        """
        with self._lock:
            if self._num_passed[number] != turn:
                raise SessionError(
                    f"passage {turn} of a replay found block {number} after {self._num_passed[number]} of those before it"
                )
            return self._layers[number]

    def pass_layer(self, number: int) -> None:
        """Let the next call have a layer."""
        with self._lock:
            self._num_passed[number] += 1


class SharedLayers(Cache):
    """One call's view of layers that are filled by several calls.

    Args:
        layers: which tell the length that the call will find.
        turns: gives the layers.
        turn: number of the call.
        prepare: brings a layer into the form in which the call finds it, given its number.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        turns: Turns,
        turn: int,
        prepare: Callable[[int, CacheLayerMixin], None],
    ) -> None:
        super().__init__(layers=list(layers))
        self._turns, self._turn, self._prepare = turns, turn, prepare
        self._taken: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer, which is the shared one from here on; see `Cache.update`."""
        self._take(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Append an indexer's keys to a layer, which is the shared one from here on; see `Cache.update_indexer`."""
        self._take(layer_idx)
        return super().update_indexer(indexer_key_states, layer_idx)

    def _take(self, number: int) -> None:
        if number not in self._taken:
            layer = self._turns.layer(number, self._turn)
            self._prepare(number, layer)
            self.layers[number] = layer
            self._taken.add(number)
            self._turns.pass_layer(number)
