"""The page: what is text stays text, and what is left out is said."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="the page is made with jinja2")

from slowllm.entrypoints.report.page import (
    MAX_CELL_LETTERS,
    MAX_ROWS,
    PlotShown,
    ReportPage,
    Section,
    TableRows,
    TextShown,
    TokenShown,
    render,
)
from tests.support.reports import ReadReport, read_report

NASTY = "</svg><script>alert(1)</script><img src=http://example.org onerror=x>\"'&{{ 7 * 7 }}"


def shown(page: ReportPage, folder: Path) -> ReadReport:
    (folder / "page.html").write_bytes(render(page))
    return read_report(folder / "page.html")  # type: ignore[no-any-return]


def test_every_text_is_escaped(tmp_path: Path) -> None:
    rows = TableRows([NASTY], NASTY)
    rows.add(NASTY)
    token = TokenShown(NASTY, 1.0)
    section = Section(
        NASTY, [NASTY], [(NASTY, NASTY)], [PlotShown('<svg aria-label="plot"></svg>', NASTY)],
        [TextShown(NASTY, [token, TokenShown(NASTY, None)])], NASTY, [rows.shown()], NASTY,
    )  # fmt: skip
    page = shown(ReportPage(NASTY, NASTY, [section], NASTY), tmp_path)
    assert page.tags.count("svg") == 1
    assert "img" not in page.tags
    # Title twice, command, warning; of the section title, sentence, name and value of a figure, two captions, place and two
    # tokens of a text, header and cell of a table, and what stands as it is.
    assert page.text.count(NASTY) == 16
    assert "49" not in page.source


def test_long_tables_say_how_many_rows_there_are(tmp_path: Path) -> None:
    rows = TableRows(["number", "text"], "lines")
    for number in range(1234):
        rows.add(number, "x" * 1000)
    assert rows.is_full
    page = shown(ReportPage("t", "c", [Section("s", tables=[rows.shown()])]), tmp_path)
    assert page.tags.count("td") == 2 * MAX_ROWS
    assert f"The first {MAX_ROWS} of 1,234 lines:" in page.text
    assert "x" * MAX_CELL_LETTERS not in page.text


def test_bytes_that_are_no_text_do_not_keep_a_page_from_being_written(tmp_path: Path) -> None:
    assert "slowllm ? x" in shown(ReportPage("t", "slowllm \udcff x", []), tmp_path).text


def test_colours_are_stronger_where_a_token_is_more_surprising() -> None:
    alphas = [TokenShown("a", nats).alpha for nats in (None, -0.1, 0.0, 3.0, 12.0, 99.0)]
    assert alphas == pytest.approx([0.0, 0.0, 0.0, 0.2, 0.8, 0.8])


def test_numbers_are_written_for_people_and_stand_on_the_right(tmp_path: Path) -> None:
    rows = TableRows(["a"], "rows")
    for cell in (1234.5, 1e300, float("nan"), float("inf"), None, 7, "7 of 9"):
        rows.add(cell)
    table = rows.shown()
    assert [row[0] for row in table.rows] == ["1,234.5000", "1e+300", "-", "inf", "-", "7", "7 of 9"]
    page = shown(ReportPage("t", "c", [Section("s", tables=[table])]), tmp_path)
    assert page.source.count('<td class="number">') == 5
