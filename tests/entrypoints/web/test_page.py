"""The page in a real browser: each tab is driven, two visitors at once, and who leaves gives the seat back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from slowllm.inference import generation
from slowllm.inference.generation_types import Settings, encode_prompt
from tests.support.memory_stops import until
from tests.support.web_page import Counter, chromium, counter, served_page

pytest.importorskip("gradio", reason="the page is made with gradio")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def served(browser: Any) -> Iterator[tuple[Counter, str]]:
    with counter() as opened, served_page(opened) as url:
        yield opened, url


class Visitor:
    """A tab of a browser that shows the page, and what it has asked of whom.

    Args:
        browser: that opens the tab.
        url: of the page.
    """

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_page(viewport={"width": 1100, "height": 800})
        self.hosts: set[str] = set()
        self.failed: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(str(urlsplit(request.url).hostname)))
        self.page.on("pageerror", lambda error: self.failed.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#complete-run")

    def show(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def fill(self, field: str, text: str) -> None:
        self.page.locator(f"#{field} textarea, #{field} input").first.fill(text)

    def press(self, button: str) -> None:
        self.page.locator(f"#{button}").click()

    def wait_for(self, place: str, text: str) -> str:
        """Wait until a place has a text; return all that stands there."""
        found = self.page.locator(f"#{place}").filter(has_text=text)
        found.wait_for()
        return str(found.inner_text())


@pytest.fixture
def visitors(browser: Any, served: tuple[Counter, str]) -> Iterator[list[Visitor]]:
    """Two visitors, who ask nobody but the page's own server."""
    opened, url = served
    two = [Visitor(browser, url), Visitor(browser, url)]
    yield two
    opened.gate.open()
    for visitor in two:
        visitor.page.close()
        # What an icon of the browser's is made of comes from nowhere.
        assert visitor.hosts <= {"127.0.0.1", "None"}
        assert not visitor.failed
    until(lambda: opened.service.status().held_tokens == 0)


def test_every_tab_gives_what_it_says(
    served: tuple[Counter, str], visitors: list[Visitor], tmp_path: Path
) -> None:
    lm, (me, _) = served[0].lm, visitors
    me.fill("complete-text", "The value is")
    me.fill("complete-max-new-tokens", "6")
    me.press("complete-run")
    me.wait_for("complete-status", "6 tokens")
    ((wanted,),) = generation.generate(lm, [encode_prompt(lm, "The value is", Settings(max_new_tokens=6))])
    assert me.wait_for("complete-body", "The value is") == "The value is" + wanted.text

    me.show("Score")
    me.fill("score-text", "The value is the value.")
    me.press("score-run")
    assert "perplexity" in me.wait_for("score-status", "log-likelihood")
    token = me.page.locator("#score-body .token").first
    nats = float(token.get_attribute("data-nats"))
    assert token.get_attribute("title").startswith(f"surprisal {nats:.3f} nats")
    colours = {
        one.evaluate("element => getComputedStyle(element).backgroundColor")
        for one in me.page.locator("#score-body .token").all()
    }
    assert len(colours) > 2

    me.show("Choose")
    me.fill("choose-context", "The value is")
    me.fill("choose-choices", "the\nzebra")
    me.press("choose-run")
    assert "Likeliest: the" in me.wait_for("choose-status", "Likeliest")
    likely, unlikely = me.page.locator("#choose-body .fill").all()
    assert likely.bounding_box()["width"] > unlikely.bounding_box()["width"]

    me.show("Yes or no")
    me.fill("yes-or-no-question", "Is it the value?")
    me.page.keyboard.press("Enter")
    me.wait_for("yes-or-no-status", "Likeliest")

    me.show("File")
    (upload := tmp_path / "lines.txt").write_text("The value is\nthe value\n")
    me.page.set_input_files("#file-upload input[type=file]", upload)
    me.page.locator("#file-upload").filter(has_text="lines.txt").wait_for()
    me.press("file-run")
    me.wait_for("file-status", "2 of 2 lines")
    with me.page.expect_download() as waiting:
        me.page.locator("#file-result a").first.click()
    rows = [json.loads(row) for row in Path(waiting.value.path()).read_text().splitlines()]
    assert [row["text"] for row in rows] == ["The value is", "the value"]

    me.show("Machine")
    assert "stop" not in me.wait_for("machine-live", "Nobody rides.")
    me.wait_for("machine-plan", "10 blocks, computed in float32")


def test_what_is_wrong_is_shown_and_all_goes_on(visitors: list[Visitor], tmp_path: Path) -> None:
    me, _ = visitors
    me.fill("complete-text", "word " * 600)
    me.press("complete-run")
    assert "memory was planned for" in me.wait_for("complete-status", "the request has")
    me.page.get_by_text("memory was planned for").nth(1).wait_for()  # a notice as well
    me.fill("complete-text", "The value")
    me.fill("complete-max-new-tokens", "2")
    me.press("complete-run")
    me.wait_for("complete-status", "2 tokens")

    me.show("File")
    (upload := tmp_path / "picture.txt").write_bytes(b"\x89PNG\x00\x00")
    me.page.set_input_files("#file-upload input[type=file]", upload)
    me.page.locator("#file-upload").filter(has_text="picture.txt").wait_for()
    me.press("file-run")
    me.wait_for("file-status", "picture.txt: is a binary file and not text in UTF-8")
    me.page.locator("#file-upload button[aria-label=Clear]").click()
    (large := tmp_path / "large.txt").write_bytes(b"word\n" * 300_000)
    me.page.set_input_files("#file-upload input[type=file]", large)
    me.page.get_by_text("exceed the maximum allowed size").first.wait_for()


def test_two_visitors_ride_in_the_same_sweeps_and_one_stops(
    served: tuple[Counter, str], visitors: list[Visitor]
) -> None:
    opened, (me, you) = served[0], visitors
    opened.gate.close()
    for visitor in visitors:
        visitor.fill("complete-text", "The value is")
        visitor.fill("complete-max-new-tokens", "300")
        visitor.press("complete-run")
    until(lambda: sum(row.num_riding + row.num_waiting for row in opened.desk.rows()) == 2)
    me.show("Machine")
    live = me.wait_for("machine-live", "(you)")
    assert live.count("visitor") == 2
    assert live.count("(you)") == 1
    me.show("Complete")
    me.press("complete-stop")
    me.wait_for("complete-status", "It was stopped.")
    assert [row.kind for row in opened.desk.rows()] == ["complete"]
    opened.gate.open()
    assert "The value is" in you.wait_for("complete-body", "The value is the")
    you.press("complete-stop")
    you.wait_for("complete-status", "It was stopped.")
    until(lambda: opened.service.status().held_tokens == 0)


def test_a_closed_tab_gives_its_seat_back(served: tuple[Counter, str], visitors: list[Visitor]) -> None:
    opened, (me, you) = served[0], visitors
    opened.gate.close()
    me.fill("complete-text", "The value is")
    me.fill("complete-max-new-tokens", "300")
    me.press("complete-run")
    until(lambda: opened.service.status().held_tokens > 0)
    me.page.close()
    # Without the gate open, nobody computes: the seat is free because its visitor has left.
    until(lambda: opened.service.status().held_tokens == 0)
    opened.gate.open()
    you.fill("complete-text", "The value is")
    you.fill("complete-max-new-tokens", "2")
    you.press("complete-run")
    you.wait_for("complete-status", "2 tokens")
