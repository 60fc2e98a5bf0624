"""HTML of results: pure functions from texts and numbers. Whatever comes from outside is escaped.

What they return stands in a notebook or on a page of either theme: it has no reference to elsewhere, text keeps the
page's colour, and backgrounds are translucent.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

# The surprisal, in nats, from which on a token has the full colour.
FULL_NATS = 10.0
# Wide enough for a trend, low enough for a row of a table.
_LINE_WIDTH, _LINE_HEIGHT = 240, 48


def escaped(text: object) -> str:
    """Return a text that stands in HTML for itself."""
    return html.escape(str(text))


def surprisal_style(log_prob: float) -> str:
    """Return the style of a token by the natural logarithm of its probability: the less likely, the redder."""
    nats = -log_prob + 0.0
    share = 1.0 if math.isnan(nats) else min(1.0, max(0.0, nats / FULL_NATS))
    return f"background-color: rgba(224, 80, 32, {share * 0.8:.3f})"


def visible(text: str) -> str:
    """Return a token's text, escaped, in which a line break can be seen."""
    return escaped(text).replace("\n", "&crarr;\n") or "&middot;"


def surprisal_html(texts: Iterable[str], log_probs: Iterable[float]) -> str:
    """Return tokens coloured by their surprisal, which is shown on hover."""
    spans = [
        f'<span style="{surprisal_style(log_prob)}" title="surprisal {-log_prob + 0.0:.3f} nats, '
        f'probability {math.exp(log_prob):.3g}">{visible(text)}</span>'
        for text, log_prob in zip(texts, log_probs, strict=True)
    ]
    return f'<span style="white-space: pre-wrap">{"".join(spans)}</span>'


def text_html(text: str) -> str:
    """Return a text with its blanks and line breaks."""
    return f'<span style="white-space: pre-wrap">{escaped(text)}</span>'


def table_html(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return a table of cells that are HTML already; the header is text."""

    def row(cells: Iterable[str], kind: str) -> str:
        inside = "".join(f'<{kind} style="text-align: left">{cell}</{kind}>' for cell in cells)
        return f"<tr>{inside}</tr>"

    head = row(map(escaped, header), "th") if header else ""
    return f"<table>{head}{''.join(row(cells, 'td') for cells in rows)}</table>"


def facts_html(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """Return a title over a table of names and values."""
    return f"<div><b>{escaped(title)}</b>{table_html((escaped(name), escaped(value)) for name, value in facts)}</div>"


def progress_html(share: float) -> str:
    """Return a bar of what is done, a share from 0 to 1."""
    return f'<progress value="{min(1.0, max(0.0, share)):.4f}" max="1"></progress>'


def line_html(values: Sequence[float], name: str) -> str:
    """Return a curve of numbers in the colour of text, from the left to the right; nothing of fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    across, up = (_LINE_WIDTH - 4) / (len(finite) - 1), (_LINE_HEIGHT - 4) / ((high - low) or 1.0)
    points = " ".join(
        f"{2 + number * across:.1f},{_LINE_HEIGHT - 2 - (value - low) * up:.1f}"
        for number, value in enumerate(finite)
    )
    return (
        f'<svg width="{_LINE_WIDTH}" height="{_LINE_HEIGHT}" role="img" aria-label="{escaped(name)}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
    )
