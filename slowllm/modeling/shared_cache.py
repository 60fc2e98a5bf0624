"""One rider's keys and values, for riders that go on from them in the same sweep.

At every block the rider with the shared beginning passes first, because it boarded first; those that go on from it
take its keys and values of that block, and when all have, they are dropped. So a shared beginning costs the memory
of one block's keys and values, not of the whole model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from slowllm.errors import RideError

Pair = tuple[Tensor, Tensor]


class SharedPrefix:
    """Keys and values of the rows of one rider, by block, until all have taken them.

    Args:
        num_takers: riders that will take them, each once at every block.
    """

    def __init__(self, num_takers: int) -> None:
        self._num_takers = num_takers
        self._kept: dict[int, tuple[Pair, int]] = {}

    def put(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Keep what a block made: (B, heads, T, head_dim) each, the rider's own beginning included."""
        self._kept[block] = ((keys, values), self._num_takers)

    def take(self, block: int) -> Pair:
        """Return what was kept for a block; the last taker takes it away.

        Raises:
            RideError: the rider that should have put it there has failed.
        """
        if block not in self._kept:
            raise RideError("the rider that computes the beginning of these rows has failed")
        pair, left = self._kept.pop(block)
        if left > 1:
            self._kept[block] = (pair, left - 1)
        return pair


class Beginning:
    """Where the rows of a rider begin: at one position, each after a row of some trunk.

    Args:
        length: tokens before the rows' own.
        rows: for each row a trunk, and the number of its row there.
    """

    def __init__(self, length: int, rows: Sequence[tuple[SharedPrefix, int]]) -> None:
        self.length, self._rows = length, rows

    def take(self, block: int) -> Pair:
        """Return keys and values (B, heads, length, head_dim) of a block."""
        taken: dict[int, Pair] = {}
        for trunk, _ in self._rows:
            if id(trunk) not in taken:
                taken[id(trunk)] = trunk.take(block)
        first = self._rows[0]
        if all(row == first for row in self._rows):
            # No copy until the rows' own are appended.
            return tuple(
                self._row(taken, *first, side).expand(len(self._rows), -1, -1, -1) for side in (0, 1)
            )  # type: ignore[return-value]
        return tuple(torch.cat([self._row(taken, *row, side) for row in self._rows]) for side in (0, 1))  # type: ignore[return-value]

    def _row(self, taken: dict[int, Pair], trunk: SharedPrefix, number: int, side: int) -> Tensor:
        return taken[id(trunk)][side][number : number + 1, :, : self.length]


class Begins(Protocol):
    """What comes before a rider's own tokens."""

    length: int

    def take(self, block: int) -> Pair:
        """Return keys and values (B, heads, length, head_dim) of a block."""


class _Layer(DynamicLayer):
    """A block's part of a `SharedCache`. Keeps nothing: a row passes each block once."""

    def __init__(self, block: int, beginning: Begins | None, trunk: SharedPrefix | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block, self._beginning, self._trunk = block, beginning, trunk

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        if self._beginning is not None:
            # A soft prompt's are on the processor, wherever the block is.
            keys, values = (side.to(key_states.device) for side in self._beginning.take(self._block))
            key_states = torch.cat([keys, key_states], -2)
            value_states = torch.cat([values, value_states], -2)
        if self._trunk is not None:
            self._trunk.put(self._block, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self._beginning is None else self._beginning.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class SharedCache(Cache):
    """The cache of a rider that goes on from others, or that others go on from.

    Args:
        num_blocks: of the model.
        beginning: None where its rows begin at position 0.
        trunk: None where nobody goes on from it.
    """

    def __init__(self, num_blocks: int, beginning: Begins | None, trunk: SharedPrefix | None) -> None:
        super().__init__(layers=[_Layer(block, beginning, trunk) for block in range(num_blocks)])


def can_share(config: Any) -> bool:
    """Return whether a model's cache is keys and values of every token at every block, and nothing else.

    Windows, recurrent states and indices of a cache are not handed from rider to rider.
    """
    layers = DynamicCache(config=config.get_text_config()).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers) and takes_cache(config)


def takes_cache(config: Any) -> bool:
    """Return whether a model takes a cache: OpenAI GPT, say, would ignore it."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind is None or bool(
        {"past_key_values", "cache_params"} & set(inspect.signature(kind.forward).parameters)
    )
