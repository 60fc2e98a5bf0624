"""Read a report as a browser would, without one."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# Attributes by which a page asks for something else.
ASKING = {"href", "xlink:href", "src", "srcset", "action", "data", "poster", "background", "formaction"}


class ReadReport(HTMLParser):
    """What is on a page.

    Attributes:
        tags: all elements, in order.
        asked: what the page would fetch, or be led to.
        handlers: attributes that would run a script.
        headings: texts of the titles.
        text: all text that is shown.
        labels: what the plots are called.
        ids: of elements.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.handlers: list[str] = []
        self.headings: list[str] = []
        self.labels: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = [tag]
        for name, value in attrs:
            if name in ASKING and value is not None and not value.startswith(("#", "data:")):
                self.asked.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(str(value))
            if tag == "svg" and name == "aria-label":
                self.labels.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        self._inside = []

    def handle_data(self, data: str) -> None:
        if self._inside in (["h1"], ["h2"]):
            self.headings.append(data)
        if self._inside != ["style"]:
            self.text += data


def read_report(file: Path) -> Any:
    """Return what is on a page that needs nothing else: no file, no network, no script."""
    page = ReadReport(file)
    assert page.asked == []
    assert page.handlers == []
    assert "script" not in page.tags
    assert "url(http" not in page.source
    assert "@import" not in page.source
    assert len(page.labels) == page.tags.count("svg")
    assert len(set(page.labels)) == len(page.labels)
    return page
