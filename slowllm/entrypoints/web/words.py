"""HTML of what the page shows: tokens with colours, bars, tables and the carousel. Whatever comes from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from slowllm.html import FULL_NATS, escaped, surprisal_style, visible

# More stops than this are drawn together.
_MOST_SEGMENTS = 120


@dataclass(frozen=True)
class ShownToken:
    """A token, and how likely it was.

    Attributes:
        text: of it.
        log_prob: natural logarithm of its probability; None where it is not known.
        likeliest: texts and log-probabilities of the likeliest tokens in its place.
    """

    text: str
    log_prob: float | None
    likeliest: tuple[tuple[str, float], ...] = ()


def paragraph(text: str, kind: str = "status") -> str:
    """Return a paragraph of a class of the page's style sheet."""
    return f'<p class="{kind}">{escaped(text)}</p>'


def tokens_html(tokens: Iterable[ShownToken]) -> str:
    """Return tokens, coloured by surprisal; the number, and what was likelier, is shown on hover."""
    return f'<div class="tokens">{"".join(map(_token_html, tokens))}</div>'


def _token_html(token: ShownToken) -> str:
    shown = visible(token.text)
    if token.log_prob is None:
        return f"<span>{shown}</span>"
    nats = -token.log_prob + 0.0
    lines = [f"surprisal {nats:.3f} nats, probability {math.exp(token.log_prob):.3g}"]
    lines += [f"{text!r} {math.exp(log_prob):.3g}" for text, log_prob in token.likeliest]
    return (
        f'<span class="token" data-nats="{nats:.3f}" style="{surprisal_style(token.log_prob)}" '
        f'title="{escaped(chr(10).join(lines))}">{shown}</span>'
    )


def scale_html() -> str:
    """Return the scale of the tokens' colours."""
    return (
        '<div class="scale">0 nats <span class="ramp"></span> '
        f"{FULL_NATS:g} nats or more; hover over a token for its number</div>"
    )


def bars_html(rows: Sequence[tuple[str, float, str]], best: int) -> str:
    """Return bars of probabilities.

    Args:
        rows: what each bar stands for, its share from 0 to 1, and a number in words.
        best: the index of the row that is emphasised.
    """
    lines = [
        f'<div class="bar{" best" if index == best else ""}"><span class="name">{escaped(name)}</span>'
        f'<span class="track"><span class="fill" style="width: {100 * share:.2f}%"></span></span>'
        f'<span class="share">{share:.4f}</span><span class="note">{escaped(note)}</span></div>'
        for index, (name, share, note) in enumerate(rows)
    ]
    return f'<div class="bars">{"".join(lines)}</div>'


def progress_html(share: float) -> str:
    """Return a bar of what is done, a share from 0 to 1."""
    return f'<div class="progress"><span style="width: {100 * share:.2f}%"></span></div>'


def table_html(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Return a table."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="facts">{f"<tr>{head}</tr>" if head else ""}{body}</table>'


def carousel_html(num_stops: int, stop: int | None, resident: Collection[int], inside: Sequence[str]) -> str:
    """Return the carousel as a ring of its stops, the one that was served last emphasised.

    Args:
        num_stops: of the carousel.
        stop: the last one served, from 0; None before the first.
        resident: those that are read once.
        inside: lines that are written in the ring.
    """
    num_segments = min(num_stops, _MOST_SEGMENTS)
    arcs = []
    for segment in range(num_segments):
        members = range(segment * num_stops // num_segments, (segment + 1) * num_stops // num_segments)
        kind = "resident" if all(one in resident for one in members) else "streamed"
        kind += " here" if stop is not None and stop in members else ""
        gap = min(0.2, 0.012 * num_segments) * math.tau / num_segments
        arcs.append(
            f'<path class="{kind}" d="{_arc(segment * math.tau / num_segments + gap / 2, (segment + 1) * math.tau / num_segments - gap / 2)}"/>'
        )
    first = 100 - 9 * (len(inside) - 1)
    texts = "".join(
        f'<text x="100" y="{first + 18 * line}" class="line{line}">{escaped(text)}</text>'
        for line, text in enumerate(inside)
    )
    return f'<svg class="carousel" viewBox="0 0 200 200" role="img" aria-label="carousel">{"".join(arcs)}{texts}</svg>'


def _arc(begin: float, end: float, outer: float = 96.0, inner: float = 80.0) -> str:
    """Return the path of a part of a ring, by its angles from the top."""

    def at(angle: float, radius: float) -> str:
        return f"{100 + radius * math.sin(angle):.2f} {100 - radius * math.cos(angle):.2f}"

    large = int(end - begin > math.pi)
    return (
        f"M {at(begin, outer)} A {outer} {outer} 0 {large} 1 {at(end, outer)} "
        f"L {at(end, inner)} A {inner} {inner} 0 {large} 0 {at(begin, inner)} Z"
    )
