"""A transformers block whose weights are bound while its stop is visited; or the leaves of one.

A streamed block gets whatever transformers passes and returns what the block returned. It makes no mask, no rotary
table and no cache. Gradients: an autograd Function keeps the block's inputs; its backward visits the stop again and
recomputes the block (`recompute`). Blocks always compute in eval mode, and no weight ever requires grad.

Where memory is too small for whole blocks, a block runs its own code on its rider's thread, and each of its leaves
(linears, fused experts) is a stop: a `LeafwiseBlock` of `StreamedLeaf`s, which has no backward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from slowllm.errors import UnsupportedError
from slowllm.modeling.finite import check_finite
from slowllm.modeling.recompute import RecordedCall, hidden_of, is_cache, tensor_refs
from slowllm.streaming.call_context import current_call
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Direction, Weights


class _Streamed(nn.Module):
    """A module's replacement, which binds the module's weights while their stop is visited.

    It shares the module's submodules, whose parameters are on the meta device, so names, counts and hooks are
    those of transformers. Subclasses also derive from the module's own class.
    """

    # Not the module's own __call__, which in some releases of transformers checkpoints activations.
    __call__ = nn.Module.__call__

    _plain: nn.Module
    _carousel: Carousel
    _stop: int
    _name: str
    # Where the weights go: a module's table of parameters, the name there, and the name of the weight.
    _places: tuple[tuple[dict[str, Tensor | None], str, str], ...]
    # Calls that are under way, and the parameters whose places the weights have meanwhile.
    _num_running = 0
    _absent: list[Tensor | None]
    # Every submodule's tables of modules and parameters, and what they held when they were looked at.
    _built: tuple[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], tuple[str, ...]], ...]

    def train(self, mode: bool = True) -> _Streamed:
        """Set the flag, but leave the submodules in eval mode: a streamed module has no dropout."""
        self.training = mode
        return self

    def _visit(
        self, direction: Direction, work: Callable[[Weights], Any], *, comes_back: bool = False
    ) -> Any:
        return self._carousel.visit(self._stop, direction, work, comes_back=comes_back)

    def _run(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for modules, kept, parameters, names in self._built:
            if (*modules.values(),) != kept or (*parameters,) != names:
                self._take_as_it_is()
                break
        # What `torch.func.functional_call` does, which costs half as much as a small block itself. Others may come in
        # while a call waits for its experts, with the weights of the same visit of the stop.
        if not self._num_running:
            self._absent = [parameters[name] for parameters, name, _ in self._places]
            for parameters, name, key in self._places:
                parameters[name] = weights[key]
        self._num_running += 1
        try:
            return self._plain(*args, **kwargs)
        finally:
            self._num_running -= 1
            if not self._num_running:
                for (parameters, name, _), parameter in zip(self._places, self._absent, strict=True):
                    parameters[name] = parameter

    def _take_as_it_is(self) -> None:
        """Go on with submodules that were exchanged for others around the same parameters, as BigBird does for short texts.

        Raises:
            UnsupportedError: the parameters are others.
        """
        before = {id(parameters): names for _, _, parameters, names in self._built if names}
        built = _built_of(self._plain)
        if {id(parameters): names for _, _, parameters, names in built if names} != before:
            raise UnsupportedError(
                f"{self._name} was changed after loading: adapters inside streamed blocks (LoRA and "
                "its like) are not supported; use prompt tuning or prefix tuning"
            )
        self._built = built


def _built_of(
    plain: nn.Module,
) -> tuple[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], tuple[str, ...]], ...]:
    """Return every submodule's tables of modules and parameters, and what they hold."""
    return tuple(
        (module._modules, tuple(module._modules.values()), module._parameters, tuple(module._parameters))
        for module in plain.modules()
    )


@dataclass(frozen=True)
class Home:
    """Where a block is computed, if the model is not all on the processor.

    Attributes:
        device: that the block's arguments are moved to, its own layer of a cache included.
        after: that its output is moved to; None if the next block is computed on the same device.
    """

    device: torch.device
    after: torch.device | None = None


class StreamedBlock(_Streamed):
    """A block's replacement in the model; made by `stream_block`."""

    _recomputes = True
    _home: Home | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block at its stop; see the block's own class for arguments and result."""
        return _at_home(self._home, self._stop, self._pass, args, kwargs)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        return _unless_known(self._stop, self._compute, *args, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if self._stop < current_call().way.num_frozen:  # nothing below the block wants a gradient
            with torch.no_grad():
                return self._compute_alone(args, kwargs)
        if torch.is_grad_enabled() and self._recomputes:
            call = RecordedCall.record(self, args, kwargs)
            if call.inputs:
                return call.apply()
        return self._compute_alone(args, kwargs)

    def _compute_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def work(weights: Weights) -> Any:
            output = self._run(weights, args, kwargs)
            check_finite(self._name, hidden_of(output))
            return output

        return self._visit("up", work)


class StreamedLeaf(_Streamed):
    """A leaf's replacement in a block; made by `stream_leaves`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the leaf at its stop; see the leaf's own class for arguments and result.

        Raises:
            UnsupportedError: a gradient is wanted.
        """
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
        ):
            raise UnsupportedError(
                f"{self._name}: this budget streams blocks in parts, which cannot run backward; "
                "allow enough memory for whole blocks (`slowllm plan` says how much)"
            )
        return self._visit("up", lambda weights: self._run(weights, args, kwargs))


