"""The list of results that a call of the Python API returns: a list in all, and a table in a notebook."""

from __future__ import annotations

from typing import Any, SupportsIndex, TypeVar, overload

from slowllm.html import escaped, table_html, text_html
from slowllm.inference.generation_types import Continuation
from slowllm.inference.likelihood import Likelihood

T = TypeVar("T")

# A longer list is cut in a notebook.
MOST_ROWS = 50


class Results(list[T]):
    """A list that a notebook shows as a table. It equals a list, is pickled as one, and its slices are `Results`."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...

    @overload
    def __getitem__(self, index: slice[Any, Any, Any]) -> Results[T]: ...

    def __getitem__(self, index: SupportsIndex | slice[Any, Any, Any]) -> T | Results[T]:
        if isinstance(index, slice):
            return Results(super().__getitem__(index))
        return super().__getitem__(index)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(self),)

    def _repr_html_(self) -> str:
        shown = self[:MOST_ROWS]
        cells = [row for number, result in enumerate(shown) for row in _rows(number, result)]
        names = [name for name, _ in cells[0]] if cells else []
        more = f"<div>and {len(self) - MOST_ROWS:,} more</div>" if len(self) > MOST_ROWS else ""
        if not cells:
            return "<div>no results</div>"
        return f"<div>{table_html([[cell for _, cell in row] for row in cells], names)}{more}</div>"


def _rows(number: int, result: Any) -> list[list[tuple[str, str]]]:
    """Return the rows of a result: names of columns, each with a cell that is HTML."""
    if isinstance(result, Likelihood):
        columns = [("text", result.tokens_html), *_escaped(result.figures())]
        return [[("", str(number)), *columns]]
    if isinstance(result, tuple) and result and all(isinstance(one, Continuation) for one in result):
        return [
            [("", str(number)), ("continuation", text_html(one.text)), *_escaped(one.figures())]
            for one in result
        ]
    figures = getattr(result, "figures", None)
    if callable(figures):
        return [[("", str(number)), *_escaped(figures())]]
    return [[("", str(number)), ("result", escaped(repr(result)))]]


def _escaped(figures: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, escaped(value)) for name, value in figures]
