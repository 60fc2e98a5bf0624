"""Blocks that other machines compute, in a model whose ends are here.

The first block of a hop makes the call for all blocks of the hop; the others return what it brought. The client's cache
holds labels in the place of keys and values (`cache_labels`). Gradients: an autograd Function for each hop keeps the
hop's inputs, and its backward asks for their gradients.

Knows transformers' models and what a span is (`span`); of the machines it knows a `Spans` only.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from slowllm.errors import SessionError, UnsupportedError
from slowllm.modeling.cache_labels import Held, LabelSource, Move, adopt, held_of, is_as_configured, step
from slowllm.modeling.cutting import BlockForm
from slowllm.modeling.recompute import is_cache
from slowllm.modeling.shared_cache import Pair
from slowllm.modeling.span import SpanCall, SpanGrads
from slowllm.streaming.call_context import OwnerCall, current_call

# What a call of the blocks' owner may be given. Anything else that is not None or False would have to reach the blocks.
_SENT = {"attention_mask", "position_ids", "past_key_values", "use_cache"}
_STAYS_HERE = {
    "input_ids", "inputs_embeds", "output_hidden_states", "return_dict", "cache_position", "logits_to_keep",
    "num_items_in_batch", "labels",
}  # fmt: skip


@dataclass(frozen=True)
class Hop:
    """Blocks that one machine computes in one go.

    Attributes:
        first: the first block.
        end: the number after the last.
        peer: the machine's name.
    """

    first: int
    end: int
    peer: str = ""


@dataclass(frozen=True)
class Kept:
    """Where the keys and values of a hop's blocks are kept.

    Attributes:
        hop: whose machine keeps them.
        session: their name there.
    """

    hop: Hop
    session: str


class Spans(Protocol):
    """The machines that hold the blocks. `forward` and `backward` block until they are answered."""

    def route(self, first: int, num_tokens: int, *, keeps_cache: bool, wants_grad: bool) -> Sequence[Hop]:
        """Return hops from block `first` to the last block, for one call of the model.

        Args:
            first: the block that is to be computed next.
            num_tokens: of the call.
            keeps_cache: whether later calls will continue this one.
            wants_grad: whether a backward pass will follow.
        """

    def forward(self, call: SpanCall, hop: Hop, session: str | None) -> dict[int, Tensor]:
        """Compute a span; within a session, its keys and values are read and kept.

        Returns:
            the hidden states (B, T, ...) behind the last block, or behind each if the call asks for all.
        """

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor]) -> SpanGrads:
        """Return the gradients of a call's inputs."""

    def end_session(self, kept: Kept) -> None:
        """Let go of what a session keeps. Does not wait, and does not raise."""


class Away(Protocol):
    """Runs work while other riders run; `Carousel.away` is one."""

    def __call__(self, work: Callable[[], Any]) -> Any: ...


@dataclass(frozen=True)
class Remote:
    """What the remote blocks of one model share.

    Attributes:
        spans: the machines.
        form: how the model's blocks are called.
        config: of the text model.
        away: runs a call to the machines.
        labels: of all caches.
    """

    spans: Spans
    form: BlockForm
    config: Any
    away: Away
    labels: LabelSource


class RemoteBlock(nn.Module):
    """Mixin for the class of a block that other machines compute; made by `make_remote`."""

    __call__ = nn.Module.__call__

    _remote: Remote
    _number: int

    def train(self, mode: bool = True) -> RemoteBlock:
        """Set the flag; blocks elsewhere always compute in eval mode."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns, computed elsewhere.

        Raises:
            UnsupportedError: the model was called with something that is not sent.
            SessionError: the cache's keys and values are not kept any more.
        """
        known = current_call().way.output_of(self._number)
        if known is not None:
            return known
        owner_call = current_call().owner_call
        assert owner_call is not None, "blocks are called by their owner"
        if self._number not in owner_call.outputs:
            hidden = args[0] if args else kwargs["hidden_states"]
            leaves = tree_leaves((args, kwargs), is_leaf=is_cache)
            cache = next((leaf for leaf in leaves if isinstance(leaf, Cache)), None)
            owner_call.outputs.update(_pass_hop(self._remote, self._number, hidden, cache, owner_call))
        output = owner_call.outputs.pop(self._number)
        current_call().way.pass_block(self._number, output)
        return output


def make_remote(block: nn.Module, number: int, remote: Remote) -> RemoteBlock:
    """Return a block that is computed elsewhere, in the place of one of the skeleton's.

    Args:
        block: whose class transformers looks for when it records outputs.
        number: of the block.
        remote: shared by all blocks of the model.
    """
    kind = type(block)
    remote_kind = type(f"Remote{kind.__name__}", (RemoteBlock, kind), {"__module__": __name__})
    shell = cast(RemoteBlock, nn.Module.__new__(remote_kind))
    nn.Module.__init__(shell)
    for (
        name,
        value,
    ) in block.__dict__.items():  # plain attributes that a model's loop may look at, such as its type
        if name not in shell.__dict__ and not isinstance(value, Tensor | nn.Module):
            shell.__dict__[name] = value
    shell._remote, shell._number = remote, number
    return shell


