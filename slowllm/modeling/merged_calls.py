"""The calls in which a session grew, merged into one that computes its keys and values in one pass.

A pass over all positions at once multiplies other shapes than the steps did, so its bits are others: by about 3e-6 of the
logits in float32, and 0.05 in bfloat16. `modeling.replay` takes the steps themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slowllm.modeling.cache_labels import Move
from slowllm.modeling.span import SpanCall


def merged(calls: Sequence[SpanCall], max_tokens: int) -> list[SpanCall] | None:
    """Return calls that leave in a new session what all the calls together have left, up to rounding.

    Args:
        calls: of one session and one span, in their order, from its first.
        max_tokens: rows times positions of one of the returned calls, at most; at least one position each.
    Returns:
        one call, or several where it would have too many tokens; None where the session can only grow by its own steps:
        it began with keys and values, its blocks keep different positions, or its calls added vectors that differ.
    """
    first, last = calls[0], calls[-1]
    hidden, positions = first.hidden[:, :0], None if first.positions is None else first.positions[..., :0]
    for call in calls:
        if call.pairs or (call.positions is None) != (first.positions is None):
            return None
        if call.moves:
            move = next(iter(call.moves.values()))
            if len(call.moves) < call.end - call.first or any(
                other is not move for other in call.moves.values()
            ):
                return None
            if any(vector.dim() == 3 for vector in first.vectors.values()) and move.rows is not None:
                return None
            hidden = _moved(hidden, move)
            positions = None if positions is None else _moved_positions(positions, move)
        if hidden.shape[1] != call.length or not _add_the_same(first, call):
            return None
        hidden = torch.cat([hidden.expand(len(call.hidden), *hidden.shape[1:]), call.hidden], 1)
        if positions is not None and call.positions is not None:
            if positions.shape[:-1] != call.positions.shape[:-1]:
                return None
            positions = torch.cat([positions, call.positions], -1)
    whole = replace(
        last, hidden=hidden, positions=positions, length=0, vectors=first.vectors, moves={}, returns_all=False
    )
    width = max(1, max_tokens // len(hidden))
    return [_piece(whole, begin, width) for begin in range(0, hidden.shape[1], width)]


def _add_the_same(first: SpanCall, call: SpanCall) -> bool:
    """Whether a call added to its positions what the vectors of the first call say of them."""
    own, others = ({n: v[..., call.length :, :] for n, v in one.vectors.items()} for one in (call, first))
    own, others = ({n: v for n, v in one.items() if v.numel()} for one in (own, others))
    return own.keys() == others.keys() and all(torch.equal(vector, others[n]) for n, vector in own.items())


def _piece(whole: SpanCall, begin: int, width: int) -> SpanCall:
    end = begin + width
    return replace(
        whole,
        hidden=whole.hidden[:, begin:end],
        mask=None if whole.mask is None else whole.mask[:, :end],
        positions=None if whole.positions is None else whole.positions[..., begin:end],
        length=begin,
        vectors={n: vector for n, vector in whole.vectors.items() if vector.shape[-2] > begin},
    )


def _moved(inputs: Tensor, move: Move) -> Tensor:
    """Return inputs (B, L, ...) of positions after a move of their keys and values."""
    if move.rows is None:
        return inputs[:, : move.length]
    if move.positions is None:
        return inputs[move.rows, : move.length]
    return inputs[move.rows, move.positions]


def _moved_positions(positions: Tensor, move: Move) -> Tensor:
    """Return positions (B or 1, L) or (kinds, B or 1, L) after a move of their keys and values."""
    if positions.shape[-2] == 1 and move.positions is None:
        return positions[..., : move.length]
    if move.rows is None:
        return positions[..., : move.length]
    if move.positions is None:
        return positions[..., move.rows, : move.length]
    rows = torch.zeros_like(move.rows) if positions.shape[-2] == 1 else move.rows
    return positions[..., rows, move.positions]
