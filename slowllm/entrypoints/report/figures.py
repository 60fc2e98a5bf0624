"""The figures of one run of a model: its plan, what was measured, and where the time went, as a section of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slowllm.entrypoints.cost import num_requests
from slowllm.entrypoints.report.page import PlotShown, Section
from slowllm.entrypoints.report.timeline import Timeline
from slowllm.errors import counted
from slowllm.options import format_binary, format_bytes

if TYPE_CHECKING:
    from slowllm.planning.job import Job
    from slowllm.runtime.streamed_lm import Report, StreamedLM


@dataclass(frozen=True)
class RunFigures:
    """What is known of a run when it is over, as names and values; and its timeline.

    Attributes:
        title: of this part of the run, where it has several.
        plan: what was planned.
        measured: what came of it.
        timeline: of its stops.
        is_local: whether the blocks were computed here.
    """

    title: str
    plan: list[tuple[str, str]]
    measured: list[tuple[str, str]]
    timeline: Timeline
    is_local: bool


def plan_of(lm: StreamedLM, job: Job, num_resumed: int) -> list[tuple[str, str]]:
    """Return the plan of a job in words.

    Args:
        lm: opened for the job.
        job: what the plan was made for.
        num_resumed: micro-batches that an earlier process has finished.
    """
    plan, forecast = lm.plan, lm.plan.forecast
    found = [
        ("model", f"{lm.name}, {lm.part_name}"),
        ("compute dtype", str(lm.model.dtype).removeprefix("torch.")),
        ("memory budget", format_binary(lm.budget_bytes)),
        ("planned peak of the model", format_binary(plan.peak_bytes)),
    ]
    if lm.swarm is not None:
        found.append(("weights", f"{format_bytes(lm.weight_bytes)} here, blocks in the swarm"))
    elif plan.streams:
        found += [
            ("weights of a sweep", format_bytes(lm.weight_bytes)),
            (
                "resident",
                f"{plan.held(len(lm.resident), lm.num_stops)}, {format_bytes(plan.resident_bytes)}",
            ),
            ("ring of what is streamed", format_bytes(plan.ring_bytes + plan.expert_ring_bytes)),
        ]
    else:
        found.append(("weights", f"{format_bytes(lm.weight_bytes)}, all in memory maps"))
    if lm.experts is not None:
        found.append(("experts", f"read when routers ask for them; {lm.experts.products}"))
    if plan.decoded_bytes:
        found.append(("decoded weights of a stop", format_bytes(plan.decoded_bytes)))
    found.append(
        (f"tokens of {'a step' if job.repeated else 'the job'}, with padding", f"{job.num_tokens or 0:,}")
    )
    if lm.swarm is None:
        unit = " of a step" if job.repeated else ""
        basis = "by measured rates" if forecast.is_measured else "by assumed rates of disk and processor"
        found += [
            (f"planned sweeps{unit}", f"{forecast.num_sweeps:,}"),
            (f"planned time{unit}", f"{_seconds(forecast.seconds)} {basis}"),
        ]
    if num_resumed:
        found.append(
            (
                "done before by an earlier process",
                f"{counted(num_resumed, 'micro-batch', 'micro-batches')}; their results are in the tables, not in the times",
            )
        )
    return found


def measured_of(lm: StreamedLM, before: Report, seconds: float, timeline: Timeline) -> list[tuple[str, str]]:
    """Return what was measured, in words.

    Args:
        lm: the model.
        before: its totals when the run began.
        seconds: that the run took.
        timeline: of its stops.
    """
    now = lm.report
    found = [("measured time", _seconds(seconds))]
    if lm.swarm is not None:
        times = list(lm.swarm.times.values())
        found.append(
            ("requests", f"{counted(num_requests(lm), 'request')} to {counted(len(times), 'server')}")
        )
        for name, words in (
            ("network", "on the network"),
            ("queue", "waiting at servers"),
            ("compute", "computing at servers"),
        ):
            spent = sum(getattr(one, f"{name}_seconds") for one in times)
            found.append((words, f"{_seconds(spent)}, in all requests together"))
    else:
        num_sweeps = (now.num_passages - before.num_passages) / lm.num_stops
        read_bytes = now.read_bytes - before.read_bytes
        rate = f", {format_bytes(read_bytes / seconds)}/s of the whole time" if seconds > 0 else ""
        found += [
            ("sweeps", f"{num_sweeps:,.3g}"),
            ("read from disk", f"{format_bytes(read_bytes)}{rate}" if read_bytes else "nothing"),
        ]
        busy = sum(stop.read_seconds for stop in timeline.stops)
        if read_bytes and busy:
            whole = sum(stop.read_bytes for stop in timeline.stops)
            found.append(
                (
                    "rate of a stop while it is read",
                    f"{format_bytes(whole / busy)}/s on average; stops that are read at once share the disk",
                )
            )
        found += [
            ("waiting for weights", _seconds(now.wait_seconds - before.wait_seconds)),
            ("computing", _seconds(now.compute_seconds - before.compute_seconds)),
        ]
    if timeline.num_new_tokens and timeline.num_sweeps:
        found += [
            ("new tokens", f"{timeline.num_new_tokens:,}"),
            ("new tokens a sweep", f"{timeline.num_new_tokens / timeline.num_sweeps:,.3g}"),
            ("seconds a new token", f"{seconds / timeline.num_new_tokens:,.4g}"),
        ]
    found.append(("peak RSS of the process", format_bytes(now.peak_rss_bytes)))
    return found


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def sections_of_run(run: RunFigures) -> list[Section]:
    """Return the figures of a run and the plots of its time."""
    from slowllm.entrypoints.report import plots

    name = f": {run.title}" if run.title else ""
    figures, found = Section(f"Figures{name}"), run.timeline
    figures.figures = [*run.plan, *run.measured]
    if not found.num_passages:
        figures.sentences.append("No stop was visited in this process.")
        return [figures]
    time = Section(f"Where the time went{name}")
    if not run.is_local:
        time.sentences.append(
            "The blocks were computed by servers of the swarm; only the stops of this process are shown."
        )
    elif not any(stop.num_reads for stop in found.stops):
        time.sentences.append("The model lies in memory maps, so slowllm itself read nothing.")
    shown, reads = len(found.passages), ""
    if any(stop.num_reads for stop in found.stops):
        reads = " A stop is read from its first request to its last, while others are read and computed."
    which = "All" if shown == found.num_passages else f"The last {shown:,} of {found.num_passages:,}"
    time.plots += [
        PlotShown(
            plots.timeline(f"Timeline of stops{name}", found),
            f"{which} stops, one after the other: when each was read from disk, waited for and computed with. Neighbours "
            "have different shades or rows.",
        ),
        PlotShown(
            plots.seconds_of_stops(f"Seconds of each stop{name}", found),
            f"Sums over {counted(found.num_sweeps, 'sweep')}.{reads}",
        ),
    ]
    if found.sweep_seconds.num_values > 1:
        each = found.sweep_seconds.stride
        mean = "" if each == 1 else f"; a point is the mean of {each}"
        time.plots.append(
            PlotShown(
                plots.curves(
                    f"Seconds of each sweep{name}", [plots.Curve("sweeps", found.sweep_seconds)], "sweep",
                    "seconds", from_zero=True,
                ),
                f"Seconds of each sweep up or down{mean}.",
            )
        )  # fmt: skip
    if found.num_new_tokens:
        time.plots.append(
            PlotShown(
                plots.curves(
                    f"New tokens of each sweep{name}", [plots.Curve("tokens", found.sweep_tokens)], "sweep",
                    "new tokens", from_zero=True, has_counts=True,
                ),
                "New tokens of all prompts that came out of each sweep.",
            )
        )  # fmt: skip
    return [figures, time]