def _pass_hop(
    remote: Remote, first: int, hidden: Tensor, cache: Cache | None, owner_call: OwnerCall
) -> dict[int, Any]:
    """Return what the blocks of the hop that begins at `first` return, by their numbers."""
    arguments = owner_call.arguments
    _refuse_unsent(arguments)
    wants_grad = torch.is_grad_enabled() and _wants_grad(hidden, cache)
    hop = _kept_hop(cache, first)
    if hop is None:
        keeps_cache = cache is not None and not wants_grad
        hop = _next_hop(remote, first, hidden, owner_call, keeps_cache=keeps_cache, wants_grad=wants_grad)
    end = hop.end
    returns_all = bool(
        arguments.get("output_hidden_states", getattr(remote.config, "output_hidden_states", False))
    )
    call = SpanCall(
        first, end, hidden, mask=arguments.get("attention_mask"), positions=arguments.get("position_ids"),
        vectors=_vectors_behind(first, end), returns_all=returns_all,
    )  # fmt: skip
    call, session = (call, None) if cache is None else _with_cache(remote, call, hop, cache)
    inputs = _tensors_of(call)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        if session is not None:
            raise UnsupportedError(
                "a gradient is wanted through a cache whose keys and values other machines keep; call the model with "
                "use_cache=False or with a new cache, or under torch.no_grad()"
            )
        numbers = tuple(range(first, end) if returns_all else (end - 1,))
        flat = _HopFunction.apply(remote, call, hop, numbers, *inputs)  # type: ignore[no-untyped-call]
        found = dict(zip(numbers, flat, strict=True))
    else:
        found = remote.away(lambda: remote.spans.forward(call, hop, session))
    # Without the outputs in between, the last one stands for them: the blocks that get it return at once as well.
    last = found[end - 1]
    return {number: remote.form.stand_in(found.get(number, last)) for number in range(first, end)}


def _kept_hop(cache: Cache | None, first: int) -> Hop | None:
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


def _wants_grad(hidden: Tensor, cache: Cache | None) -> bool:
    """Return whether anything that reaches the blocks wants a gradient."""
    layers = () if cache is None else cache.layers
    sides = (
        side for layer in layers for side in (getattr(layer, "keys", None), getattr(layer, "values", None))
    )
    vectors = (vector for vector in current_call().vectors if vector is not None)
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (hidden, *sides, *vectors))


def _next_hop(
    remote: Remote, first: int, hidden: Tensor, owner_call: OwnerCall, *, keeps_cache: bool, wants_grad: bool
) -> Hop:
    """Return the hop that begins at a block, of the route of this call."""
    known = [hop for hop in owner_call.route if hop.first == first]
    if not known:
        num_tokens = hidden.shape[0] * hidden.shape[1]
        owner_call.route = tuple(
            remote.spans.route(first, num_tokens, keeps_cache=keeps_cache, wants_grad=wants_grad)
        )
        known = [hop for hop in owner_call.route if hop.first == first]
    return cast(Hop, known[0])


def _refuse_unsent(arguments: Mapping[str, Any]) -> None:
    if "cache_params" in arguments:
        raise UnsupportedError(
            "a recurrent cache (cache_params) cannot be kept by other machines; call the model with use_cache=False"
        )
    for name, value in arguments.items():
        if name not in _SENT | _STAYS_HERE and value is not False:
            raise UnsupportedError(
                f"{name} is not sent to other machines; call the model without it, or load it without a swarm"
            )
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):
        raise UnsupportedError(
            "this model makes its attention masks outside of the module that owns the blocks, so they cannot be made anew on "
            "other machines; load its text model, or load it without a swarm"
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise UnsupportedError("an attention_mask of another form than (B, T) is not sent to other machines")


def _vectors_behind(first: int, end: int) -> dict[int, Tensor]:
    """Return a deep prompt's vectors for the blocks behind the first, which adds its own before it is called."""
    vectors = current_call().vectors
    return {n: v for n in range(first + 1, end) if n < len(vectors) and (v := vectors[n]) is not None}


def _with_cache(remote: Remote, call: SpanCall, hop: Hop, cache: Cache) -> tuple[SpanCall, str | None]:
    """Append labels to a cache; return the call with what the cache says of its past, and the session of the hop."""
    configured = DynamicCache(config=remote.config)
    while len(cache.layers) < call.end:
        kind = getattr(cache, "layer_class_to_replicate", None)
        if kind is None:
            raise UnsupportedError(
                f"a cache of {len(cache.layers)} layers was given to a model of more blocks"
            )
        cache.layers.append(kind())
    keeps_everything = not is_as_configured(cache, configured)
    numbers = range(call.first, call.end)
    layers = cast(list[CacheLayerMixin], [cache.layers[number] for number in numbers])
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
        for tensor in (*_tensors_of(call), *(side for pair in pairs.values() for side in pair))
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


def _tensors_of(call: SpanCall) -> list[Tensor]:
    """Return the tensors of a call that may want a gradient, in a fixed order."""
    return [call.hidden, *call.vectors.values(), *(side for pair in call.pairs.values() for side in pair)]


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
        ctx: Any, remote: Remote, call: SpanCall, hop: Hop, numbers: tuple[int, ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        # The graph keeps the inputs, and notices a later write into them.
        ctx.remote, ctx.hop, ctx.numbers = remote, hop, numbers
        ctx.call = _with_tensors(call, tuple(tensor.new_empty(0) for tensor in inputs))
        given = _with_tensors(call, tuple(tensor.detach() for tensor in inputs))
        found = remote.away(lambda: remote.spans.forward(given, hop, None))
        return tuple(found[number] for number in numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call = _with_tensors(ctx.call, tuple(tensor.detach() for tensor in ctx.saved_tensors))
        remote: Remote = ctx.remote
        given = {n: grad for n, grad in zip(ctx.numbers, grads, strict=True) if grad is not None}
        if not given:
            return (None,) * (4 + len(ctx.saved_tensors))
        found: SpanGrads = remote.away(lambda: remote.spans.backward(call, ctx.hop, given))
        of_pairs = (side for number in call.pairs for side in found.pairs.get(number, (None, None)))
        return (
            None,
            None,
            None,
            None,
            found.hidden,
            *(found.vectors.get(number) for number in call.vectors),
            *of_pairs,
        )
