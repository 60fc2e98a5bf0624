"""Compute a span of blocks on given hidden states, by transformers' own forward: the work of a server.

A request calls the module that owns the blocks. The blocks below the span return at once, its first block gets the
given hidden states, and behind its last block the pass ends. So masks, ALiBi and rotary tables are made by the model's
own code from the mask, the positions and the length of the cache, and are never sent.

Knows transformers' models and caches; knows no network, no names of sessions and no clients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from slowllm.errors import SessionError
from slowllm.modeling.cache_labels import Move, move_layer, pretend_length
from slowllm.modeling.cutting import BlockForm
from slowllm.modeling.recompute import hidden_of
from slowllm.modeling.replay import SharedLayers, Turns
from slowllm.modeling.shared_cache import Pair
from slowllm.modeling.soft_prompts import add_vectors
from slowllm.streaming.call_context import call_context
from slowllm.streaming.hints import Reach
from slowllm.streaming.way import SpanOfBlocks, StopForward

OnBlock = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class SpanCall:
    """What a caller says of one passage of its rows through a span of blocks.

    Attributes:
        first: the first block.
        end: the number after the last block.
        hidden: (B, T, ...) that the first block gets, in the compute dtype.
        mask: (B, L + T), which positions hold text; None where the model was called without one.
        positions: (B, T) or (1, T) int64; None where the model makes them.
        length: L, the positions that the cache holds before the call, those of `pairs` included.
        vectors: of a deep prompt, (P, H) or (B, P, H), by the number of a block behind the first, whose input they are
            added to: each to the position of its number.
        pairs: keys and values (B, heads, P, head_dim) that the cache of a block begins with, by the block's number.
        moves: what to do with a block's keys and values before the call, by the block's number.
        records_past: whether sliding windows keep what has left them until it is cropped.
        keeps_everything: whether the cache keeps every position at every block, whatever windows the config has.
        returns_all: whether the output of every block is returned, not of the last alone.
        final_length: positions that the cache will hold at its end, as far as the caller knows; 0 where it does not. It
            changes nothing that is computed, and is not sent.
    """

    first: int
    end: int
    hidden: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    length: int = 0
    vectors: Mapping[int, Tensor] = field(default_factory=dict)
    pairs: Mapping[int, Pair] = field(default_factory=dict)
    moves: Mapping[int, Move] = field(default_factory=dict)
    records_past: bool = False
    keeps_everything: bool = False
    returns_all: bool = False
    final_length: int = 0


@dataclass(frozen=True)
class SpanGrads:
    """The gradients of a passage's inputs; those that the outputs do not depend on are left out.

    Attributes:
        hidden: of the hidden states, (B, T, ...).
        vectors: of the vectors, by the block's number.
        pairs: of keys and values, by the block's number; None for a side that has none.
    """

    hidden: Tensor | None
    vectors: Mapping[int, Tensor]
    pairs: Mapping[int, tuple[Tensor | None, Tensor | None]]


def part_of(call: SpanCall, first: int, end: int, hidden: Tensor) -> SpanCall:
    """Return the part of a call that some of its blocks compute.

    Args:
        call: of a span.
        first: the first of the blocks.
        end: the number after the last.
        hidden: (B, T, ...) that the first of them gets.
    """

    def within(table: Mapping[int, T]) -> dict[int, T]:
        return {number: value for number, value in table.items() if first <= number < end}

    return replace(
        call, first=first, end=end, hidden=hidden, vectors=within(call.vectors), pairs=within(call.pairs),
        moves=within(call.moves),
    )  # fmt: skip


class SpanRunner:
    """The blocks of a streamed model as they are computed for others.

    Args:
        model: that has the blocks.
        blocks_name: of their list.
        form: how its blocks are called; from `cutting.find_form`.
    """

    def __init__(self, model: Any, blocks_name: str, form: BlockForm) -> None:
        self._model, self._form = model, form
        self._owner = model.get_submodule(blocks_name.rpartition(".")[0])
        self._num_blocks = len(model.get_submodule(blocks_name))

    def new_cache(self, *, keeps_everything: bool = False) -> DynamicCache:
        """Return an empty cache with a layer for every block of the model, most of which only tell their length."""
        cache = (
            DynamicCache() if keeps_everything else DynamicCache(config=self._model.config.get_text_config())
        )
        while (
            len(cache.layers) < self._num_blocks
        ):  # a cache without the config's kinds of layers grows by itself
            cache.layers.append(DynamicLayer())
        return cache

    def replay(
        self, calls: Sequence[SpanCall], cache: Cache, on_block: OnBlock | None = None
    ) -> list[Callable[[], dict[int, Tensor]]]:
        """Return one job for each of the calls in which a cache grew, to be boarded together in this order.

        In one sweep over the span they leave in the cache what the calls, one sweep after the other, have left.

        Args:
            calls: in their order; each continues what the one before it leaves.
            cache: of `new_cache`, at which the first of them begins.
            on_block: called with the number of each block that the last of them has computed.
        Returns:
            jobs that compute what `forward` returns for a call.
        """
        turns = Turns(cache)
        watch = [None] * (len(calls) - 1) + [on_block]
        return [
            functools.partial(self._replay_one, call, turns, number, watch[number])
            for number, call in enumerate(calls)
        ]

    def _replay_one(
        self, call: SpanCall, turns: Turns, turn: int, on_block: OnBlock | None
    ) -> dict[int, Tensor]:
        blank = self.new_cache(keeps_everything=call.keeps_everything)
        for layer in cast(list[DynamicLayer], blank.layers):
            pretend_length(layer, len(call.hidden), call.length, call.hidden.dtype)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.record_past = call.records_past
        prepare = functools.partial(_prepare_number, call)
        with torch.no_grad():
            return self._run(
                call, SharedLayers(blank.layers, turns, turn, prepare), on_block, is_prepared=True
            )

    def forward(
        self, call: SpanCall, cache: Cache | None = None, on_block: OnBlock | None = None
    ) -> dict[int, Tensor]:
        """Compute the span without gradients.

        Args:
            call: says on what.
            cache: that is read and appended to; None where a call has no past and leaves nothing.
            on_block: called with the number of each block that has been computed.
        Returns:
            the hidden states (B, T, ...) behind the last block, or behind every one, by their numbers.
        Raises:
            NonFiniteError: a block returned NaN.
            SessionError: the cache does not hold what the call says.
        """
        with torch.no_grad():
            if cache is None and call.pairs:
                cache = self.new_cache(keeps_everything=call.keeps_everything)
            return self._run(call, cache, on_block)

    def backward(
        self, call: SpanCall, grads: Mapping[int, Tensor], on_block: OnBlock | None = None
    ) -> SpanGrads:
        """Compute the span again, without a past in a cache, and return the gradients of its inputs.

        Args:
            call: as it was for the forward pass.
            grads: (B, T, ...) of the returned hidden states, by the block's number.
            on_block: called on the way up, as for `forward`.
        """
        with torch.enable_grad():
            hidden = call.hidden.detach().requires_grad_(True)
            vectors = {n: vector.detach().requires_grad_(True) for n, vector in call.vectors.items()}
            pairs = {n: (_leaf(keys), _leaf(values)) for n, (keys, values) in call.pairs.items()}
            cache = self.new_cache(keeps_everything=call.keeps_everything) if pairs else None
            outputs = self._run(replace(call, hidden=hidden, vectors=vectors, pairs=pairs), cache, on_block)
            leaves = [hidden, *vectors.values(), *(side for pair in pairs.values() for side in pair)]
            found = iter(
                torch.autograd.grad(
                    [outputs[n] for n in grads], leaves, list(grads.values()), allow_unused=True
                )
            )
        of_hidden = next(found)
        of_vectors = {n: grad for n in vectors if (grad := next(found)) is not None}
        return SpanGrads(of_hidden, of_vectors, {n: (next(found), next(found)) for n in pairs})

    def _run(
        self, call: SpanCall, cache: Cache | None, on_block: OnBlock | None, *, is_prepared: bool = False
    ) -> dict[int, Tensor]:
        if cache is not None and not is_prepared:
            _prepare(cache, call)
        batch, width = call.hidden.shape[:2]
        way = SpanOfBlocks(
            call.first, call.end, call.hidden, self._form.stand_in(call.hidden), keeps_all=call.returns_all,
            on_block=on_block,
        )  # fmt: skip
        arguments: dict[str, Any] = {
            "inputs_embeds": self._form.embeddings(batch, width),
            "use_cache": cache is not None,
        }
        given = {"attention_mask": call.mask, "position_ids": call.positions, "past_key_values": cache}
        arguments |= {name: value for name, value in given.items() if value is not None}
        edit_input = functools.partial(_add_vectors, call.vectors, call.length) if call.vectors else None
        reach = Reach(call.first, call.end, call.end)
        with call_context(way=way, reach=reach, edit_input=edit_input), contextlib.suppress(StopForward):
            self._owner(**arguments)
        return {number: hidden_of(output) for number, output in way.outputs.items()}


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(True)


def _add_vectors(vectors: Mapping[int, Tensor], start: int, block: int, hidden: Tensor) -> Tensor:
    """Add a deep prompt's vectors to the positions of a call that begins at position `start`."""
    return add_vectors(hidden, vectors[block], start) if block in vectors else hidden


