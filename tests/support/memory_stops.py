"""Stops that lie in memory and record what a carousel does with them, and what riders in tests do."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Weights

Job = Callable[[], Any]


class MemoryStops:
    """Stops whose one weight is their number. Keeps book of what the carousel does with them."""

    def __init__(self, num_stops: int) -> None:
        self.num_stops = num_stops
        self.visited: list[int] = []
        self.expected: list[list[int]] = []
        self.broken: dict[int, BaseException] = {}
        self.cannot_be_left: dict[int, BaseException] = {}
        self.threads: set[int] = set()
        self.held = False

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        assert not self.held, "one stop at a time"
        self.threads.add(threading.get_ident())
        self.visited.append(stop)
        self.expected.append(list(upcoming))
        if stop in self.broken:
            raise self.broken[stop]
        self.held = True
        weight = torch.tensor(stop)
        try:
            yield {"number": weight}
        finally:
            self.held = False
            weight.fill_(-1)  # whoever keeps it sees that it is overwritten
        if stop in self.cannot_be_left:
            raise self.cannot_be_left[stop]


def number(weights: Weights) -> int:
    return int(weights["number"])


def sweep(carousel: Carousel, num_stops: int, *, back: bool = False) -> list[int]:
    """Pass through all stops, and back; return their numbers as the weights had them."""
    seen = [carousel.visit(stop, "up", number, comes_back=back) for stop in range(num_stops)]
    if back:
        seen += [carousel.visit(stop, "down", number) for stop in reversed(range(num_stops))]
    return seen


def results_of(stream: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Return the results of a stream without its jobs."""
    return [result for _, result in stream]


# The fixture `make`: makes a carousel and its stops.
Make = Callable[..., tuple[Carousel, MemoryStops]]


class Big:
    """Something of which it matters that it goes."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def draw() -> float:
    """Draw from torch's global generator."""
    return float(torch.rand(()))
