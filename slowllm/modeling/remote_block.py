"""Blocks that other machines compute, in a model whose ends are here.

The first block of a hop makes the call for all blocks of the hop (`remote_hop`); the others return what it brought. The
client's cache holds labels in the place of keys and values (`cache_labels`).

Knows transformers' models and what a span is (`span`); of the machines it knows a `Spans` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from slowllm.errors import UnsupportedError
from slowllm.modeling.cache_labels import check_kinds
from slowllm.modeling.recompute import is_cache
from slowllm.modeling.remote_cache import kept_hop, with_cache
from slowllm.modeling.remote_hop import compute_hop, pass_through
from slowllm.modeling.remote_spans import CallTime, Hop, Need, Remote, need_of
from slowllm.modeling.span import SpanCall
from slowllm.streaming.call_context import OwnerCall, current_call

# What a call of the blocks' owner may be given. Anything else that is not None or False would have to reach the blocks.
_SENT = {"attention_mask", "position_ids", "past_key_values", "use_cache"}
_STAYS_HERE = {
    "input_ids", "inputs_embeds", "output_hidden_states", "return_dict", "cache_position", "logits_to_keep",
    "num_items_in_batch", "labels",
}  # fmt: skip
# What a config may ask for in every call.
_ASKED_BY_CONFIG = ("output_attentions", "output_router_logits")


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

        Called by itself, without its owner, it takes hidden states (B, T, H) and returns hidden states; see `pass_through`.

        Raises:
            UnsupportedError: the model was called with something that is not sent.
            SessionError: the cache's keys and values are not kept any more.
        """
        known = current_call().way.output_of(self._number)
        if known is not None:
            return known
        owner_call = current_call().owner_call
        if owner_call is None:  # a block that is called by itself
            hidden = args[0] if args else kwargs["hidden_states"]
            return pass_through(self._remote, self._number, self._number + 1, hidden)
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
    _refuse_unsent(arguments, cache, remote.config)
    if owner_call.time is None:
        owner_call.time = CallTime(remote.spans)
    wants_grad = torch.is_grad_enabled() and _wants_grad(hidden, cache)
    hop = kept_hop(cache, first)
    final_length = current_call().final_length
    if hop is None:
        past = 0 if cache is None or first >= len(cache.layers) else cache.get_seq_length(first)
        call = SpanCall(first, first + 1, hidden, length=past, final_length=final_length)
        keeps_cache = cache is not None and not wants_grad
        hop = _next_hop(
            remote, owner_call, first, need_of(call, keeps_cache=keeps_cache, wants_grad=wants_grad)
        )
    end = hop.end
    returns_all = bool(
        arguments.get("output_hidden_states", getattr(remote.config, "output_hidden_states", False))
    )
    call = SpanCall(
        first, end, hidden, mask=arguments.get("attention_mask"), positions=arguments.get("position_ids"),
        vectors=_vectors_behind(first, end), returns_all=returns_all, final_length=final_length,
    )  # fmt: skip
    call, session = (call, None) if cache is None else with_cache(remote, call, hop, cache)
    found = compute_hop(remote, call, hop, session, owner_call.time)
    # Without the outputs in between, the last one stands for them: the blocks that get it return at once as well.
    last = found[end - 1]
    return {number: remote.form.stand_in(found.get(number, last)) for number in range(first, end)}


def _wants_grad(hidden: Tensor, cache: Cache | None) -> bool:
    """Return whether anything that reaches the blocks wants a gradient."""
    layers = () if cache is None else cache.layers
    sides = (
        side for layer in layers for side in (getattr(layer, "keys", None), getattr(layer, "values", None))
    )
    vectors = (vector for vector in current_call().vectors if vector is not None)
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (hidden, *sides, *vectors))


def _next_hop(remote: Remote, owner_call: OwnerCall, first: int, need: Need) -> Hop:
    """Return the hop that begins at a block, of the route of this call."""
    known = [hop for hop in owner_call.route if hop.first == first]
    if not known:
        # It may wait for room that other riders of this process give back.
        deadline = owner_call.time.deadline
        owner_call.route = tuple(remote.away(lambda: remote.spans.route(first, need, deadline)))
        known = [hop for hop in owner_call.route if hop.first == first]
    return cast(Hop, known[0])


def _refuse_unsent(arguments: Mapping[str, Any], cache: Cache | None, config: Any) -> None:
    if "cache_params" in arguments:
        raise UnsupportedError(
            "a recurrent cache (cache_params) cannot be kept by other machines; call the model with use_cache=False"
        )
    if cache is not None:
        check_kinds(cache)  # before the mask, which transformers gives another form for some kinds
    asked = {name: True for name in _ASKED_BY_CONFIG if getattr(config, name, False)}
    for name, value in {**asked, **arguments}.items():
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
