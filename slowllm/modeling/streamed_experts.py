"""The experts of a block, each of which is brought when a router has chosen it, once for all who are at the block.

Takes the place of a module's own computing. Everybody at the block's stop comes here with the rows that its router sent on;
the union of the chosen experts is brought in ascending order, each is decoded once and multiplied for all, and the rows
are added up as transformers' `eager` loop adds them: by ascending expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slowllm.modeling.demand_weight import DemandWeight
from slowllm.modeling.expert_forecast import ExpertForecast
from slowllm.modeling.expert_products import expert_output, sum_dtype
from slowllm.modeling.expert_routing import ExpertSum, Routing
from slowllm.modeling.expert_units import ExpertUnits
from slowllm.rounding import round_up
from slowllm.streaming.demand_stops import DemandStops
from slowllm.streaming.gathering import gather
from slowllm.streaming.lazy_weight import CACHE_LINE_BYTES, LazyWeight
from slowllm.streaming.stops import Weights

# From this number of rows on, a product of one's own is as fast as one with those of others.
ENOUGH_ROWS = 64


@dataclass
class ExpertStats:
    """What the experts of all blocks have done so far.

    Attributes:
        num_distinct: experts that were brought, each counted once for all who were at its stop.
        num_wanted: the same, counted for each rider.
        num_together: products with rows of several riders.
        num_alone: products with the rows of one.
    """

    num_distinct: int = 0
    num_wanted: int = 0
    num_together: int = 0
    num_alone: int = 0


@dataclass
class ExpertSettings:
    """What all blocks' experts share.

    Attributes:
        is_exact: whether each rider's rows are multiplied by themselves.
        stats: what was done so far.
    """

    is_exact: bool = False
    stats: ExpertStats = field(default_factory=ExpertStats)


class StreamedExperts:
    """The experts of one module.

    Args:
        module: whose parameters of experts are on the meta device; biases and norms come with its block.
        units: of its experts.
        first_unit: the number of its first expert's unit among all.
        demand: brings units.
        forecast: tells which units are worth reading ahead.
        settings: of all blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        units: ExpertUnits,
        first_unit: int,
        demand: DemandStops,
        forecast: ExpertForecast,
        settings: ExpertSettings,
    ) -> None:
        self._module, self._units, self._first = module, units, first_unit
        self._demand, self._forecast, self._settings = demand, forecast, settings

    @property
    def wait_seconds(self) -> float:
        """How long units were waited for so far, by all blocks."""
        return self._demand.read_stats.wait_seconds

    def forward(self, routing: Routing) -> Tensor:
        """Return the sum of the chosen experts' outputs, (T, H).

        Raises:
            CheckpointError, OSError: one of them cannot be read.
        """
        is_recorded = routing.hidden.requires_grad or routing.top_k_weights.requires_grad
        if torch.is_grad_enabled() and is_recorded:
            return self._recorded(routing)
        result: Tensor = gather(self, routing)
        return result

    def _recorded(self, routing: Routing) -> Tensor:
        """Compute as `eager` does, with weights that autograd may keep, because they are brought again in backward."""
        wanted, layout = routing.experts, self._units.layout
        total = ExpertSum(routing, sum_dtype(self._module, routing))
        for place, number in enumerate(wanted):
            later = [self._first + other for other in wanted[place + 1 :]]
            sooner = [self._first + other for other in reversed(wanted[:place])]
            held = {
                parameter: DemandWeight.of(
                    self._demand,
                    self._first + number,
                    self._units.key(parameter, number),
                    torch.empty(layout.shapes[parameter], dtype=layout.dtypes[parameter], device="meta"),
                    later,
                    sooner,
                )
                for parameter in layout.matrices
            }
            total.add(
                number, expert_output(self._module, self._with_rest(held, number), routing.rows(number))
            )
        self._forecast.saw(self._first, wanted)
        return total.result()

    def _with_rest(self, held: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Return an expert's weights, those included that come with the block, as its biases do."""
        layout = self._units.layout
        biases = [key for key in layout.shapes if key not in layout.matrices]
        return {**{key: getattr(self._module, key)[number] for key in biases}, **held}

    def serve(self, items: Sequence[Routing]) -> Sequence[Tensor | BaseException]:
        """Compute for all who are at the stop; see `gathering.Gathering`."""
        with torch.no_grad():
            return self._serve(items)

    def _serve(self, items: Sequence[Routing]) -> list[Tensor | BaseException]:
        wanted_by: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            for number in item.experts:
                wanted_by.setdefault(number, []).append(place)
        union = sorted(wanted_by)
        sums: list[ExpertSum | BaseException] = [
            ExpertSum(item, sum_dtype(self._module, item)) for item in items
        ]
        stats = self._settings.stats
        stats.num_distinct += len(union)
        stats.num_wanted += sum(map(len, wanted_by.values()))
        ahead = self._forecast.ahead_of(self._first, union)
        left = [self._first + number for number in union]
        while left:
            try:
                for unit, weights in self._demand.bring(left, ahead):
                    number = unit - self._first
                    here = [place for place in wanted_by[number] if isinstance(sums[place], ExpertSum)]
                    self._multiply(items, sums, here, number, weights)
                    left = left[1:]
            except Exception as error:  # of one expert: those who need it end, and nobody else
                failed = left[0] - self._first
                left = left[1:]
                for place in wanted_by[failed]:
                    sums[place] = error
                left = [
                    unit
                    for unit in left
                    if any(isinstance(sums[place], ExpertSum) for place in wanted_by[unit - self._first])
                ]
        self._forecast.saw(self._first, union)
        return [one.result() if isinstance(one, ExpertSum) else one for one in sums]

    def _multiply(
        self,
        items: Sequence[Routing],
        sums: list[ExpertSum | BaseException],
        here: Sequence[int],
        number: int,
        weights: Weights,
    ) -> None:
        """Add one expert's output to what comes of those who want it."""
        rows = [items[place].rows(number) for place in here]
        groups = self._groups([len(own) for own in rows])
        held: Mapping[str, Tensor] = {
            parameter: weights[self._units.key(parameter, number)]
            for parameter in self._units.layout.matrices
        }
        if len(groups) > 1:
            held = _decoded(held)
        held = self._with_rest(held, number)
        for group in groups:
            given = [rows[one] for one in group]
            output = expert_output(self._module, held, given[0] if len(given) == 1 else torch.cat(given))
            for one, part in zip(group, output.split([len(own) for own in given]), strict=True):
                total = sums[here[one]]
                assert isinstance(total, ExpertSum), "asked before"
                total.add(number, part)
        together = sum(len(group) > 1 for group in groups)
        self._settings.stats.num_together += together
        self._settings.stats.num_alone += len(groups) - together

    def _groups(self, counts: Sequence[int]) -> list[list[int]]:
        """Return whose rows are multiplied together: those of few rows, unless each is to have bits of its own."""
        if self._settings.is_exact:
            return [[one] for one in range(len(counts))]
        few = [one for one, count in enumerate(counts) if count < ENOUGH_ROWS]
        return [*([few] if few else []), *([one] for one, count in enumerate(counts) if count >= ENOUGH_ROWS)]


def _decoded(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of which each is cast or decoded once, however many products follow."""
    offset, plain = 0, dict[str, Tensor]()
    for key, value in held.items():
        if isinstance(value, LazyWeight):
            plain[key] = value.cast(offset)
            offset += round_up(value.numel() * value.dtype.itemsize, CACHE_LINE_BYTES)
        else:
            plain[key] = value
    return plain
