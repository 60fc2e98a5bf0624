"""Open what `slowllm generate` works with: the model, what drafts for it, and the job's state; or plan it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cost import cost_of

if TYPE_CHECKING:
    from slowllm.inference.generation_types import Continuation, OnTokens, Prompt, Settings
    from slowllm.inference.speculative_loop import Acceptance
    from slowllm.planning.job import Job, Rates
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM


@dataclass
class GenerateWork:
    """The prompts of one call of the verb, the model that continues them, what drafts for it, and the job's state."""

    lm: StreamedLM
    prompts: Sequence[Prompt]
    job: Job
    rates: Rates
    draft: StreamedLM | Literal["lookup"] | None
    counts: Acceptance | None
    state: State | None

    def run(self, on_tokens: OnTokens | None = None) -> Iterator[tuple[Continuation, ...]]:
        """Yield the continuations of all prompts."""
        from slowllm.inference import generation, speculative

        if self.draft is None:
            return generation.generate(self.lm, self.prompts, on_tokens=on_tokens, state=self.state)
        return speculative.generate(
            self.lm, self.prompts, self.draft, rates=self.rates, counts=self.counts, on_tokens=on_tokens,
            state=self.state,
        )  # fmt: skip

    def summarise(self, seconds: float) -> None:
        """Print to stderr what it cost."""
        from slowllm.entrypoints.progress import duration

        line = f"{cost_of(self.lm)} in {duration(seconds)}"
        if (counts := self.counts) is not None:
            unit = "sweep" if self.lm.swarm is None else "pass"
            line += f"; {counts.tokens_per_pass:.2f} tokens a {unit} and continuation"
            if counts.num_drafted:
                line += f", {counts.num_accepted:,} of {counts.num_drafted:,} drafted tokens accepted"
            if counts.num_plain:
                line += f", nothing drafted in {counts.num_plain:,} of {counts.num_passes:,} passes"
        print(line, file=sys.stderr)


@contextlib.contextmanager
def open_work(
    runner: Runner, prompts: Sequence[Prompt], settings: Settings, draft: str | None
) -> Iterator[GenerateWork]:
    """Open the model, and the draft model if one is named, within one budget; and the job's state."""
    import psutil

    from slowllm.inference import generation, speculative
    from slowllm.inference.speculative_loop import Acceptance
    from slowllm.planning.budget import Budget
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.memory import budget_bytes
    from slowllm.runtime.run_identity import batch_identity, digest_of

    info, rates = runner.info, runner.rates

    def opened_state(lm: StreamedLM, drafter: StreamedLM | str | None) -> State | None:
        def describe() -> dict[str, Any]:
            name = drafter if drafter is None or isinstance(drafter, str) else drafter.fingerprint()
            return batch_identity(
                "generate", lm,
                prompts=digest_of(prompt.ids for prompt in prompts),
                settings=asdict(settings),
                draft=name,
            )  # fmt: skip

        return stack.enter_context(runner.resuming(describe))

    with contextlib.ExitStack() as stack:
        budget = Budget(budget_bytes(runner.ram), psutil.Process().memory_info().rss)
        if draft is None:
            job = generation.job_of(info, prompts, rates, runner.begun)
            lm = stack.enter_context(runner.open(job, budget))
            yield GenerateWork(lm, prompts, job, rates, None, None, opened_state(lm, None))
            return
        job = _speculative_job(runner, prompts, settings)
        drafter: StreamedLM | Literal["lookup"] = "lookup"
        if draft != "lookup":
            # First, because the streamed model takes all the memory that is left.
            drafter = stack.enter_context(
                speculative.load_draft(info, ModelInfo(draft), prompts, budget, runner.dtype)
            )
        lm = stack.enter_context(runner.open(job, budget))
        yield GenerateWork(lm, prompts, job, rates, drafter, Acceptance(), opened_state(lm, drafter))


def _speculative_job(runner: Runner, prompts: Sequence[Prompt], settings: Settings) -> Job:
    """Return the job with drafts.

    Raises:
        InputError: nothing can be drafted with these settings or this model.
    """
    from slowllm.inference import speculative

    speculative.check_settings(settings)
    speculative.refuse_soft_prompt(runner.info)
    speculative.refuse_uncroppable(runner.info)
    return speculative.job_of(runner.info, prompts, runner.rates, runner.begun)


def print_plan(
    runner: Runner, prompts: Sequence[Prompt], settings: Settings, draft: str | None, as_json: bool
) -> None:
    """Print the plan of the job; a draft model is opened for it, because it takes a part of the budget."""
    import psutil

    from slowllm.inference import generation, speculative
    from slowllm.planning.budget import Budget
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.memory import budget_bytes

    if draft is None:
        runner.print_plan(
            generation.job_of(runner.info, prompts, runner.rates, runner.begun), as_json=as_json
        )
        return
    job, reserved_bytes = _speculative_job(runner, prompts, settings), 0
    if draft != "lookup":
        budget = Budget(budget_bytes(runner.ram), psutil.Process().memory_info().rss)
        with speculative.load_draft(runner.info, ModelInfo(draft), prompts, budget, runner.dtype) as drafter:
            reserved_bytes = drafter.plan.peak_bytes
    runner.print_plan(job, as_json=as_json, reserved_bytes=reserved_bytes)