def _prepare(cache: Cache, call: SpanCall) -> None:
    """Bring a cache into the form in which a call finds it."""
    for number, layer in enumerate(cast(list[DynamicLayer], cache.layers)):  # of `new_cache`
        if call.first <= number < call.end:
            prepare_layer(layer, number, call)
        else:
            pretend_length(layer, len(call.hidden), call.length, call.hidden.dtype)


def _prepare_number(call: SpanCall, number: int, layer: Any) -> None:
    prepare_layer(layer, number, call)


def prepare_layer(layer: DynamicLayer, number: int, call: SpanCall) -> None:
    """Bring one block's layer of a cache into the form in which a call finds it.

    Raises:
        SessionError: the layer does not hold what the call says.
    """
    batch = len(call.hidden)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.record_past = call.records_past
    if number in call.moves:
        move_layer(layer, call.moves[number])
    if number in call.pairs:
        layer.update(*call.pairs[number])
    if isinstance(layer, DynamicSlidingWindowLayer):
        # After a crop the window holds less than it has seen.
        layer.cumulative_length = call.length
    held = layer.get_seq_length()
    if held != call.length or (held and layer.keys is not None and len(layer.keys) != batch):
        rows = 0 if layer.keys is None else len(layer.keys)
        raise SessionError(
            f"the call continues {batch} rows of {call.length} positions, but the session holds {rows} of {held}"
        )
