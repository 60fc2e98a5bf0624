"""A cache whose keys and values are at the machines of hops: what a call says of its past there.

Labels are appended to the client's cache by its own code, and what has become of the earlier ones is told as moves.
"""

from __future__ import annotations

import uuid
import weakref
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from slowllm.errors import SessionError, UnsupportedError
from slowllm.modeling.cache_labels import (
    Held,
    Move,
    adopt,
    check_kinds,
    check_rows,
    held_of,
    is_as_configured,
    step,
)
from slowllm.modeling.remote_spans import Hop, Kept, Remote
from slowllm.modeling.shared_cache import Pair
from slowllm.modeling.span import SpanCall


def kept_hop(cache: Cache | None, first: int) -> Hop | None:
    """Return the hop whose machine keeps the keys and values of a block; None for a new cache."""
    if cache is None or first >= len(cache.layers):
        return None
    held = held_of(cast(CacheLayerMixin, cache.layers[first]))
    kept = None if held is None else held.kept
    if isinstance(kept, Kept) and kept.hop.first != first:
        raise SessionError(
            f"the keys and values of block {first} are kept by a hop that begins at {kept.hop.first}"
        )
    return kept.hop if isinstance(kept, Kept) else None


def with_cache(remote: Remote, call: SpanCall, hop: Hop, cache: Cache) -> tuple[SpanCall, str | None]:
    """Append labels to a cache; return the call with what the cache says of its past, and the session of the hop.

    Raises:
        UnsupportedError: the cache is of a kind that others cannot keep.
        InputError: it has other rows than the call.
        SessionError: what it says of its past is not kept as it says.
    """
    configured = DynamicCache(config=remote.config)
    while len(cache.layers) < call.end:
        kind = getattr(cache, "layer_class_to_replicate", None)
        if kind is None:
            raise UnsupportedError(
                f"a cache of {len(cache.layers)} layers was given to a model of more blocks"
            )
        cache.layers.append(kind())
    check_kinds(cache)
    keeps_everything = not is_as_configured(cache, configured)
    numbers = range(call.first, call.end)
    layers = cast(list[CacheLayerMixin], [cache.layers[number] for number in numbers])
    for layer in layers:
        check_rows(layer, len(call.hidden))
    is_new = held_of(layers[0]) is None
    pairs: dict[int, Pair] = {}
    for number, layer in zip(numbers, layers, strict=True):
        pair = adopt(layer, remote.labels)
        if pair is not None:
            pairs[number] = pair
    helds = [cast(Held, held_of(layer)) for layer in layers]  # all have one now
    has_past = not is_new and bool(helds[0].labels.numel())
    if has_past and len({held.kept for held in helds}) > 1:
        raise SessionError("the keys and values of this cache are kept by other hops than the model has now")
    wants_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad
        for tensor in (*tensors_of(call), *(side for pair in pairs.values() for side in pair))
    )
    if has_past and helds[0].kept is None:
        raise SessionError(
            "the cache was filled under autograd, which leaves nothing at other machines; fill it under torch.no_grad()"
        )
    if is_new and not wants_grad:
        kept = Kept(hop, uuid.uuid4().hex)
        # Not at the interpreter's exit, when the connection has gone and the machine notices by itself.
        weakref.finalize(helds[0], remote.spans.end_session, kept).atexit = False
        for held in helds:
            held.kept = kept
    length = layers[0].get_seq_length()
    labels = remote.labels.new(*call.hidden.shape[:2])
    moves: dict[int, Move] = {}
    shared: dict[tuple[int, ...], Move] = {}
    for number, layer in zip(numbers, layers, strict=True):
        move = step(layer, labels)
        if move is not None:
            moves[number] = _shared(move, shared)
    records_past = any(getattr(layer, "record_past", False) for layer in layers)
    call = replace(
        call,
        length=length,
        pairs=pairs,
        moves=moves,
        records_past=records_past,
        keeps_everything=keeps_everything,
    )
    kept_at = helds[0].kept
    return call, kept_at.session if isinstance(kept_at, Kept) else None


def _shared(move: Move, shared: dict[tuple[int, ...], Move]) -> Move:
    """Return the first move that is equal to this one, so that it is sent once for all blocks of a hop."""
    key = (
        move.length,
        *(() if move.rows is None else (move.rows.dim(), *move.rows.flatten().tolist())),
        -1,
        *(() if move.positions is None else move.positions.flatten().tolist()),
    )
    return shared.setdefault(key, move)


def tensors_of(call: SpanCall) -> list[Tensor]:
    """Return the tensors of a call that may want a gradient, in a fixed order."""
    return [call.hidden, *call.vectors.values(), *(side for pair in call.pairs.values() for side in pair)]
