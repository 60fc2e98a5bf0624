"""Follow a run, take its results, and write the report of it at the end.

A verb enters `reporting` before it opens its model, `RunReport.watching` when it is open, and hands every result to
`RunReport.add`. Without a file all of that does nothing. The page is made when the model is closed.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slowllm.entrypoints.report.chapters import Chapter, chapter_for, sections_of
from slowllm.entrypoints.report.figures import RunFigures, measured_of, plan_of, sections_of_run
from slowllm.entrypoints.report.page import ReportPage, Section, render
from slowllm.entrypoints.report.results import PromptContinued, Result
from slowllm.entrypoints.report.timeline import Timeline
from slowllm.errors import InputError, SlowLLMError, first_line
from slowllm.files import replace_file, system_errors
from slowllm.version import __version__

if TYPE_CHECKING:
    from slowllm.planning.job import Job
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM

_VERSIONS = ("torch", "transformers", "safetensors", "numpy")


class RunReport:
    """What is known so far of a run, for its report.

    Args:
        file: where the report goes; None where none is wanted.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._runs: list[RunFigures] = []
        self._chapters: dict[type[Any], Chapter] = {}
        self._tokenizer: Any = None
        self._timeline: Timeline | None = None
        self._num_ids: dict[tuple[int, int], int] = {}
        self._num_prompts = 0

    def __bool__(self) -> bool:
        """Whether a report is wanted."""
        return self._file is not None

    @property
    def has_begun(self) -> bool:
        """Whether a model was opened, or a result has come."""
        return bool(self._runs or self._chapters)

    def add(self, result: Result) -> None:
        """Take a result."""
        if self._file is None:
            return
        chapter = self._chapters.get(type(result))
        if chapter is None:
            chapter = self._chapters[type(result)] = chapter_for(result, self._decode)
        chapter.add(result)
        if isinstance(result, PromptContinued):  # its tokens have all come
            for index in range(len(result.continuations)):
                self._num_ids.pop((self._num_prompts, index), None)
            self._num_prompts += 1

    def on_tokens(self, number: int, index: int, ids: tuple[int, ...]) -> None:
        """Count the new tokens of a prompt; as `OnTokens`."""
        before = self._num_ids.get((number, index), 0)
        if self._timeline is not None and len(ids) > before:
            self._timeline.on_tokens(len(ids) - before)
            self._num_ids[number, index] = len(ids)

    @contextlib.contextmanager
    def watching(
        self, lm: StreamedLM, job: Job, state: State | None = None, *, title: str = ""
    ) -> Iterator[None]:
        """Follow what a model does, as long as the context lasts.

        Args:
            lm: opened for the job.
            job: what the plan was made for.
            state: in which an earlier process may have left results.
            title: of this part of the run, where it has several.
        """
        if self._file is None:
            yield
            return
        self._tokenizer = lm.tokenizer
        timeline = self._timeline = Timeline(lm.num_stops)
        plan = plan_of(lm, job, 0 if state is None else state.num_resumed)
        before, started, seconds = lm.report, time.perf_counter(), 0.0
        try:
            with lm.watching(timeline.on_passage), lm.watching_reads(timeline.on_read):
                yield
                seconds = time.perf_counter() - started
                timeline.wait_for(lm.report.num_passages - before.num_passages)
        finally:
            seconds = seconds or time.perf_counter() - started
            timeline.finish()
            measured = measured_of(lm, before, seconds, timeline)
            self._runs.append(RunFigures(title, plan, measured, timeline, lm.swarm is None))

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def page(self, title: str, command: str, warning: str = "") -> ReportPage:
        """Return the page of what is known so far."""
        sections: list[Section] = []
        for run in self._runs:
            sections += sections_of_run(run)
        about = Section("Program")
        about.figures = program_figures()
        # Results first: that is what the run was for.
        results = sections_of(list(self._chapters.values()))
        return ReportPage(title, command, [*sections[:1], *results, *sections[1:], about], warning)

    def write(self, title: str, command: str, warning: str = "") -> None:
        """Write the page, whole.

        Raises:
            InputError: the file cannot be written.
        """
        assert self._file is not None, "without a file there is nothing to write"
        write_page(self._file, self.page(title, command, warning))


def write_page(file: Path, page: ReportPage) -> None:
    """Write a page so that the file is the old one or the new one.

    Raises:
        InputError: it cannot be written.
    """
    content = render(page)
    with system_errors(InputError, file):
        replace_file(file, content)


@contextlib.contextmanager
def reporting(file: Path | None, title: str) -> Iterator[RunReport]:
    """Yield what collects a run; at its end, or after Ctrl-C or an error in it, write the report of it.

    To be entered before the model is opened, because the page is made in memory that the budget does not count.

    Args:
        file: from `check_report`; None where no report is wanted.
        title: of the page.
    Raises:
        InputError: the file cannot be written.
    """
    report = RunReport(file)
    try:
        yield report
    except (KeyboardInterrupt, SlowLLMError) as error:
        if report and report.has_begun:
            why = (
                "was interrupted"
                if isinstance(error, KeyboardInterrupt)
                else f"ended with an error: {first_line(error)}"
            )
            # The error that ends the run is the one that is raised.
            try:
                report.write(title, command_line(), f"This run {why}. The report has what was there by then.")
            except InputError as failed:
                print(f"slowllm: there is no report: {failed}", file=sys.stderr)
        raise
    if report and report.has_begun:
        report.write(title, command_line())
    elif report:
        print("slowllm: nothing was computed, so there is no report", file=sys.stderr)


def command_line() -> str:
    """Return the command that this process was called with, as a shell takes it."""
    return shlex.join(["slowllm", *sys.argv[1:]])


def program_figures(extra: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Return the versions, the machine and the time, as names and values."""
    found = [("slowllm", __version__), ("Python", platform.python_version())]
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found.append((name, version(name)))
    now = datetime.datetime.now(datetime.UTC)
    machine = f"{platform.system()} {platform.machine()}"
    return [*found, ("machine", machine), *extra, ("written", now.strftime("%Y-%m-%d %H:%M UTC"))]