class LeafwiseBlock(nn.Module):
    """Mixin for the class of a block whose leaves are streamed; made by `stream_leaves`."""

    __call__ = nn.Module.__call__

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
        block: with the parameters of its leaves on the meta device, and all else real.
        carousel: that brings the weights.
        stops: the number of each leaf's stop, by its full name.
        name: of the block in the model.
        number: of the block.
        home: where it is computed; None if the model is all on the processor.
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
        def compute(*args: Any, **kwargs: Any) -> Any:
            output = kind.forward(self, *args, **kwargs)
            check_finite(name, hidden_of(output))
            return output

        work = functools.partial(_unless_known, number, compute)
        return _at_home(home, number, work, args, kwargs)

    names = {"forward": functools.wraps(kind.forward)(forward), "__module__": __name__}
    block.__class__ = type(f"Streamed{kind.__name__}", (LeafwiseBlock, kind), names)


def stream_block(
    block: nn.Module,
    carousel: Carousel,
    stop: int,
    name: str,
    *,
    recomputes: bool = True,
    home: Home | None = None,
    on_demand: Collection[str] = (),
) -> StreamedBlock:
    """Return the streamed form of a block.

    Args:
        block: with parameters on the meta device and real buffers.
        carousel: that brings its weights.
        stop: the number of its stop there.
        name: of the block in the model; weights come under their full names.
        recomputes: whether a backward pass computes the block again, at its stop; else autograd keeps its activations
            and its weights, which must then stay where they are.
        home: where it is computed; None if the model is all on the processor.
        on_demand: parameters that do not come with the block, by their names in the model.
    """
    block.requires_grad_(False).eval()
    streamed = cast(StreamedBlock, _shell(StreamedBlock, block, carousel, stop, name, on_demand))
    streamed._recomputes, streamed._home = recomputes, home
    return streamed


def _shell(
    mixin: type[_Streamed],
    plain: nn.Module,
    carousel: Carousel,
    stop: int,
    name: str,
    on_demand: Collection[str] = (),
) -> _Streamed:
    kind = type(plain)
    # A subclass of the module's class: transformers finds the blocks whose outputs it records by isinstance.
    streamed = type(f"Streamed{kind.__name__}", (mixin, kind), {"__module__": __name__})
    shell = cast(_Streamed, nn.Module.__new__(streamed))
    for key, value in plain.__dict__.items():
        # Submodules, parameters and buffers are shared; hooks are not, or they would run twice.
        shell.__dict__[key] = copy.copy(value) if "_hooks" in key else value
    shell.__dict__["_plain"] = plain  # past nn.Module's __setattr__: it is not a submodule
    shell._carousel, shell._stop, shell._name = carousel, stop, name
    # A parameter that several modules share has one name.
    keys = {id(parameter): f"{name}.{inner}" for inner, parameter in plain.named_parameters()}
    places = []
    for module in plain.modules():
        parameters = cast(dict[str, Tensor | None], module._parameters)
        places += [
            (parameters, own, keys[id(held)])
            for own, held in parameters.items()
            if held is not None and keys[id(held)] not in on_demand
        ]
    shell._places, shell._built = tuple(places), _built_of(plain)
    return shell


def _at_home(
    home: Home | None, layer: int, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Compute a block on its arguments, moved to the device where it is computed."""
    if home is None:
        return work(*args, **kwargs)
    args, kwargs = _moved((args, kwargs), home.device, layer)
    output = work(*args, **kwargs)
    return output if home.after is None else _moved(output, home.after)


def _moved(value: Any, device: torch.device, layer: int | None = None) -> Any:
    """Return the tensors of a value moved to a device; those of one layer of a cache are moved in place."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if isinstance(leaf, Cache) and layer is not None:
            for ref in tensor_refs(0, leaf):
                if ref.layer == layer:
                    ref.put([leaf], ref.get([leaf]).to(device))
        return leaf

    return tree_map(move, value, is_leaf=is_cache)


def _unless_known(block: int, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the output of a block that the call's way knows, or compute it."""
    way = current_call().way
    output = way.output_of(block)
    if output is None:
        output = compute(*args, **kwargs)
        way.pass_block(block, output)
    return output
