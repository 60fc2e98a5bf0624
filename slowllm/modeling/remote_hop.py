"""One call to the machine of a hop, with gradients; and hidden states that pass through blocks elsewhere by themselves.

An autograd Function for each hop keeps the hop's inputs, and its backward asks for their gradients.

Knows what a span is (`span`) and labelled caches (`remote_cache`); of the machines it knows a `Spans` only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache

from slowllm.errors import InputError, UnsupportedError
from slowllm.modeling.remote_cache import kept_hop, tensors_of, with_cache
from slowllm.modeling.remote_spans import CallTime, Hop, Remote, need_of
from slowllm.modeling.span import SpanCall, SpanGrads


def compute_hop(
    remote: Remote, call: SpanCall, hop: Hop, session: str | None, time: CallTime
) -> dict[int, Tensor]:
    """Return the hidden states (B, T, ...) behind the last block of a hop, or behind each if the call asks for all.

    They have a gradient where an input of the call wants one.

    Args:
        remote: of the model.
        call: of all blocks of the hop.
        hop: whose machine is asked.
        session: in which it keeps keys and values; None where it keeps none.
        time: of the model's call that this hop is a part of.
    Raises:
        UnsupportedError: a gradient is wanted within a session.
    """
    # Each is added to the position of its number; behind the last one nothing is.
    reached = {number: vectors for number, vectors in call.vectors.items() if call.length < vectors.shape[-2]}
    call = replace(call, vectors=reached)
    inputs = tensors_of(call)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return remote.away(lambda: remote.spans.forward(call, hop, session, time.deadline))  # type: ignore[no-any-return]
    if session is not None:
        raise UnsupportedError(
            "a gradient is wanted through a cache whose keys and values other machines keep; call the model with "
            "use_cache=False or with a new cache, or under torch.no_grad()"
        )
    numbers = tuple(range(call.first, call.end) if call.returns_all else (call.end - 1,))
    flat = _HopFunction.apply(remote, call, hop, numbers, time, *inputs)  # type: ignore[no-untyped-call]
    return dict(zip(numbers, flat, strict=True))


def pass_through(
    remote: Remote,
    first: int,
    end: int,
    hidden: Tensor,
    *,
    cache: Cache | None = None,
    vectors: Mapping[int, Tensor] | None = None,
    final_length: int = 0,
) -> Tensor:
    """Return hidden states (B, T, H) behind block `end` - 1, of those before block `first`.

    There is no mask: every position is text. Positions follow those that the cache holds.

    Args:
        remote: of the model.
        first: the first block.
        end: the number after the last.
        hidden: (B, T, H) in any floating dtype, which is that of the result as well.
        cache: that is read and appended to; None where the call has no past and leaves nothing.
        vectors: (P, H) or (B, P, H) by the number of a block, whose input they are added to: each to the position of its
            number.
        final_length: positions that the cache will hold at its end, for which room is sought; 0 where that is not known.
    Raises:
        InputError: the hidden states have another form.
        UnsupportedError: a gradient is wanted through a cache.
    """
    form = remote.form
    if hidden.dim() != 2 + len(form.hidden_shape) or tuple(hidden.shape[2:]) != form.hidden_shape:
        shape = ", ".join(map(str, form.hidden_shape))
        raise InputError(
            f"hidden states of the shape {list(hidden.shape)} were given; the blocks take (rows, positions, {shape})"
        )
    if not hidden.numel():
        return hidden
    given = vectors or {}
    inside = hidden.to(form.hidden_dtype)
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *given.values()))
    past = 0 if cache is None or first >= len(cache.layers) else cache.get_seq_length(first)
    need = need_of(
        SpanCall(first, end, inside, length=past, final_length=final_length),
        keeps_cache=cache is not None and not wants_grad, wants_grad=wants_grad,
    )  # fmt: skip
    block, route, time = first, list[Hop](), CallTime(remote.spans)
    while block < end:
        kept = kept_hop(cache, block)
        if kept is None:
            route = [hop for hop in route if hop.first >= block] or list(
                remote.away(functools.partial(remote.spans.route, block, need, time.deadline))
            )
        hop = route.pop(0) if kept is None else kept
        hop = replace(hop, end=min(hop.end, end))
        own = {number: vector for number, vector in given.items() if block <= number < hop.end}
        call, session = SpanCall(block, hop.end, inside, vectors=own, final_length=final_length), None
        if cache is not None:
            call, session = with_cache(remote, call, hop, cache)
        inside = compute_hop(remote, call, hop, session, time)[hop.end - 1]
        block = hop.end
    return inside.to(hidden.dtype)


def _with_tensors(call: SpanCall, tensors: tuple[Tensor, ...]) -> SpanCall:
    left = iter(tensors)
    hidden = next(left)
    vectors = {number: next(left) for number in call.vectors}
    pairs = {number: (next(left), next(left)) for number in call.pairs}
    return replace(call, hidden=hidden, vectors=vectors, pairs=pairs)


class _HopFunction(torch.autograd.Function):
    """A hop as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        remote: Remote,
        call: SpanCall,
        hop: Hop,
        numbers: tuple[int, ...],
        time: CallTime,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        # The graph keeps the inputs, and notices a later write into them.
        ctx.remote, ctx.hop, ctx.numbers, ctx.time = remote, hop, numbers, time
        ctx.call = _with_tensors(call, tuple(tensor.new_empty(0) for tensor in inputs))
        given = _with_tensors(call, tuple(tensor.detach() for tensor in inputs))
        found = remote.away(lambda: remote.spans.forward(given, hop, None, time.deadline))
        return tuple(found[number] for number in numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call = _with_tensors(ctx.call, tuple(tensor.detach() for tensor in ctx.saved_tensors))
        remote: Remote = ctx.remote
        given = {n: grad for n, grad in zip(ctx.numbers, grads, strict=True) if grad is not None}
        if not given:
            return (None,) * (5 + len(ctx.saved_tensors))
        deadline = ctx.time.backward(call.first)
        found: SpanGrads = remote.away(lambda: remote.spans.backward(call, ctx.hop, given, deadline))
        of_pairs = (side for number in call.pairs for side in found.pairs.get(number, (None, None)))
        return (
            *(None,) * 5,
            found.hidden,
            *(found.vectors.get(number) for number in call.vectors),
            *of_pairs,
        )
