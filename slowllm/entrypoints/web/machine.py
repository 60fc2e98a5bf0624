"""What the machine does for the page: the plan, the disk, the memory, where the carousel is, and who rides."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import psutil

from slowllm.entrypoints.cost import cost_of
from slowllm.entrypoints.progress import duration
from slowllm.entrypoints.web.desk import Desk
from slowllm.entrypoints.web.words import carousel_html, paragraph, table_html
from slowllm.errors import counted
from slowllm.options import format_binary, format_bytes
from slowllm.planning.job import Rates
from slowllm.streaming.stops import Passage

# Rates are those of so many seconds, looked at so often at most.
_WINDOW_SECONDS, _LOOK_SECONDS = 10.0, 0.2


class MachineView:
    """Watches a model's carousel, and describes it in HTML. Thread-safe.

    Args:
        desk: of its service.
        rates: of this machine, as they were measured for the plan.
        budget_bytes: that the process may take.
    """

    def __init__(self, desk: Desk, rates: Rates, budget_bytes: int) -> None:
        self._desk, self._rates, self._budget_bytes = desk, rates, budget_bytes
        self._lock = threading.Lock()
        self._looks: deque[tuple[float, int]] = deque([(time.monotonic(), desk.lm.report.read_bytes)])
        self._top_at: float | None = None
        self._sweep_seconds: float | None = None
        self._owned = ExitStack()

    def __enter__(self) -> Self:
        self._owned.enter_context(self._desk.lm.watching(self._watch))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owned.close()

    def _watch(self, passage: Passage) -> None:
        if passage.stop != self._desk.lm.num_stops - 1:
            if passage.stop == 0 and self._top_at is None:
                self._top_at = time.monotonic()
            return
        now = time.monotonic()
        if self._top_at is not None:
            self._sweep_seconds = now - self._top_at
        # After a rest the next sweep begins at its first stop.
        self._top_at = now if self._desk.status().num_riding else None

    def read_rate(self) -> float:
        """Return the bytes that are read from the disk in a second, over the last seconds."""
        now, num_bytes = time.monotonic(), self._desk.lm.report.read_bytes
        with self._lock:
            if now - self._looks[-1][0] >= _LOOK_SECONDS:
                self._looks.append((now, num_bytes))
            while len(self._looks) > 2 and now - self._looks[0][0] > _WINDOW_SECONDS:
                self._looks.popleft()
            then, before = self._looks[0]
        return (num_bytes - before) / max(now - then, _LOOK_SECONDS)

    def plan_html(self) -> str:
        """Return the plan that the model was opened with, which does not change."""
        lm, plan, rates = self._desk.lm, self._desk.lm.plan, self._rates
        how = {True: "measured", False: "assumed"}
        resident = "everything, mapped from the page cache"
        if plan.streams:
            resident = f"{plan.held(len(lm.resident), lm.num_stops)}, {format_bytes(plan.resident_bytes)}, not read again"
        rows = [
            ("model", f"{lm.name}, {lm.part_name}, computed in {str(lm.model.dtype).removeprefix('torch.')}"),
            ("weights", f"{format_bytes(lm.weight_bytes)} a sweep in {counted(lm.num_stops, 'stop')}"),
            ("in memory", resident),
        ]
        if plan.ring_bytes:
            rows.append(("streamed", f"{plan.streamed} through a ring of {format_bytes(plan.ring_bytes)}"))
        if plan.expert_ring_bytes:
            rows.append(
                (
                    "experts",
                    f"when a router asks for them, through a ring of {format_bytes(plan.expert_ring_bytes)}",
                )
            )
        rows += [
            (
                "room",
                f"{counted(plan.sweep_tokens, 'token')} of all visitors, {plan.longest:,} in a text with its continuation",
            ),
            (
                "planned",
                f"{format_binary(plan.peak_bytes)} for the model, of {format_binary(self._budget_bytes)} for all",
            ),
            ("disk", f"{format_bytes(rates.disk)}/s ({how[rates.disk_measured]})"),
        ]
        return table_html(rows)

    def live_html(self, visitor: str) -> str:
        """Return where the carousel is, and who rides and waits.

        Args:
            visitor: who looks, and is shown as `you`.
        """
        lm, status = self._desk.lm, self._desk.status()
        place = "at rest" if status.stop is None else f"stop {status.stop + 1} of {status.num_stops}"
        if status.num_riding == 0:
            place = "at rest"
        ring = carousel_html(
            status.num_stops,
            status.stop if status.num_riding else None,
            range(status.num_stops) if not lm.plan.streams else lm.resident,
            [place, f"{status.num_riding} riding", f"{status.num_waiting} waiting"],
        )
        seconds = self._sweep_seconds
        facts = [
            (
                "sweeps",
                f"{status.num_sweeps:,}"
                + ("" if seconds is None else f", the last one in {duration(seconds)}"),
            ),
            ("tokens", f"{status.num_prompt_tokens:,} of prompts, {status.num_new_tokens:,} new"),
            ("room taken", f"{status.held_tokens:,} of {counted(status.max_tokens, 'token')}"),
            (
                "disk",
                f"{format_bytes(self.read_rate())}/s in the last {_WINDOW_SECONDS:g} s, {format_bytes(lm.report.read_bytes)} in all",
            ),
            (
                "resident set",
                f"{format_binary(psutil.Process().memory_info().rss)} now, {format_binary(lm.report.peak_rss_bytes)} at most, of "
                f"{format_binary(self._budget_bytes)}",
            ),
        ]
        if lm.swarm is not None:
            facts.append(("swarm", cost_of(lm)))
        riders = [
            (
                f"visitor {row.number}" + (" (you)" if row.visitor == visitor else ""),
                row.kind,
                row.num_riding,
                row.num_waiting,
                row.num_tokens,
            )
            for row in self._desk.rows()
        ]
        who = paragraph("Nobody rides.")
        if riders:
            who = table_html(riders, ("who", "wants", "ride", "wait", "new tokens"))
        return f'<div class="machine">{ring}<div>{table_html(facts)}{who}</div></div>'
