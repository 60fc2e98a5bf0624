"""What a verb plans for that serves asks of others, and opens the model for: the most tokens that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slowllm.errors import PlanError

if TYPE_CHECKING:
    from slowllm.entrypoints.cli.runner import Runner
    from slowllm.planning.budget import Budget
    from slowllm.planning.job import Job
    from slowllm.runtime.streamed_lm import StreamedLM

# Tokens of all asks together, of which the most that fit are planned for by default.
TOTALS = (8192, 4096, 2048, 1024, 512)
CONTEXT = 2048


def service_jobs(
    runner: Runner, context: int | None, max_tokens: int | None, max_rows: int, kept_tokens: int | None
) -> list[Job]:
    """Return jobs for the plan, of which the first that fits is taken.

    Args:
        runner: of the verb.
        context: tokens of the longest text with its answer; None for what the model takes, at most `CONTEXT`.
        max_tokens: of all asks at once; None for the most of `TOTALS` that fit.
        max_rows: that are continued at once.
        kept_tokens: whose keys and values are kept behind answers; None for half of `max_tokens`.
    Raises:
        InputError: the numbers do not go together, or the model takes no texts of that length.
    """
    from dataclasses import replace

    from slowllm.inference.service_types import service_job
    from slowllm.inference.text import max_line_tokens
    from slowllm.planning.host_plan import MIN_RIDER_TOKENS, padding_worth

    info = runner.info
    longest = min(CONTEXT, max_line_tokens(info)) if context is None else context
    totals = [tokens for tokens in TOTALS if context is None or tokens >= context] or [longest]
    # By default, sequences are shorter where there is no room for more.
    jobs = [
        service_job(
            info,
            tokens,
            min(longest, tokens) if context is None else longest,
            max_rows,
            tokens // 2 if kept_tokens is None else kept_tokens,
        )
        for tokens in (totals if max_tokens is None else [max_tokens])
    ]
    if max_tokens is not None:
        longest = jobs[0].longest
        # As many as were asked for, or none.
        rider_tokens = min(max_tokens, max(longest, MIN_RIDER_TOKENS))
        jobs = [replace(jobs[0], packing=(rider_tokens, max_tokens, padding_worth(runner.rates)))]
    return jobs


def open_first(runner: Runner, jobs: Sequence[Job], budget: Budget) -> tuple[StreamedLM, Job]:
    """Open the model for the first job that fits a budget; return that job, too. The caller closes the model.

    Raises:
        PlanError: none fits; it says what would do for the last.
    """
    for job in jobs:
        try:
            return runner.open(job, budget), job
        except PlanError:
            if job is jobs[-1]:
                raise
    raise AssertionError("there is a job")
