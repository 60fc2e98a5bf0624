"""The page over a small model, served on the loopback in the tests' own process, and a browser to look at it with."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import slowllm
from slowllm.entrypoints.listening import listening_at, url_of
from slowllm.entrypoints.web.answers import Shown
from slowllm.entrypoints.web.desk import Desk
from slowllm.entrypoints.web.machine import MachineView
from slowllm.entrypoints.web.running import PageServer, quiet_gradio
from slowllm.inference.service import Service
from slowllm.planning.job import Rates
from slowllm.streaming.stops import Passage

MAX_ROWS = 16


class Gate:
    """Keeps the carousel at a stop while it is closed."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self, _: Passage) -> None:
        assert self._open.wait(60), "nobody has opened the gate"


@dataclass(frozen=True)
class Counter:
    """A desk over a small model, and what is behind it."""

    lm: Any
    desk: Desk
    service: Service
    gate: Gate
    machine: MachineView


@contextlib.contextmanager
def counter(max_waiting: int = 64) -> Iterator[Counter]:
    """Open the embedded model, every block streamed, and a desk over its service."""
    job = slowllm.Job(num_tokens=4096, longest=512, repeated=True)
    gate = Gate()
    with (
        slowllm.load("embedded:tiny-bloom", dtype="float32", resident=False, job=job) as lm,
        lm.watching(gate.pass_through),
        Service(lm, max_rows=MAX_ROWS, max_waiting=max_waiting) as service,
    ):
        desk = Desk(lm, service, MAX_ROWS)
        with MachineView(desk, Rates(), 1 << 32) as machine:
            try:
                yield Counter(lm, desk, service, gate, machine)
            finally:
                gate.open()


@contextlib.contextmanager
def served_page(opened: Counter) -> Iterator[str]:
    """Serve the page at a free port; yield its address."""
    with quiet_gradio() as folder, listening_at("127.0.0.1", 0) as bound:
        from slowllm.entrypoints.web.page import page_app

        (folder / "results").mkdir()
        app, end_streams = page_app(opened.desk, opened.machine, folder / "results")
        with PageServer(app, bound, end_streams):
            yield url_of(bound)
            opened.gate.open()
            opened.service.drain(0.0)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless Chromium; skip where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


async def _all_of(answers: AsyncIterator[Shown]) -> list[Shown]:
    return [shown async for shown in answers]


def all_of(answers: AsyncIterator[Shown]) -> list[Shown]:
    """Return all that an answer shows, until it is over."""
    return asyncio.run(_all_of(answers))


def result_of(shown: Shown) -> Path:
    """Return the file that can be downloaded."""
    assert shown.file is not None
    return shown.file
