"""The experts of a model that are read when routers ask for them: their reader, what stays, and what is counted.

Knows files and plans; what experts compute is `modeling.streamed_experts`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.modeling.expert_forecast import ExpertForecast
from slowllm.modeling.expert_products import ON_DEMAND
from slowllm.modeling.layout import Layout
from slowllm.modeling.look_ahead import LookAhead
from slowllm.modeling.routers import KeptRouter, find_router
from slowllm.modeling.sizes import unit_buffer_bytes
from slowllm.modeling.streamed_experts import ExpertSettings, StreamedExperts
from slowllm.options import format_bytes
from slowllm.planning.plan import Plan
from slowllm.runtime.device_placement import CopiedStops, DevicePlacement, place_experts
from slowllm.runtime.expert_history import ExpertHistory
from slowllm.storage.spans import Placement
from slowllm.streaming.cast_stops import CastStops
from slowllm.streaming.demand_stops import DemandStops
from slowllm.streaming.kept_stops import KeptStops
from slowllm.streaming.read_requests import ring_bytes_of
from slowllm.streaming.reader import Reader
from slowllm.streaming.ring import smallest_ring
from slowllm.streaming.stops import StopRead, Stops

log = logging.getLogger(__name__)


@dataclass
class OnDemand:
    """Experts that are read on demand. Owns threads, files and buffers; close it.

    Attributes:
        layout: whose experts they are.
        demand: brings them.
        kept: those that stay in memory.
        forecast: what routers chose so far.
        settings: how they are multiplied, and what was counted.
        look_ahead: guesses which ones the next block will need; None where the plan has no room for copies of routers.
        history: what earlier runs chose, to which this one's choices are added; None where nothing is to be remembered.
    """

    layout: Layout
    demand: DemandStops
    kept: KeptStops
    forecast: ExpertForecast
    settings: ExpertSettings
    look_ahead: LookAhead | None
    history: ExpertHistory | None
    _reader: Reader
    _cast: CastStops | None
    _copied: CopiedStops | None

    @classmethod
    def open(
        cls,
        layout: Layout,
        plan: Plan,
        *,
        poison: bool = False,
        is_exact: bool = False,
        history: ExpertHistory | None = None,
        placement: DevicePlacement | None = None,
    ) -> Self:
        """Open the files of experts, with memory as planned.

        Args:
            layout: with experts.
            plan: of it.
            poison: see `Reader`.
            is_exact: whether each rider's rows are multiplied by themselves.
            history: what earlier runs chose, by which it is decided what stays.
            placement: of the model's stops on devices, to which experts are copied as well; None for the processor.
        Raises:
            PlanError: this machine or a device has less memory than was planned for.
        """
        units = layout.units
        sizes = [len(experts.units) for experts in layout.experts]
        ends = list(itertools.accumulate(sizes, initial=0))
        groups = [range(first, end) for first, end in itertools.pairwise(ends)]
        counts = None if history is None else history.counts()
        num_kept = plan.kept_units // len(groups)
        copied, cast = None, None
        torch_devices: Sequence[torch.device] = (torch.device("cpu"),)
        with contextlib.ExitStack() as undoing:
            reader = Reader(units, ring_bytes=plan.expert_ring_bytes, poison=poison)
            undoing.callback(reader.close)
            stops: Stops
            stops = kept = KeptStops(reader, units, groups, num_kept, counts)
            if placement is not None:
                copied = place_experts(layout, kept, reader, placement, poison=poison)
                undoing.callback(copied.close)
                stops, torch_devices = copied.stops, placement.torch_devices
            buffer_bytes = unit_buffer_bytes(layout)
            if any(buffer_bytes):
                stops = cast = CastStops(stops, units, layout.unit_dtypes, buffer_bytes, torch_devices)
            undoing.pop_all()
        demand = DemandStops(stops, kept.is_kept)
        look_ahead = None
        if plan.router_bytes:
            most = _units_beside(plan.expert_ring_bytes, units)
            look_ahead = LookAhead(_routers_of(layout), groups, most, kept.is_kept)
        forecast, settings = ExpertForecast(sizes), ExpertSettings(is_exact)
        opened = cls(layout, demand, kept, forecast, settings, look_ahead, history, reader, cast, copied)
        log.info("experts are read when routers ask for them: %s", opened.products)
        if num_kept:
            known = None if history is None or not history.earlier else history.path
            log.info(
                "%d experts of each block stay in memory: those that are needed most, %s",
                num_kept, f"by what {known} remembers of earlier runs" if known else "from now on",
            )  # fmt: skip
        return opened

    @property
    def products(self) -> str:
        """How rows are multiplied where several micro-batches want an expert, in words."""
        if self.settings.is_exact:
            return "rows of each micro-batch by themselves, with the bits that they have alone (exact)"
        return "rows of several micro-batches together, which may round otherwise than alone (not exact)"

    @property
    def read_bytes(self) -> int:
        """Bytes read so far."""
        return self._reader.stats.read_bytes

    @property
    def dropped_bytes(self) -> int:
        """Bytes read of experts that nobody needed before others took their room."""
        return self._reader.dropped_bytes

    def watch_reads(self, watcher: Callable[[StopRead], None]) -> None:
        """Have a function called with each expert that has been read, on the thread that read the last of it."""
        self._reader.on_read = watcher

    def put_into(self, model: PreTrainedModel, on_expert: Callable[[], None] | None = None) -> None:
        """Have a model's experts computed from what is read on demand.

        Args:
            model: whose parameters of experts are on the meta device.
            on_expert: called after each expert, on the thread that computed it.
        """
        first = 0
        for experts in self.layout.experts:
            module: Any = model.get_submodule(experts.name)
            module.__dict__[ON_DEMAND] = StreamedExperts(
                module, experts, first, self.demand, self.forecast, self.settings, self.look_ahead, on_expert
            )
            first += len(experts.units)

    def copied(self, name: str) -> Tensor | None:
        """Return a copy of a parameter (E, ..) that holds experts, in the compute dtype and in the processor's memory.

        None of another parameter.
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
                        weights[experts.key(parameter, unit - units.start)].to(dtype, copy=True).cpu()
                        for unit, weights in self.demand.bring(units)
                    ]
                )
        return None

    def remember(self) -> None:
        """Save what was chosen for the next start, where the last time is long enough ago. For the carousel's thread."""
        if self.history is not None:
            self.history.save_if_due(*self._chosen)

    def leave_out(self) -> None:
        """Do not remember what was chosen so far, because no text asked for it."""
        if self.history is not None:
            self.history.leave_out(*self._chosen)

    @property
    def _chosen(self) -> tuple[np.ndarray, list[int]]:
        return self.forecast.chosen, list(self.forecast.num_sweeps.values())

    def close_files(self) -> None:
        """End the threads that read, so that nobody waits for them any more."""
        self._reader.close()

    def close(self) -> None:
        """End the threads that decode and copy, let memory go, and save for the next start what was chosen."""
        if self.demand.num_asked:
            log.info("%s", self.counted())
        if self._cast is not None:
            self._cast.close()
        if self.history is not None:
            self.history.save(*self._chosen)
        # Before those that are kept, which its thread visits; a device that has failed raises here again.
        if self._copied is not None:
            self._copied.close()
        self.kept.close()

    def counted(self) -> str:
        """Return what was done so far, in words."""
        guessed = "none read ahead on a guess"
        if self.look_ahead is not None and self.look_ahead.num_read:
            guessed = f"{self.look_ahead.num_read:,} read ahead on a guess, {self.look_ahead.num_read_right:,} of them needed"
        return (
            f"{self.demand.num_asked:,} experts were computed with, {self.kept.num_hits:,} of them in memory; {guessed}; "
            f"{format_bytes(self.dropped_bytes)} read in vain"
        )


def _routers_of(layout: Layout) -> list[KeptRouter | None]:
    """Return the router of each module of experts."""
    routers = []
    for number in layout.expert_blocks:
        router = find_router(layout.blocks[number])
        routers.append(None if router is None else KeptRouter(router))
    return routers


def _units_beside(ring_bytes: int, units: Sequence[Sequence[Placement]]) -> int:
    """Return how many units fit in a ring beside one that is held."""
    return (ring_bytes - smallest_ring(units)) // max(sum(map(ring_bytes_of, unit)) for unit in units)
