"""Put figures, plots and tables into one page of HTML that needs no other file, no network and no script.

Knows no model. Every text is escaped but the SVG of `plots`; the page's own policy forbids scripts and requests besides.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

# Rows of a table that are shown; a sentence says how many there are.
MAX_ROWS = 200
MAX_CELL_LETTERS = 600
# From here on a number is written with an exponent.
LARGE = 1e7


@dataclass(frozen=True)
class TableShown:
    """A table: of named figures where it has no header.

    Attributes:
        header: names of the columns.
        rows: the first ones; what is a number stands on the right.
        num_rows: how many there are in all, those that are left out included.
        noun: what a row is, in the plural.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_rows: int = 0
    noun: str = "rows"

    @property
    def is_cut(self) -> bool:
        """Whether rows are left out."""
        return self.num_rows > len(self.rows)


@dataclass(frozen=True)
class PlotShown:
    """A plot.

    Attributes:
        svg: from `plots`; the only part of a page that is not escaped.
        caption: says what is to be seen.
    """

    svg: str
    caption: str


@dataclass(frozen=True)
class TokenShown:
    """A token in a text that is coloured by surprisal; None where it is not scored."""

    text: str
    nats: float | None

    @property
    def alpha(self) -> float:
        """How strong its colour is, from 0 to 0.8; full from 12 nats on."""
        return 0.0 if self.nats is None else min(1.0, max(0.0, self.nats) / 12) * 0.8


@dataclass(frozen=True)
class TextShown:
    """A text whose tokens are coloured."""

    where: str
    tokens: Sequence[TokenShown]


@dataclass
class Section:
    """A part of a page; what is empty is left out."""

    title: str
    sentences: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    plots: list[PlotShown] = field(default_factory=list)
    texts: list[TextShown] = field(default_factory=list)
    text_caption: str = ""
    tables: list[TableShown] = field(default_factory=list)
    verbatim: str = ""


@dataclass(frozen=True)
class ReportPage:
    """What a page shows.

    Attributes:
        title: of the run.
        command: that was called.
        sections: in order.
        warning: a sentence that stands above all, where the run did not come to its end.
    """

    title: str
    command: str
    sections: Sequence[Section]
    warning: str = ""


class TableRows:
    """The first rows of a table of any length.

    Args:
        header: names of the columns.
        noun: what a row is, in the plural.
    """

    def __init__(self, header: Sequence[str], noun: str) -> None:
        self._header, self._noun = header, noun
        self._rows: list[list[str]] = []
        self.num_rows = 0

    @property
    def is_full(self) -> bool:
        """Whether further rows are only counted."""
        return self.num_rows >= MAX_ROWS

    def add(self, *cells: object) -> None:
        """Add a row; of very long texts only the beginning."""
        if not self.is_full:
            self._rows.append([_cell(cell) for cell in cells])
        self.num_rows += 1

    def shown(self) -> TableShown:
        """Return the table."""
        return TableShown(self._header, self._rows, self.num_rows, self._noun)


def _cell(cell: object) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    text = str(cell)
    if isinstance(cell, float):
        text = f"{cell:,.4f}" if abs(cell) < LARGE else f"{cell:.4g}"
    return text if len(text) <= MAX_CELL_LETTERS else text[: MAX_CELL_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


@functools.cache
def _template() -> str:
    return files("slowllm.entrypoints.report").joinpath("template.html.j2").read_text(encoding="utf-8")


def render(page: ReportPage) -> bytes:
    """Return the page in UTF-8; bytes of a command line that are no UTF-8 become question marks."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["is_number"] = _is_number
    text = environment.from_string(_template()).render(page=page)
    return text.encode("utf-8", "replace")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-|-?[\d,]+(\.\d+)?(e[+-]\d+)?", text) is not None
