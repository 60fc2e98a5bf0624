"""StreamedBlock: a transformers block whose weights are bound when its stop comes round; or those of its leaves.

A streamed block gets whatever transformers passes and returns what the block returned. It makes no mask, no
rotary table and no cache of its own. Gradients: an autograd Function keeps the block's inputs; backward visits
the stop again and recomputes, from a snapshot of the cache as it was. Blocks always compute in eval mode, and no
weight ever requires grad.

Where memory is too small for whole blocks, a block runs its own code on its rider's thread, and each of its leaves
(linears, fused experts) is a stop: a `LeafwiseBlock` of `StreamedLeaf`s. That way is forward only.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from slowllm.errors import UnsupportedError
from slowllm.modeling.finite import check_finite
from slowllm.modeling.recompute import RecordedCall, hidden_of, is_cache, tensor_refs
from slowllm.streaming.call_context import current_call
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Direction, Weights


class _Streamed(nn.Module):
    """What stands in a module's place, and binds its weights when their stop comes.

    It shares the module's submodules, whose parameters are on the meta device, so names, counts and hooks are
    those of transformers. Subclasses also derive from the module's own class.
    """

    # Not the module's own __call__, which in some releases of transformers checkpoints: blocks are replayed anyway.
    __call__ = nn.Module.__call__

    _plain: nn.Module
    _carousel: Carousel
    _stop: int
    _prefix: str
    _names: tuple[str, ...]

    def train(self, mode: bool = True) -> _Streamed:
        """Set the flag, but leave the submodules in eval mode: what is streamed has no dropout."""
        self.training = mode
        return self

    def _visit(
        self, direction: Direction, work: Callable[[Weights], Any], *, comes_back: bool = False
    ) -> Any:
        return self._carousel.visit(self._stop, direction, work, comes_back=comes_back)

    def _run(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if tuple(name for name, _ in self._plain.named_parameters()) != self._names:
            raise UnsupportedError(
                f"{self._prefix.rstrip('.')} was changed after loading: adapters inside streamed blocks (LoRA and "
                "its like) are not supported; use prompt tuning or prefix tuning"
            )
        bound = {name: weights[self._prefix + name] for name in self._names}
        return functional_call(self._plain, bound, args, kwargs)


@dataclass(frozen=True)
class Home:
    """The device at which a block is computed, where the model is not all on the processor.

    Attributes:
        device: to which what the block is given is moved, its own layer of a cache included.
        after: where its output goes; None where it stays for the next block.
    """

    device: torch.device
    after: torch.device | None = None


class StreamedBlock(_Streamed):
    """What stands in the model in a block's place; made by `stream_block`."""

    _replays = True
    _home: Home | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass through the block when its stop comes; see the block's own class for arguments and result."""
        return _at_home(self._home, self._stop, self._pass, args, kwargs)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._compute(args, kwargs)
        if self._stop < current_call().journal.num_frozen:  # nothing below it wants a gradient
            with torch.no_grad():
                return self._compute(args, kwargs)
        if not self._replays:
            return self._compute(args, kwargs)
        call = RecordedCall.record(self, args, kwargs)
        if not call.inputs:
            return self._compute(args, kwargs)
        return call.apply()

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def work(weights: Weights) -> Any:
            output = self._run(weights, args, kwargs)
            check_finite(self._prefix.rstrip("."), hidden_of(output))
            return output

        return _unless_in_journal(self._stop, lambda: self._visit("up", work))


class StreamedLeaf(_Streamed):
    """What stands in a block in a leaf's place; made by `stream_leaves`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass through the leaf when its stop comes; see the leaf's own class for arguments and result.

        Raises:
            UnsupportedError: a gradient is wanted.
        """
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
        ):
            raise UnsupportedError(
                f"{self._prefix.rstrip('.')}: this budget streams blocks in parts, which cannot run backward; "
                "allow enough memory for whole blocks (`slowllm plan` says how much)"
            )
        return self._visit("up", lambda weights: self._run(weights, args, kwargs))


class LeafwiseBlock(nn.Module):
    """Mixin for the class of a block whose leaves are streamed; made by `stream_leaves`."""

    __call__ = nn.Module.__call__

    _name: str
    _number: int
    _home: Home | None = None

    def train(self, mode: bool = True) -> LeafwiseBlock:
        """Set the flag, but leave the submodules in eval mode, as `StreamedBlock` does."""
        self.training = mode
        return self


