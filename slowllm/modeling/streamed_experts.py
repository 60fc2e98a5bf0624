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
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slowllm.modeling.demand_weight import DemandWeight
from slowllm.modeling.expert_forecast import ExpertForecast
from slowllm.modeling.expert_products import Routing, add_rows, expert_output
from slowllm.modeling.expert_units import ExpertUnits
from slowllm.rounding import round_up
from slowllm.streaming.demand_stops import DemandStops
from slowllm.streaming.gathering import gather
from slowllm.streaming.lazy_weight import CACHE_LINE_BYTES, LazyWeight
from slowllm.streaming.stops import Weights

# The name under which transformers finds `experts_forward`, and where a module keeps what computes its experts.
IMPLEMENTATION = "slowllm"
EXPERTS = "_slowllm_experts"
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

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs.

        Args:
            hidden: (T, H).
            index: (T, k) int64, the experts that each row goes to.
            weights: (T, k), by which their outputs are multiplied.
        Raises:
            CheckpointError: the router names an expert that does not exist, or its weights are no numbers.
        """
        routing = Routing.checked(self._units.name, hidden, index, weights, len(self._units.units))
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            return self._recorded(routing)
        result: Tensor = gather(self, routing)
        return result

    def _recorded(self, routing: Routing) -> Tensor:
        """Compute as `eager` does, with weights that autograd may keep, because they are brought again in backward."""
        wanted = routing.experts()
        out = torch.zeros_like(routing.hidden)
        for place, number in enumerate(wanted):
            later = [self._first + other for other in wanted[place + 1 :]]
            sooner = [self._first + other for other in reversed(wanted[:place])]
            held = {
                parameter: DemandWeight.of(
                    self._demand,
                    self._first + number,
                    self._units.key(parameter, number),
                    self._meta(parameter),
                    later,
                    sooner,
                )
                for parameter in self._units.parameters
            }
            tokens, places = routing.rows_of(number)
            rows = expert_output(self._module, self._with_rest(held, number), routing.hidden[tokens])
            out = add_rows(out, routing, tokens, places, rows)
        self._forecast.saw(self._first, wanted)
        return out

    def _meta(self, parameter: str) -> Tensor:
        whole = self._module._parameters[parameter]
        assert whole is not None, "it was there when the units were cut"
        return torch.empty(whole.shape[1:], dtype=whole.dtype, device="meta")

    def _with_rest(self, held: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Return an expert's weights, those included that come with the block, as its biases do."""
        rest = {
            key: value[number]
            for key, value in self._module._parameters.items()
            if value is not None
            and key not in self._units.parameters
            and len(value) == len(self._units.units)
        }
        return {**rest, **held}

    def serve(self, items: Sequence[Routing]) -> Sequence[Tensor | BaseException]:
        """Compute for all who are at the stop; see `gathering.Gathering`."""
        with torch.no_grad():
            return self._serve(items)

    def _serve(self, items: Sequence[Routing]) -> list[Tensor | BaseException]:
        wanted_by: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            for number in item.experts():
                wanted_by.setdefault(number, []).append(place)
        union = sorted(wanted_by)
        outcomes: list[Tensor | BaseException] = [torch.zeros_like(item.hidden) for item in items]
        stats = self._settings.stats
        stats.num_distinct += len(union)
        stats.num_wanted += sum(map(len, wanted_by.values()))
        ahead = self._forecast.ahead_of(self._first)
        left = [self._first + number for number in union]
        while left:
            try:
                for unit, weights in self._demand.bring(left, ahead):
                    number = unit - self._first
                    left = left[1:]
                    here = [place for place in wanted_by[number] if isinstance(outcomes[place], Tensor)]
                    self._multiply(items, outcomes, here, number, weights)
            except Exception as error:  # of one expert: those who need it end, and nobody else
                failed = left[0] - self._first
                left = left[1:]
                for place in wanted_by[failed]:
                    outcomes[place] = error
                left = [
                    unit
                    for unit in left
                    if any(isinstance(outcomes[place], Tensor) for place in wanted_by[unit - self._first])
                ]
        self._forecast.saw(self._first, union)
        return outcomes

    def _multiply(
        self,
        items: Sequence[Routing],
        outcomes: list[Tensor | BaseException],
        here: Sequence[int],
        number: int,
        weights: Weights,
    ) -> None:
        """Add one expert's output to what comes of those who want it."""
        rows = [items[place].rows_of(number) for place in here]
        groups = self._groups([len(tokens) for tokens, _ in rows])
        held: Mapping[str, Tensor] = {
            parameter: weights[self._units.key(parameter, number)] for parameter in self._units.parameters
        }
        if len(groups) > 1:
            held = _decoded(held)
        held = self._with_rest(held, number)
        for group in groups:
            given = [items[here[one]].hidden[rows[one][0]] for one in group]
            output = expert_output(self._module, held, given[0] if len(given) == 1 else torch.cat(given))
            for one, part in zip(group, output.split([len(own) for own in given]), strict=True):
                place, (tokens, places) = here[one], rows[one]
                so_far = outcomes[place]
                assert isinstance(so_far, Tensor), "asked before"
                outcomes[place] = add_rows(so_far, items[place], tokens, places, part)
        together = sum(len(group) > 1 for group in groups)
        self._settings.stats.num_together += together
        self._settings.stats.num_alone += len(groups) - together

    def _groups(self, counts: Sequence[int]) -> list[list[int]]:
        """Return whose rows are multiplied together: those of few rows, unless each is to have bits of its own."""
        if self._settings.is_exact:
            return [[one] for one in range(len(counts))]
        few = [one for one, count in enumerate(counts) if count < ENOUGH_ROWS]
        return [*([few] if few else []), *([one] for one, count in enumerate(counts) if count >= ENOUGH_ROWS)]


def experts_forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute experts that are read on demand; see `StreamedExperts.forward`."""
    streamed: StreamedExperts = module.__dict__[EXPERTS]
    return streamed.forward(hidden, index, weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


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
