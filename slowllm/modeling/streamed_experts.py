"""The experts of a block, each of which is brought when a router has chosen it, once for all who are at the block.

Takes the place of a module's own computing. Everybody at the block's stop comes here with the rows that its router sent on;
the union of the chosen experts is brought, those that are in memory first, while the others are read. Each is decoded once and
multiplied for all, and the rows are added up as transformers' `eager` loop adds them: by ascending expert. Riders are computed as
one, or where bits count, each as a party of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from slowllm.modeling.expert_forecast import ExpertForecast
from slowllm.modeling.expert_parties import Arrival, ExpertParty, Taker
from slowllm.modeling.expert_products import expert_outputs
from slowllm.modeling.expert_routing import Routing
from slowllm.modeling.expert_units import ExpertUnits
from slowllm.modeling.held_weight import HeldWeight, Holder
from slowllm.modeling.look_ahead import LookAhead
from slowllm.modeling.recorded_experts import RecordedExperts, RecordedGradients
from slowllm.rounding import round_up
from slowllm.streaming.call_context import current_call
from slowllm.streaming.demand_stops import DemandStops
from slowllm.streaming.gathering import gather
from slowllm.streaming.lazy_weight import CACHE_LINE_BYTES, LazyWeight
from slowllm.streaming.stops import Weights

# Outputs of experts that are computed before their turn wait until those before them have been read. Where they would take more
# than this, as many rows' would, experts are computed in ascending order.
MOST_WAITING_BYTES = 16 << 20


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


T = TypeVar("T", bound=Taker)


@dataclass(frozen=True, eq=False)
class _Meeting:
    """A point of their work to which riders come; see `gathering.Gathering`."""

    serve: Callable[[Sequence[Any]], list[Any]]
    demand: DemandStops

    @property
    def wait_seconds(self) -> float:
        return self.demand.wait_seconds


class StreamedExperts:
    """The experts of one module.

    Args:
        module: whose parameters of experts are on the meta device; biases and norms come with its block.
        units: of its experts.
        first_unit: the number of its first expert's unit among all.
        demand: brings units.
        forecast: tells which units are worth reading ahead.
        settings: of all blocks.
        look_ahead: guesses which experts the next module will need; None to guess nothing.
        on_expert: called after each expert that was multiplied.
    """

    def __init__(
        self,
        module: nn.Module,
        units: ExpertUnits,
        first_unit: int,
        demand: DemandStops,
        forecast: ExpertForecast,
        settings: ExpertSettings,
        look_ahead: LookAhead | None = None,
        on_expert: Callable[[], None] | None = None,
    ) -> None:
        self._module, self._units, self._first = module, units, first_unit
        self._demand, self._forecast, self._settings = demand, forecast, settings
        self._look_ahead, self._on_expert = look_ahead, on_expert
        self._before: Tensor | None = None
        # Riders that run backward come to each of these two in turn.
        self._recording = _Meeting(self._serve_recorded, demand)
        self._gradients = _Meeting(self._serve_recorded, demand)
        if look_ahead is not None:
            look_ahead.watch(first_unit, self._note)

    def _note(self, before: Tensor | None) -> None:
        """Note the hidden states of the rider who is about to come here."""
        self._before = before

    @property
    def wait_seconds(self) -> float:
        """How long units were waited for so far, by all blocks."""
        return self._demand.wait_seconds

    def forward(self, routing: Routing) -> Tensor:
        """Return the sum of the chosen experts' outputs, (T, H).

        Raises:
            CheckpointError, OSError: one of them cannot be read.
        """
        before, self._before = self._before, None
        is_recorded = routing.hidden.requires_grad or routing.top_k_weights.requires_grad
        if torch.is_grad_enabled() and is_recorded:
            return self._recorded(routing)
        result: Tensor = gather(self, Arrival(routing, before))
        return result

    def _recorded(self, routing: Routing) -> Tensor:
        """Compute under autograd, with a node of the block's graph that its replay sees to (see `recorded_experts`)."""
        nodes = current_call().late_nodes
        assert nodes is not None, "a block is replayed for its gradient"
        recorded = RecordedExperts(self._module, routing, self._kept_weights)
        total: Tensor = gather(self._recording, recorded)
        node = recorded.node(
            total, lambda gradient: gather(self._gradients, RecordedGradients(recorded, gradient))
        )
        nodes.append(node)
        return node.output

    def _kept_weights(self, number: int, holder: Holder, device: torch.device) -> Mapping[str, Tensor]:
        """Return weights of an expert that autograd may keep while it is not in memory."""
        layout = self._units.layout
        held = {
            parameter: HeldWeight(
                torch.empty(layout.shapes[parameter], dtype=layout.dtypes[parameter], device="meta"),
                holder, parameter, device,
            )
            for parameter in layout.matrices
        }  # fmt: skip
        return self._with_rest(held, number)

    def _serve_recorded(self, items: Sequence[RecordedExperts | RecordedGradients]) -> list[Any]:
        """Compute outputs, or gradients, of all riders at the stop that run backward."""
        union = sorted(set(itertools.chain.from_iterable(one.wants for one in items)))
        stats = self._settings.stats
        stats.num_distinct += len(union)
        num_wanted = sum(len(one.wants) for one in items)
        stats.num_wanted += num_wanted
        stats.num_alone += num_wanted
        with torch.autograd.set_multithreading_enabled(False):
            units = self._demand.soonest_first([self._first + number for number in union])
            self._pass(items, units, self._record)
        self._forecast.saw(self._first, union)
        return [one.outcome() for one in items]

    def _with_rest(self, held: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Return an expert's weights, those included that come with the block, as its biases do."""
        layout = self._units.layout
        biases = [key for key in layout.shapes if key not in layout.matrices]
        return {**{key: getattr(self._module, key)[number] for key in biases}, **held}

    def serve(self, items: Sequence[Arrival]) -> Sequence[Tensor | BaseException]:
        """Compute for all who are at the stop; see `gathering.Gathering`."""
        with torch.no_grad():
            return self._serve(items)

    def _serve(self, items: Sequence[Arrival]) -> list[Tensor | BaseException]:
        groups = [[one] for one in items] if self._settings.is_exact else [items]
        parties = [ExpertParty(self._module, group) for group in groups]
        union = sorted(set(itertools.chain.from_iterable(party.wants for party in parties)))
        self._count(parties, union)
        left = [self._first + number for number in union]
        were_ahead, ahead = self._compare(left), self._forecast.ahead_of(self._first, union)
        if self._look_ahead is not None and not ahead:
            ahead = self._look_ahead.guess(self._first, [item.before for item in items])
        if sum(party.output_bytes for party in parties) <= MOST_WAITING_BYTES:
            left = self._demand.soonest_first(left, were_ahead)
        self._pass(parties, left, self._multiply, ahead)
        self._forecast.saw(self._first, union)
        return list(itertools.chain.from_iterable(party.outcomes() for party in parties))

    def _pass(
        self,
        takers: Sequence[T],
        units: Sequence[int],
        compute: Callable[[Sequence[T], int, Weights], None],
        ahead: Sequence[int] = (),
    ) -> None:
        """Bring units, each to all who want it.

        Args:
            takers: who want them.
            units: in the order in which they are brought.
            compute: called with those who want an expert, its number, and the weights of its unit.
            ahead: units that are expected behind them.
        """
        left = list(units)
        while left:
            try:
                for unit, weights in self._demand.bring(left, ahead):
                    number = unit - self._first
                    compute([taker for taker in takers if number in taker.wants], number, weights)
                    if self._on_expert is not None:
                        self._on_expert()
                    left = left[1:]
            except Exception as error:  # of one expert: those who need it end, and nobody else
                left = self._without(takers, left, error)

    def _count(self, parties: Sequence[ExpertParty], union: Sequence[int]) -> None:
        """Count what will be done."""
        stats = self._settings.stats
        stats.num_distinct += len(union)
        for party in parties:
            takers = party.num_takers()
            stats.num_wanted += sum(takers)
            stats.num_together += sum(count > 1 for count in takers)
            stats.num_alone += takers.count(1)

    def _without(self, takers: Sequence[Taker], left: Sequence[int], error: Exception) -> list[int]:
        """Let those fail who need the first of the units that are left; return those that others need."""
        failed, numbers = left[0] - self._first, [unit - self._first for unit in left[1:]]
        needed = set[int]()
        for taker in takers:
            if failed in taker.wants:
                taker.fail(failed, error)
            needed |= set(taker.wants)
        return [self._first + number for number in numbers if number in needed]

    def _compare(self, wanted: Sequence[int]) -> Sequence[int]:
        """Compare what was guessed of this module with the units wanted; return those that were read ahead on the guess."""
        if self._look_ahead is None:
            return ()
        self._look_ahead.keep(self._first)
        return self._look_ahead.compare(self._first, wanted)

    def _held(self, number: int, weights: Weights) -> dict[str, Tensor]:
        """Return the matrices of an expert that was brought, by the names of the module's parameters."""
        layout = self._units.layout
        return {parameter: weights[self._units.key(parameter, number)] for parameter in layout.matrices}

    def _multiply(self, parties: Sequence[ExpertParty], number: int, weights: Weights) -> None:
        """Add one expert's outputs to what comes of those who want it."""
        held = self._with_rest(self._held(number, weights), number)
        outputs = expert_outputs(self._module, held, [party.routing.rows(number) for party in parties])
        for party, output in zip(parties, outputs, strict=True):
            party.add(number, output)

    def _record(
        self, items: Sequence[RecordedExperts | RecordedGradients], number: int, weights: Weights
    ) -> None:
        """Let riders that run backward compute with an expert."""
        held: Mapping[str, Tensor] = self._held(number, weights)
        if len(items) > 1:
            held = _decoded(held)
        for item in items:
            item.take(number, held)


def _decoded(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of which each is cast or decoded once, however many products follow, if these keep their bits."""
    offset, plain = 0, dict[str, Tensor]()
    for key, value in held.items():
        if isinstance(value, LazyWeight) and not value.is_multiplied_as_stored:
            plain[key] = value.cast(offset)
            offset += round_up(value.numel() * value.dtype.itemsize, CACHE_LINE_BYTES)
        else:
            plain[key] = value
    return plain