def stream_leaves(
    block: nn.Module,
    carousel: Carousel,
    stops: Mapping[str, int],
    name: str,
    number: int,
    home: Home | None = None,
) -> None:
    """Turn the leaves of a block into stops, in place.

    Args:
        block: parameters of its leaves on the meta device, all else real.
        carousel: that brings the weights.
        stops: the number of each leaf's stop, by its full name.
        name: of the block in the model.
        number: of the block.
        home: where it is computed; None where all is on the processor.
    """
    block.requires_grad_(False).eval()
    for leaf_name, stop in stops.items():
        parent, _, attribute = leaf_name[len(name) + 1 :].rpartition(".")
        owner = block.get_submodule(parent)
        owner._modules[attribute] = _shell(
            StreamedLeaf, cast(nn.Module, owner._modules[attribute]), carousel, stop, leaf_name
        )
    kind = type(block)

    def forward(self: LeafwiseBlock, *args: Any, **kwargs: Any) -> Any:
        def pass_leaves(*args: Any, **kwargs: Any) -> Any:
            output = kind.forward(self, *args, **kwargs)
            check_finite(self._name, hidden_of(output))
            return output

        def work(*args: Any, **kwargs: Any) -> Any:
            return _unless_in_journal(self._number, lambda: pass_leaves(*args, **kwargs))

        return _at_home(self._home, self._number, work, args, kwargs)

    names = {"forward": functools.wraps(kind.forward)(forward), "__module__": __name__}
    block.__class__ = type(f"Streamed{kind.__name__}", (LeafwiseBlock, kind), names)
    streamed = cast(LeafwiseBlock, block)
    streamed._name, streamed._number, streamed._home = name, number, home


def stream_block(
    block: nn.Module,
    carousel: Carousel,
    stop: int,
    name: str,
    *,
    replays: bool = True,
    home: Home | None = None,
) -> StreamedBlock:
    """Return the streamed form of a block.

    Args:
        block: parameters on the meta device, buffers real.
        carousel: that brings its weights.
        stop: its number there.
        name: of the block in the model; weights come under their full names.
        replays: whether a backward pass computes the block again, at its stop; else autograd keeps what the block has
            computed and its weights, which must then stay where they are.
        home: where it is computed; None where all is on the processor.
    """
    block.requires_grad_(False).eval()
    streamed = cast(StreamedBlock, _shell(StreamedBlock, block, carousel, stop, name))
    streamed._replays, streamed._home = replays, home
    return streamed


def _shell(mixin: type[_Streamed], plain: nn.Module, carousel: Carousel, stop: int, name: str) -> _Streamed:
    kind = type(plain)
    # A subclass of the module's class: transformers finds the blocks whose outputs it records by isinstance.
    streamed = type(f"Streamed{kind.__name__}", (mixin, kind), {"__module__": __name__})
    shell = cast(_Streamed, nn.Module.__new__(streamed))
    for key, value in plain.__dict__.items():
        # Submodules, parameters and buffers are shared; hooks are not, or they would run twice.
        shell.__dict__[key] = copy.copy(value) if "_hooks" in key else value
    shell.__dict__["_plain"] = plain  # past nn.Module's __setattr__: it is not a submodule
    shell._carousel, shell._stop, shell._prefix = carousel, stop, f"{name}."
    shell._names = tuple(parameter for parameter, _ in plain.named_parameters())
    return shell


def _at_home(
    home: Home | None, layer: int, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Do the work of a block on what it is given, moved to where it is computed."""
    if home is None:
        return work(*args, **kwargs)
    args, kwargs = _moved((args, kwargs), home.device, layer)
    output = work(*args, **kwargs)
    return output if home.after is None else _moved(output, home.after)


def _moved(value: Any, device: torch.device, layer: int | None = None) -> Any:
    """Return tensors moved to a device; in caches those of one layer are moved in place."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if isinstance(leaf, Cache) and layer is not None:
            for slot in tensor_refs(0, leaf):
                if slot.layer == layer:
                    slot.put([leaf], slot.get([leaf]).to(device))
        return leaf

    return tree_map(move, value, is_leaf=is_cache)


def _unless_in_journal(block: int, work: Callable[[], Any]) -> Any:
    """Do the work of a block, unless the call's journal has its output."""
    journal = current_call().journal
    output = journal.output_of(block)
    if output is None:
        output = work()
        journal.pass_block(block, output)
    return output
