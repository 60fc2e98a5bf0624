"""The experts of a model that are read when routers ask for them: their reader, what stays, and what is counted.

Knows files and plans; what experts compute is `modeling.streamed_experts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.modeling.expert_forecast import ExpertForecast
from slowllm.modeling.expert_products import ON_DEMAND
from slowllm.modeling.layout import Layout
from slowllm.modeling.sizes import unit_buffer_bytes
from slowllm.modeling.streamed_experts import ExpertSettings, StreamedExperts
from slowllm.planning.plan import Plan
from slowllm.streaming.cast_stops import CastStops
from slowllm.streaming.demand_stops import DemandStops
from slowllm.streaming.kept_stops import KeptStops
from slowllm.streaming.reader import Reader
from slowllm.streaming.stops import StopRead, Stops


@dataclass
class OnDemand:
    """Experts that are read on demand. Owns threads, files and buffers; close it.

    Attributes:
        layout: whose experts they are.
        demand: brings them.
        kept: those that stay in memory.
        forecast: what routers chose so far.
        settings: how they are multiplied, and what was counted.
    """

    layout: Layout
    demand: DemandStops
    kept: KeptStops
    forecast: ExpertForecast
    settings: ExpertSettings
    _reader: Reader
    _cast: CastStops | None

    @classmethod
    def open(
        cls,
        layout: Layout,
        plan: Plan,
        *,
        poison: bool = False,
        is_exact: bool = False,
    ) -> Self:
        """Open the files of experts, with memory as planned.

        Args:
            layout: with experts.
            plan: of it.
            poison: see `Reader`.
            is_exact: whether each rider's rows are multiplied by themselves.
        """
        units = layout.units
        sizes = [len(experts.units) for experts in layout.experts]
        ends = list(itertools.accumulate(sizes, initial=0))
        groups = [range(first, end) for first, end in itertools.pairwise(ends)]
        reader = Reader(units, ring_bytes=plan.expert_ring_bytes, poison=poison)
        kept = KeptStops(reader, units, groups, plan.kept_units // len(groups))
        dtypes, buffer_bytes = layout.unit_dtypes, unit_buffer_bytes(layout)
        cast = CastStops(kept, units, dtypes, buffer_bytes) if any(buffer_bytes) else None
        stops: Stops = kept if cast is None else cast
        demand = DemandStops(reader, stops)
        return cls(layout, demand, kept, ExpertForecast(sizes), ExpertSettings(is_exact), reader, cast)

    @property
    def read_bytes(self) -> int:
        """Bytes read so far."""
        return self._reader.stats.read_bytes

    def watch_reads(self, watcher: Callable[[StopRead], None]) -> None:
        """Have a function called with each expert that has been read, on the thread that read the last of it."""
        self._reader.on_read = watcher

    def put_into(self, model: PreTrainedModel) -> None:
        """Have a model's experts computed from what is read on demand.

        Args:
            model: whose parameters of experts are on the meta device.
        """
        first = 0
        for experts in self.layout.experts:
            module: Any = model.get_submodule(experts.name)
            module.__dict__[ON_DEMAND] = StreamedExperts(
                module, experts, first, self.demand, self.forecast, self.settings
            )
            first += len(experts.units)

    def copied(self, name: str) -> Tensor | None:
        """Return a copy of a parameter (E, ..) that holds experts, in the compute dtype; None of another parameter.

        For the carousel's thread, as a visit's work.
        """
        first = 0
        for experts in self.layout.experts:
            units = range(first, first + len(experts.units))
            first = units.stop
            if name in experts.full_names:
                parameter, dtype = name.rpartition(".")[2], self.layout.dtypes[name]
                return torch.stack(
                    [
                        weights[experts.key(parameter, unit - units.start)].to(dtype, copy=True)
                        for unit, weights in self.demand.bring(units)
                    ]
                )
        return None

    def close_files(self) -> None:
        """End the threads that read, so that nobody waits for them any more."""
        self._reader.close()

    def close(self) -> None:
        """End the threads that decode, and let memory go."""
        self.kept.close()
        if self._cast is not None:
            self._cast.close()
