"""What a run has taken, in words: sweeps over the weights, or a client's requests to the servers of a swarm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slowllm.errors import counted
from slowllm.options import format_bytes

if TYPE_CHECKING:
    from slowllm.runtime.streamed_lm import StreamedLM


def num_requests(lm: StreamedLM) -> int:
    """Return how many requests a client's servers have answered."""
    return sum(times.num_requests for times in list(lm.swarm.times.values()))


def cost_of(lm: StreamedLM) -> str:
    """Return how many sweeps a model has made, or how many requests a client."""
    if lm.swarm is not None:
        asked = counted(num_requests(lm), "request")
        return f"{asked} to {counted(len(lm.swarm.times), 'server')}"
    num_sweeps = lm.report.num_passages / lm.num_stops
    return f"{num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'}"


def times_of(lm: StreamedLM, seconds: float) -> str:
    """Return where the time of a run went, of so many seconds: on this disk and processor, or at the servers."""
    report = lm.report
    if lm.swarm is not None:
        times = list(lm.swarm.times.values())
        network, queue, compute = (
            sum(getattr(one, f"{name}_seconds") for one in times) for name in ("network", "queue", "compute")
        )
        # Requests of several riders are under way at the same time.
        return (
            f"in all requests {network:.2f} s on the network, {queue:.2f} s waiting and {compute:.2f} s computing at servers, "
            f"peak RSS {format_bytes(report.peak_rss_bytes)} here"
        )
    disk = f"{format_bytes(lm.weight_bytes)} of weights mapped, nothing streamed"
    if lm.plan.streams:
        disk = f"read {format_bytes(report.read_bytes)} at {format_bytes(report.read_bytes / seconds)}/s"
    return (
        f"{disk}, waiting {report.wait_seconds:.2f} s, computing {report.compute_seconds:.2f} s, "
        f"peak RSS {format_bytes(report.peak_rss_bytes)}"
    )
