"""Reports in a real browser: nothing leaves the page, nothing fails, every plot is to be seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import run
from tests.support.web_page import chromium

pytest.importorskip("matplotlib", reason="reports are made with matplotlib")
pytestmark = pytest.mark.long

TEXT = "The value </svg><script>document.title = 'taken'</script> is returned."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


VERBS: dict[str, tuple[list[str], int]] = {
    "forward": (["{}/lines.txt", "--stream-all", "--json"], 4),
    "generate": (["--prompts", "{}/lines.txt", "--max-new-tokens", "3", "--json"], 4),
    "eval boolq": (["--data", "{}/data.jsonl", "--json"], 4),
    "tune": (["{}/lines.txt", "--out", "{}/prompt", "--steps", "2", "--tokens", "2", "--lr", "0.1", "--lr", "0.2"], 5),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_report_is_shown_by_itself(
    verb: str, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "lines.txt").write_text("\n".join([TEXT, "A value is returned.", "The value"]))
    rows = [{"question": "is it so", "passage": TEXT, "answer": number % 2 == 0} for number in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options, num_plots = VERBS[verb]
    file = tmp_path / "r.html"
    arguments = [*verb.split(), *(word.format(tmp_path) for word in options), "--report", file]
    assert run(arguments, monkeypatch) == 0, capsys.readouterr().err
    asked: list[str] = []
    said: list[str] = []
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    assert page.title() == f"slowllm {verb}"
    drawn = page.locator("svg").all()
    assert len(drawn) >= num_plots  # a plot of the sweeps where there are several
    for svg in drawn:
        assert svg.is_visible()
        box = svg.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 80
        assert box["x"] + box["width"] <= 1000
    # Nothing is wider than the window, and what is drawn differs from an empty page.
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000
    assert {len(svg.screenshot()) > 3000 for svg in drawn} == {True}
    assert asked == [file.as_uri()]
    assert said == []
    page.close()
