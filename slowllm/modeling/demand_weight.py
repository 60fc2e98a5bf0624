"""A weight that is brought from the disk at the moment an operation reads it: what autograd keeps of an expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from slowllm.errors import UnsupportedError
from slowllm.streaming.demand_stops import DemandStops
from slowllm.streaming.lazy_weight import LazyWeight


class DemandWeight(Tensor):
    """A matrix of a unit; its views are such weights, too. Every operation but a view has the unit brought.

    Attributes:
        stored: a meta tensor that says which elements of the matrix are meant.
        source: the demand stops, the unit, its tensor's name there, and the units expected next on the way up and down.
    """

    stored: Tensor
    source: tuple[DemandStops, int, str, tuple[int, ...], tuple[int, ...]]

    # Without this, torch would wrap the results of operations in this class as well.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: Tensor, source: Any) -> DemandWeight:
        """Wrap a meta tensor."""
        weight: DemandWeight = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), storage_offset=stored.storage_offset(),
            dtype=stored.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        weight.stored, weight.source = stored, source
        return weight

    @classmethod
    def of(
        cls,
        demand: DemandStops,
        unit: int,
        key: str,
        stored: Tensor,
        later: Sequence[int],
        sooner: Sequence[int],
    ) -> DemandWeight:
        """Return a whole matrix.

        Args:
            demand: brings the unit.
            unit: its number.
            key: the matrix's name there.
            stored: (R, K) on the meta device.
            later: units that are expected after it on the way up.
            sooner: units that are expected after it on the way down.
        """
        return cls(stored, (demand, unit, key, tuple(later), tuple(sooner)))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DemandWeight({self.source[2]}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        infos = [value.alias_info for value in func._schema.returns]
        if any(info is not None and not info.is_write for info in infos):
            return _view(func, args, kwargs)
        if any(info is not None and info.is_write for info in (a.alias_info for a in func._schema.arguments)):
            first = args[0] if args else None
            if isinstance(first, DemandWeight):
                raise UnsupportedError(f"a streamed weight cannot be written to ({func})")
        weights = [value for value in (*args, *kwargs.values()) if isinstance(value, DemandWeight)]
        demand, unit, _, later, sooner = weights[0].source
        if any(weight.source[1] != unit for weight in weights):
            raise UnsupportedError(f"weights of two experts are used by one operation ({func})")
        is_up = torch._C._current_graph_task_id() < 0
        with demand.holding(unit, later if is_up else sooner) as held:

            def brought(value: Any) -> Any:
                return _as_viewed(value, held[value.source[2]]) if isinstance(value, DemandWeight) else value

            return func(*tree_map(brought, args), **tree_map(brought, kwargs))


def _as_viewed(weight: DemandWeight, whole: Tensor) -> Tensor:
    """Return the elements that a view means, of the matrix in memory."""
    stored = weight.stored
    if isinstance(whole, LazyWeight):
        shape = stored if whole.coded is not None else whole.stored.as_strided(
            stored.shape, stored.stride(), whole.stored.storage_offset() + stored.storage_offset()
        )  # fmt: skip
        with torch.inference_mode(False):
            return LazyWeight(shape, whole.dtype, whole.buffer, whole.coded)
    return whole.as_strided(stored.shape, stored.stride(), whole.storage_offset() + stored.storage_offset())


def _view(func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    result = func.decompose(*args, **kwargs)
    if result is not NotImplemented:
        return result
    weight = args[0]

    def wrap(value: Any) -> Any:
        return DemandWeight(value, weight.source) if isinstance(value, Tensor) else value

    with torch.inference_mode(False):
        return tree_map(wrap, func(weight.stored, *args[1:], **kwargs))
