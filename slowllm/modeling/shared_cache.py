"""Keys and values of one rider, shared with riders that continue its rows in the same sweep.

At every block the rider with the shared prefix passes first, because it boarded first; those that continue it take
its keys and values of that block, and the last one drops them. So a shared prefix costs the memory of one block's keys
and values, not of the whole model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from slowllm.errors import CheckpointError, RideError, first_line

Pair = tuple[Tensor, Tensor]


class SharedPrefix:
    """Keys and values of the rows of one rider, by block, until every taker has taken them.

    Args:
        num_takers: riders that will take them, each once at every block.
    """

    def __init__(self, num_takers: int) -> None:
        self._num_takers = num_takers
        self._pairs: dict[int, tuple[Pair, int]] = {}

    def put(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Keep a block's keys and values: (B, heads, T, head_dim) each, those that the rider began with included."""
        self._pairs[block] = ((keys, values), self._num_takers)

    def take(self, block: int) -> Pair:
        """Return the keys and values of a block; the last taker drops them.

        Raises:
            RideError: the rider that should have put them here has failed.
        """
        if block not in self._pairs:
            raise RideError("the rider that computes the beginning of these rows has failed")
        pair, num_left = self._pairs.pop(block)
        if num_left > 1:
            self._pairs[block] = (pair, num_left - 1)
        return pair


class Beginning:
    """What the rows of a rider continue: one position, each after a row of some shared prefix.

    Args:
        length: tokens before the rows' own.
        rows: for each row a shared prefix, and the number of its row there.
    """

    def __init__(self, length: int, rows: Sequence[tuple[SharedPrefix, int]]) -> None:
        self.length, self._rows = length, rows

    def take(self, block: int) -> Pair:
        """Return keys and values (B, heads, length, head_dim) of a block."""
        pairs = {prefix: prefix.take(block) for prefix in dict.fromkeys(prefix for prefix, _ in self._rows)}
        # No copy of a row that all continue, until their own tokens are appended.
        are_alike = all(row == self._rows[0] for row in self._rows)

        def rows_of(side: int) -> Tensor:
            rows = [
                pairs[prefix][side][number : number + 1, :, : self.length]
                for prefix, number in (self._rows[:1] if are_alike else self._rows)
            ]
            return rows[0].expand(len(self._rows), -1, -1, -1) if are_alike else torch.cat(rows)

        return rows_of(0), rows_of(1)


class Begins(Protocol):
    """What comes before a rider's own tokens: a `Beginning`, or a `PrefixBeginning`."""

    length: int

    def take(self, block: int) -> Pair:
        """Return keys and values (B, heads, length, head_dim) of a block."""


class _Layer(DynamicLayer):
    """A block's part of a `SharedCache`. Keeps nothing: a row passes each block once."""

    def __init__(self, block: int, beginning: Begins | None, shared: SharedPrefix | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block, self._beginning, self._shared = block, beginning, shared

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        if self._beginning is not None:
            # Those of a soft prompt are on the processor, wherever the block is.
            keys, values = (side.to(key_states.device) for side in self._beginning.take(self._block))
            key_states = torch.cat([keys, key_states], -2)
            value_states = torch.cat([values, value_states], -2)
        if self._shared is not None:
            self._shared.put(self._block, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self._beginning is None else self._beginning.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class SharedCache(Cache):
    """The cache of a rider that continues others' rows, or whose rows others continue.

    Args:
        num_blocks: of the model.
        beginning: None where its rows begin at position 0.
        shared: None where no rider continues its rows.
    """

    def __init__(self, num_blocks: int, beginning: Begins | None, shared: SharedPrefix | None) -> None:
        super().__init__(layers=[_Layer(block, beginning, shared) for block in range(num_blocks)])


_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def can_share(config: Any) -> bool:
    """Return whether a model's cache is keys and values at every block, and nothing else.

    Recurrent states and indices of a cache are not handed from rider to rider. Of a block with a window all keys and values are, as
    within one call: it is the mask that keeps those away that are too far back.

    Raises:
        CheckpointError: transformers can make no cache by the config.
    """
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False):
        return False
    try:
        layers = DynamicCache(config=config.get_text_config()).layers
    except Exception as error:  # whatever transformers and torch may raise on a config
        raise CheckpointError(f"config.json: no cache can be made by it ({first_line(error)})") from error
    return bool(layers) and all(type(layer) in _PLAIN_LAYERS for layer in layers) and takes_cache(config)


def takes_cache(config: Any) -> bool:
    """Return whether a model takes a cache; OpenAI GPT, for one, would ignore it."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind is None or bool(
        {"past_key_values", "cache_params"} & set(inspect.signature(kind.forward).parameters)
    )
