"""Stops of a model that fits the budget: memory maps, no copies, no reads of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.spans import Placement
from slowllm.streaming.buffers import PAGE
from slowllm.streaming.reader import Reader
from slowllm.streaming.stops import Weights


class MappedStops:
    """Serve stops from memory maps: for a model that fits the budget, no copies and no reads of our own.

    What no map can hold (fused experts, tensors at odd addresses) is read once, at the first visit.

    A shard that is cut short is refused at the next visit. Cut during one, it ends the process (SIGBUS).
    """

    def __init__(self, checkpoint: Checkpoint, stops: Sequence[Sequence[Placement]]) -> None:
        self.num_stops = len(stops)
        self._checkpoint, self._stops = checkpoint, stops
        self._mapped: list[dict[str, Tensor]] = []
        rest: list[list[Placement]] = []
        for stop in stops:
            tensors = {p.name: checkpoint.mapped(p) for p in stop}
            self._mapped.append({name: tensor for name, tensor in tensors.items() if tensor is not None})
            rest.append([p for p in stop if tensors[p.name] is None])
        resident = frozenset(range(len(stops)))
        self._rest = Reader(rest, ring_bytes=PAGE, resident=resident, num_threads=4 if any(rest) else 1)
        self.stats = self._rest.stats

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a stop; see `Reader.visit`."""
        mapped = self._mapped  # before the rest is asked, which refuses once they are let go
        with self._rest.visit(stop, upcoming) as rest:
            for placement in self._stops[stop]:
                self._checkpoint.check_length(placement)
            yield {**mapped[stop], **rest}

    def close(self) -> None:
        """Let go of the maps."""
        self._rest.close()
        self._mapped = []
