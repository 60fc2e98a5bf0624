"""Plots: the same bytes for the same data, no text read as anything but text, no id twice on a page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")

import matplotlib as mpl

from slowllm.entrypoints.report import plots
from slowllm.entrypoints.report.series import Calibration, Histogram, Series
from slowllm.entrypoints.report.timeline import Timeline
from slowllm.streaming.stops import Passage, StopRead

NASTY = ["</svg><script>alert(1)</script>", "$\\frac{", "a\x00b\nc", "_begins with a line", "x" * 500, "é 漢"]


def series(*values: float) -> Series:
    found = Series()
    for place, value in enumerate(values):
        found.add(place, value)
    return found


def timeline() -> Timeline:
    found = Timeline(2)
    for number in range(4):
        found.on_passage(Passage(number % 2, "up", 1, 0.1, 0.2, float(number)))
        found.on_read(StopRead(number % 2, number - 0.5, number + 0.5, 10))
    found.finish()
    return found


def calibration() -> Calibration:
    found = Calibration()
    for number in range(10):
        found.add(number / 10, number % 2 == 0)
    return found


def every_plot() -> list[str]:
    histogram = Histogram([0.0, 1.0, 2.0])
    histogram.add(0.5)
    return [
        plots.timeline("Timeline", timeline()),
        plots.timeline("Empty timeline", Timeline(2)),
        plots.seconds_of_stops("Stops", timeline()),
        plots.curves("Curves", [plots.Curve(name, series(1, 2)) for name in NASTY], "x", "y"),
        plots.curves("Empty curve", [plots.Curve("nothing", Series())], "x", "y"),
        plots.histogram("Histogram", histogram, "x", "y"),
        plots.histogram("Empty histogram", Histogram([0.0, 1.0]), "x", "y"),
        plots.reliability("Reliability", calibration()),
        plots.reliability("Empty reliability", Calibration()),
        plots.shares("Shares", [plots.PlottedShare(name, 0.5, 0.4, 0.6) for name in NASTY], "x"),
        plots.bars("Bars", [plots.Bar(name, 2.0) for name in NASTY], "x"),
    ]


@pytest.mark.filterwarnings("error")
def test_the_same_data_give_the_same_bytes() -> None:
    assert every_plot() == every_plot()


def test_every_plot_is_well_formed_and_asks_for_nothing() -> None:
    drawn = every_plot()
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not [one for one in root.iter() if one.tag.endswith(("script", "image", "metadata"))]
        for element in root.iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
    referred = {one for svg in drawn for one in re.findall(r"(?:url\(|href=\")#(\w+)", svg)}
    # What one plot refers to is in no other plot.
    for one in referred:
        assert sum(f'id="{one}"' in svg for svg in drawn) == 1


def test_a_legend_of_many_long_names_stays_inside_the_plot() -> None:
    series = Series()
    for step in range(3):
        series.add(step, float(step))
    names = [f"kind-shallow-learning_rate-0.00{number}" for number in range(plots.MAX_NAMED + 3)]
    svg = plots.curves("Loss", [plots.Curve(name, series) for name in names], "step", "loss")
    root = ElementTree.fromstring(svg)
    width = float(root.attrib["width"].removesuffix("pt"))
    places = {
        one.text: float((re.search(r"translate\(([\d.]+)", one.attrib.get("transform", "")) or ["", "0"])[1])
        for one in root.iter()
        if one.tag.endswith("text")
    }
    assert "3 more" in places
    for name in names[: plots.MAX_NAMED]:
        # A letter is less than 6 points wide.
        assert places[name] + 6 * len(name) <= width
    assert not set(names[plots.MAX_NAMED :]) & set(places)


def test_names_stay_the_texts_that_they_are() -> None:
    svg = plots.shares("Shares", [plots.PlottedShare(name, 0.5) for name in NASTY], "x")
    texts = [one.text for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("text")]
    assert "</svg><script>alert(1)</script>" in texts
    assert "$\\frac{" in texts
    assert "a b c" in texts
    assert plots.shortened("x" * 500) in texts
    assert len(plots.shortened("x" * 500)) == plots.MAX_NAME_LETTERS


def test_the_settings_of_the_process_neither_matter_nor_change() -> None:
    wanted = plots.bars("Bars", [plots.Bar("a", 1.0)], "x")
    with mpl.rc_context({"font.size": 30.0, "svg.fonttype": "path"}):
        assert plots.bars("Bars", [plots.Bar("a", 1.0)], "x") == wanted
        assert mpl.rcParams["font.size"] == 30.0
    assert "matplotlib.pyplot" not in plots.__dict__
