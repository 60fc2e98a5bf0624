"""Draw plots as SVG that stands inside a page of HTML, the same bytes for the same data.

Knows numbers and names; nothing of models. Texts stay texts, and none of them is read as mathematics or markup.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slowllm.entrypoints.report.series import Calibration, Histogram, Series
from slowllm.entrypoints.report.timeline import Timeline

READING, WAITING, COMPUTING = "#4878a8", "#d08030", "#58945c"
GREY = "#888888"
# Curves that get a colour and a name; where there are more, the others are grey.
MAX_NAMED = 8
MAX_NAME_LETTERS = 40
# What a line of a legend has room for, beside the samples of its colours.
LEGEND_LETTERS = 110
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Curve:
    """A named curve of a plot."""

    name: str
    series: Series
    is_validation: bool = False


@dataclass(frozen=True)
class PlottedShare:
    """A share of a total with its interval, where one is known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bar:
    """A named value, drawn as a bar of a colour."""

    name: str
    value: float
    colour: str = READING


def _draw(title: str, draw: Callable[[Figure], None], height: float = 2.9, width: float = 8.0) -> str:
    """Return a figure as an SVG element.

    Args:
        title: what a screen reader says, and what ids in the SVG begin with, so that no two plots of a page share one.
        draw: puts axes and what is in them on the figure.
        height: in inches.
        width: in inches.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        # Texts stay texts: the browser has the letters that the font here does not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()  # whatever the user's own file says
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": title})
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure)
        memory = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(memory, format="svg", metadata=nothing)
    # Without the prologue of an XML file, and as wide as the page allows.
    svg = memory.getvalue()
    svg = svg[svg.index("<svg ") :].rstrip()
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def shortened(name: str) -> str:
    """Return a name as it is put into a plot: in one line, and not longer than there is room."""
    clean = "".join(letter if letter.isprintable() else " " for letter in name)
    return (
        clean if len(clean) <= MAX_NAME_LETTERS else clean[: MAX_NAME_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )


def timeline(title: str, found: Timeline) -> str:
    """Return when the last stops were read, waited for and computed."""
    passages, reads = list(found.passages), list(found.reads)
    start = passages[0].began_at if passages else 0.0
    reads = [read for read in reads if read.ended_at >= start]
    waits = [(one.began_at - start, one.wait_seconds) for one in passages]
    computes = [(one.began_at + one.wait_seconds - start, one.compute_seconds) for one in passages]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        # Reads of neighbours overlap, so they take turns between two rows.
        for parity in (0, 1):
            spans = [
                (max(read.began_at, start) - start, read.ended_at - max(read.began_at, start))
                for read in reads
                if read.stop % 2 == parity
            ]
            axes.broken_barh(spans, (2.1 + 0.4 * parity, 0.38), color=READING, linewidth=0)
        axes.broken_barh(waits, (1.1, 0.8), color=WAITING, linewidth=0)
        for parity, colour in ((0, COMPUTING), (1, "#8cbc8e")):
            spans = [span for span, one in zip(computes, passages, strict=True) if one.stop % 2 == parity]
            axes.broken_barh(spans, (0.1, 0.8), color=colour, linewidth=0)
        axes.set_yticks([0.5, 1.5, 2.5], ["computing", "waiting", "reading"])
        axes.set_ylim(0, 3)
        axes.set_xlabel("seconds")
        axes.grid(axis="y", visible=False)

    return _draw(title, draw, height=2.2)


def seconds_of_stops(title: str, found: Timeline) -> str:
    """Return the seconds that each stop was waited for, computed and read, of all sweeps together."""
    stops = range(len(found.stops))
    waits = [one.wait_seconds for one in found.stops]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        computes = [one.compute_seconds for one in found.stops]
        axes.bar(stops, computes, 0.85, color=COMPUTING, label="computing")
        axes.bar(stops, waits, 0.85, bottom=computes, color=WAITING, label="waiting")
        if any(one.num_reads for one in found.stops):
            seconds = [one.read_seconds for one in found.stops]
            axes.plot(
                stops, seconds, color=READING, marker="o", markersize=3, linewidth=0.8,
                label="reading",
            )  # fmt: skip
        axes.set_xlabel("stop")
        axes.set_ylabel("seconds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        axes.set_ylim(bottom=0)
        _legend(axes)

    return _draw(title, draw)


def _legend(axes: Axes) -> None:
    """Put a legend above the axes, with as many columns as its longest name leaves room for."""
    names = [name for name in axes.get_legend_handles_labels()[1] if not name.startswith("_")]
    columns = max(1, min(4, LEGEND_LETTERS // (max(map(len, names), default=1) + 8)))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2)


def curves(
    title: str, found: Sequence[Curve], x: str, y: str, *, from_zero: bool = False, has_counts: bool = False
) -> str:
    """Return curves over the same axis; curves of one name have one colour."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = list(dict.fromkeys(curve.name for curve in found))
        colours = [f"C{number}" for number in range(10)]
        for curve in found:
            number = names.index(curve.name)
            is_named = number < MAX_NAMED
            places, values = curve.series.points()
            dots: dict[str, Any] = (
                {"marker": "o", "markersize": 3} if len(places) <= 40 or curve.is_validation else {}
            )
            axes.plot(
                places, values, color=colours[number] if is_named else GREY, linewidth=1.2,
                alpha=1.0 if is_named else 0.4,
                label=_label(curve, number, len(names)),
                linestyle="--" if curve.is_validation else "-", **dots,
            )  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if from_zero:
            axes.set_ylim(bottom=0)
        if has_counts:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(found) > 1:
            _legend(axes)

    return _draw(title, draw)


