"""A plan: how a model is held in memory, and what it says of itself in words.

Knows sizes in bytes; how a plan is chosen is `host_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass

from slowllm.errors import counted
from slowllm.html import facts_html
from slowllm.options import format_binary
from slowllm.planning.forecast import Forecast
from slowllm.planning.job import ASSUMED_LENGTH, Granularity


@dataclass(frozen=True)
class Plan:
    """How a model is held in memory.

    Attributes:
        granularity: whether stops are blocks or leaves.
        resident: stops that stay in memory, spread evenly.
        ring_bytes: of the ring through which the others stream; 0 if all stay.
        rider_tokens: tokens of one micro-batch, padding included.
        sweep_tokens: tokens of all riders of one sweep.
        padding_tokens: padding in a micro-batch that takes as long as another micro-batch would.
        peak_bytes: what the model takes of the budget.
        resident_bytes: of it, the stops that stay.
        forecast: the expected times of the job.
        longest: tokens of the longest sequence that memory is planned for.
        unused: stops that the job never visits.
        expert_ring_bytes: of the ring through which experts come that are read on demand; 0 where there are none.
        kept_units: experts that stay in memory.
        router_bytes: of copies of routers, which guess what the next block will need; 0 where nothing is guessed.
        keeps_graph: whether autograd keeps the graph over the blocks, instead of recomputing them on the way down:
            all weights stay, and there is room.
        decoded_bytes: of a buffer in which the matrices of a coded stop stay decoded while several riders pass it; 0 where
            each is decoded for each rider.
    """

    granularity: Granularity
    resident: frozenset[int]
    ring_bytes: int
    rider_tokens: int
    sweep_tokens: int
    padding_tokens: int
    peak_bytes: int
    resident_bytes: int
    forecast: Forecast
    longest: int = ASSUMED_LENGTH
    unused: frozenset[int] = frozenset()
    keeps_graph: bool = False
    expert_ring_bytes: int = 0
    kept_units: int = 0
    router_bytes: int = 0
    decoded_bytes: int = 0

    @property
    def streams(self) -> bool:
        """Whether sweeps read weights again; else all of them stay in memory."""
        return bool(self.ring_bytes or self.expert_ring_bytes)

    @property
    def streamed(self) -> str:
        """What passes through the ring, in words."""
        return {
            "blocks": "whole blocks",
            "experts": "blocks without their experts",
            "leaves": "parts of blocks (forward only)",
        }[self.granularity]

    def held(self, num_resident: int, num_stops: int) -> str:
        """Return what stays in memory of a model that streams, in words."""
        stops = f"{num_resident} of {counted(num_stops, 'stop')}"
        return f"{stops} and {self.kept_units:,} experts" if self.expert_ring_bytes else stops

    def _repr_html_(self) -> str:
        forecast = self.forecast
        disk = "assumed rates" if not forecast.is_measured else "measured rates"
        return facts_html(
            f"plan of {self.granularity}",
            [
                ("memory", format_binary(self.peak_bytes)),
                ("resident", f"{len(self.resident)} stops, {format_binary(self.resident_bytes)}"),
                (
                    "ring",
                    format_binary(self.ring_bytes + self.expert_ring_bytes)
                    if self.streams
                    else "none: nothing is streamed",
                ),
                *([("decoded stop", format_binary(self.decoded_bytes))] if self.decoded_bytes else []),
                ("tokens of a micro-batch", f"{self.rider_tokens:,}"),
                ("tokens of a sweep", f"{self.sweep_tokens:,}"),
                ("longest sequence", f"{self.longest:,} tokens"),
                ("sweeps", f"{forecast.num_sweeps:,}"),
                (
                    "a sweep",
                    f"{forecast.first_seconds:.3g} s, later {forecast.later_seconds:.3g} s, at {disk}",
                ),
            ],
        )
