"""Stops of a model that fits the budget: memory maps, no copies, no reads of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.spans import Placement, Run
from slowllm.streaming.buffers import PAGE
from slowllm.streaming.mapped_pages import STOPS_AHEAD, MappedPages
from slowllm.streaming.reader import Reader
from slowllm.streaming.stops import StopRead, Weights


class MappedStops:
    """Serve stops from memory maps: for a model that fits the budget, no copies and no reads of our own.

    On the first sweep, a thread has the kernel read the pages of the next stops; see `mapped_pages`.

    What no map can hold (fused experts, tensors at odd addresses) is read once, at the first visit.

    A shard that is cut short is refused at the next visit. Cut during one, it ends the process (SIGBUS).
    """

    def __init__(self, checkpoint: Checkpoint, stops: Sequence[Sequence[Placement]]) -> None:
        self.num_stops = len(stops)
        self._checkpoint = checkpoint
        self._mapped: list[dict[str, Tensor]] = []
        rest: list[list[Placement]] = []
        # Of each stop, the run that reaches furthest in each file: where its bytes are, so are the others'.
        self._furthest: list[list[Run]] = []
        for stop in stops:
            tensors = {p.name: checkpoint.mapped(p) for p in stop}
            self._mapped.append({name: tensor for name, tensor in tensors.items() if tensor is not None})
            rest.append([p for p in stop if tensors[p.name] is None])
            runs = sorted((run for p in stop for run in p.runs), key=lambda run: run.end)
            self._furthest.append(list({run.span.path: run for run in runs}.values()))
        self._has_rest = [bool(placements) for placements in rest]
        resident = frozenset(range(len(stops)))
        self._rest = Reader(rest, ring_bytes=PAGE, resident=resident, num_threads=4 if any(rest) else 1)
        self.stats = self._rest.stats
        self._pages = MappedPages([stop.values() for stop in self._mapped])

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a stop; see `Reader.visit`."""
        mapped = self._mapped  # before the rest is asked, which refuses once they are let go
        with self._rest.visit(stop, upcoming) as rest:
            self._checkpoint.check_runs(self._furthest[stop])
            self._pages.fetch([stop, *upcoming[:STOPS_AHEAD]])
            yield {**mapped[stop], **rest}

    @property
    def on_read(self) -> Callable[[StopRead], None] | None:
        """Called with each stop whose rest has been read; see `Reader`."""
        return self._rest.on_read

    @on_read.setter
    def on_read(self, watcher: Callable[[StopRead], None] | None) -> None:
        """Have it called from now on."""
        self._rest.on_read = watcher

    def held_weights(self, stop: int) -> Weights | None:
        """Return the maps of a stop that is all in maps; None for another one, and after `close`.

        Raises:
            CheckpointError: a shard was cut short.
        """
        mapped = self._mapped
        if not mapped or self._has_rest[stop]:
            return None
        self._checkpoint.check_runs(self._furthest[stop])
        self._pages.fetch(range(stop, min(stop + 1 + STOPS_AHEAD, self.num_stops)))
        return mapped[stop]

    def close(self) -> None:
        """Let go of the maps."""
        self._rest.close()
        self._pages.close()
        self._mapped = []