def _label(curve: Curve, number: int, num_names: int) -> str:
    """Return what a legend says of a curve; of all that have no colour, the first stands for the others."""
    if number < MAX_NAMED:
        return shortened(curve.name) + (", validation" if curve.is_validation else "")
    return f"{num_names - MAX_NAMED} more" if number == MAX_NAMED and not curve.is_validation else "_others"


def histogram(title: str, found: Histogram, x: str, y: str) -> str:
    """Return a histogram as bars."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        widths = [high - low for low, high in zip(found.edges, found.edges[1:], strict=False)]
        axes.bar(
            found.edges[:-1],
            found.counts,
            widths,
            align="edge",
            color=READING,
            edgecolor="white",
            linewidth=0.5,
        )
        axes.set_xlim(found.edges[0], found.edges[-1])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    return _draw(title, draw)


def reliability(title: str, found: Calibration) -> str:
    """Return the accuracy of answers against their probability, and how many answers have it."""
    width = 1 / len(found.bins)
    middles = [(index + 0.5) * width for index in range(len(found.bins))]

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="probability = accuracy")
        above.bar(middles, [one.accuracy for one in found.bins], 0.92 * width, color=READING, alpha=0.35)
        full = [one for one in found.bins if one.num_answers]
        above.plot(
            [one.confidence for one in full], [one.accuracy for one in full], color=READING, marker="o",
            markersize=4, linewidth=1.2, label="answers",
        )  # fmt: skip
        above.set_ylim(0, 1.02)
        above.set_ylabel("accuracy")
        _legend(above)
        counts = [one.num_answers for one in found.bins]
        bars = below.bar(middles, counts, 0.92 * width, color=GREY)
        below.bar_label(bars, [str(count) if count else "" for count in counts], fontsize=7)
        below.margins(y=0.3)
        below.set_ylabel("answers")
        below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=2))
        below.set_xlim(0, 1)
        below.set_xlabel("probability of the answer")

    return _draw(title, draw, height=4.2, width=6.0)


def shares(title: str, found: Sequence[PlottedShare], x: str) -> str:
    """Return shares as points with their intervals, one below the other."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, one in enumerate(found):
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [row, row], color=READING, linewidth=2, alpha=0.5)
            axes.plot([one.value], [row], color=READING, marker="o", markersize=5)
        axes.set_yticks(range(len(found)), [shortened(one.name) for one in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(x)

    return _draw(title, draw, height=1.0 + 0.28 * len(found))


def bars(title: str, found: Sequence[Bar], x: str) -> str:
    """Return named values as bars, one below the other, each with its number."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [bar.value for bar in found]
        rows = axes.barh(range(len(found)), values, 0.65, color=[bar.colour for bar in found])
        axes.bar_label(rows, [f"{value:,.3g}" for value in values], padding=4)
        axes.set_yticks(range(len(found)), [shortened(bar.name) for bar in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.set_xlabel(x)
        axes.grid(axis="y", visible=False)

    return _draw(title, draw, height=1.0 + 0.36 * len(found))
