"""Tune soft prompts on a model that does not fit in memory: each step is a sweep up and down for all its examples.

The examples of a step, for all trials, are riders of one sweep. Each rider goes up, computes its losses in one pass over
the head, and comes down. The next step begins with the block at which they arrive, and validation rides up with it.
Where only the top blocks are tuned, the frozen blocks below are passed once for all steps, and the model is then opened
anew for the top alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from torch import Tensor

from slowllm.errors import PlanError, SlowLLMError, StateError, TuningError
from slowllm.modeling.soft_prompt_files import check_folder, save_prompt
from slowllm.options import parse_dtype
from slowllm.planning.budget import Budget
from slowllm.planning.job import WHOLE_BLOCKS, Job, Rates
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.memory import budget_bytes
from slowllm.runtime.rates import quick_rates
from slowllm.runtime.run_identity import run_identity
from slowllm.runtime.state import State, read_job
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.hints import Reach
from slowllm.tuning.frozen_activations import FrozenActivations
from slowllm.tuning.initialization import above, starts_of
from slowllm.tuning.passes import MAX_RIDERS, Learned, judgement, pass_frozen_blocks, step_of
from slowllm.tuning.step_jobs import RIDER_TOKENS, TrialPlan, frozen_job, row_tokens, step_job, trial_bytes
from slowllm.tuning.trial import Trial, restored_start
from slowllm.tuning.tuned import Record, Tuned

log = logging.getLogger(__name__)

# Share of the budget that the output of frozen blocks may take before it goes to a file.
FROZEN_SHARE = 0.125
# How long the prompts in the folder of results may lag behind.
SAVE_SECONDS = 30.0

if TYPE_CHECKING:
    from slowllm.swarm.client import SwarmOptions

# Called with a model, its job, the phase in words, and the peak memory of the process.
OnOpen = Callable[[StreamedLM, Job, str, int], Any]


@dataclass(frozen=True)
class RunOptions:
    """The options of `tune` that say how a run computes, and where its results go."""

    ram: str | int = "auto"
    device: str = "cpu"
    vram: str | int | None = None
    dtype: str = "auto"
    keep_resident: bool = True
    out: str | os.PathLike[str] | None = None
    state: str | os.PathLike[str] | None = None
    on_open: OnOpen | None = None
    on_record: Callable[[Record], Any] | None = None
    swarm: str | Sequence[str] | SwarmOptions | None = None


@dataclass(frozen=True)
class Phase:
    """A part of a run for which the model is opened anew.

    Attributes:
        name: in words.
        jobs: of one of which it consists, the one with the largest micro-batches first; the first that fits counts.
        reserved_bytes: of the budget, what the run holds beside the model.
    """

    name: str
    jobs: tuple[Job, ...]
    reserved_bytes: int


class Session:
    """One run of `tune_tasks`."""

    def __init__(self, info: ModelInfo, plans: Sequence[TrialPlan], options: RunOptions) -> None:
        self.info, self.plans, self.options = info, list(plans), options
        self.ram_bytes, self.dtype = budget_bytes(options.ram), options.dtype
        self.out = None if options.out is None else Path(options.out).expanduser()
        self.state_folder = None if options.state is None else Path(options.state).expanduser()
        config, top = info.config.get_text_config(), plans[0][2].top
        self.num_blocks, self.hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
        self.first_block = 0 if top is None else self.num_blocks - top
        self.max_rider_tokens, self.is_packing_fixed = RIDER_TOKENS[0], False
        saved_job = None if self.state_folder is None else read_job(self.state_folder, "tune")
        if saved_job is not None:
            if self.dtype == "auto":
                self.dtype = str(saved_job.get("dtype"))  # a new measurement might choose the other one
            self._fix_packing(saved_job.get("rider_tokens"))
        self.records: dict[str, list[Record]] = {name: [] for name, _, _ in plans}
        self.num_records = 0
        self.saved_at = -math.inf  # the first step already replaces an earlier run's prompt
        self.activations: dict[str, FrozenActivations] = {}

    @functools.cached_property
    def rates(self) -> Rates:
        """The rates of this machine, measured when the model is first opened."""
        return quick_rates(self.info.folder, parse_dtype(self.dtype))

    def phases(self) -> list[Phase]:
        """Return the phases of the run."""
        choices = (self.max_rider_tokens,) if self.is_packing_fixed else RIDER_TOKENS
        held_bytes = trial_bytes(self.plans, self.hidden_size, self.num_blocks, self.first_block)
        steps = tuple(step_job(self.plans, self.first_block, tokens) for tokens in choices)
        phases = [Phase("steps", steps, held_bytes)]
        if self.first_block:
            passes = tuple(frozen_job(self.plans, tokens) for tokens in choices)
            phases.insert(0, Phase("the frozen blocks", passes, held_bytes + self._frozen_bytes()))
        return phases

    def _frozen_bytes(self) -> int:
        """Return what the output of the frozen blocks may take of the budget."""
        if self.state_folder is not None:
            return 0
        num_tokens = sum(sum(row_tokens(task, recipe)) for _, task, recipe in self.plans)
        return min(num_tokens * self.hidden_size * 4, int(FROZEN_SHARE * self.ram_bytes))

    def run(self) -> list[Tuned]:
        """Tune all trials and return their outcomes."""
        with contextlib.ExitStack() as stack:
            if self.out is not None:
                stack.enter_context(check_folder(self.out, is_shared=len(self.plans) > 1))
            if self.first_block:
                trials, state = self._pass_frozen_blocks(stack)
            job_of = functools.partial(step_job, self.plans, self.first_block)
            lm = stack.enter_context(self._opened_for("steps", job_of))
            if not self.first_block:
                state = self._open_state(stack, lm)
                trials = self._make_trials(lm, state)
            try:
                self._loop(lm, trials, state)
            finally:  # after an interrupt or a failed disk as well
                self._save_prompts(trials)
        failures = [trial.failure for trial in trials if trial.failure]
        if len(failures) == len(trials):
            is_saved = self.out is not None and any(trial.step for trial in trials)
            where = f"; the last good prompt is in {self.out}" if is_saved else ""
            raise TuningError(f"{failures[0]}{where}")
        return [Tuned(t.name, t.result, t.recipe, tuple(self.records[t.name]), t.failure) for t in trials]

    def _pass_frozen_blocks(self, stack: contextlib.ExitStack) -> tuple[list[Trial], State | None]:
        """Begin all trials, and pass their examples through the frozen blocks."""
        job_of = functools.partial(frozen_job, self.plans)
        # In memory their output is not yet there when the model is opened, and is when it is opened again.
        with self._opened_for("the frozen blocks", job_of, self._frozen_bytes()) as lm:
            state = self._open_state(stack, lm)
            trials = self._make_trials(lm, state)
            self.activations = pass_frozen_blocks(
                lm, trials, first_block=self.first_block, max_rider_tokens=self.max_rider_tokens,
                memory_bytes=int(FROZEN_SHARE * self.ram_bytes), state_folder=self.state_folder,
                key_parts=[lm.fingerprint(), self.first_block, str(lm.model.dtype)],
            )  # fmt: skip
        return trials, state

    def _fix_packing(self, max_rider_tokens: Any) -> None:
        """Pack micro-batches as the run that is resumed did, where its state says how.

        Raises:
            StateError: what it says is no number of tokens.
        """
        if max_rider_tokens is None:
            return
        if type(max_rider_tokens) is not int or max_rider_tokens < 1:
            raise StateError("the state is another version's, or damaged; delete its folder")
        self.max_rider_tokens, self.is_packing_fixed = max_rider_tokens, True

    @contextlib.contextmanager
    def _opened_for(
        self, phase: str, job_of: Callable[[int], Job], reserved_bytes: int = 0
    ) -> Iterator[StreamedLM]:
        """Open the model with the largest micro-batches that the budget has room for."""
        for max_rider_tokens in RIDER_TOKENS:
            if not self.is_packing_fixed:
                self.max_rider_tokens = max_rider_tokens
            stack = contextlib.ExitStack()
            try:
                lm = stack.enter_context(self._opened(job_of(self.max_rider_tokens), phase, reserved_bytes))
            except PlanError:
                if self.is_packing_fixed or max_rider_tokens == RIDER_TOKENS[-1]:
                    raise
                continue
            with stack:
                yield lm
            return

    @contextlib.contextmanager
    def _opened(self, job: Job, phase: str, reserved_bytes: int) -> Iterator[StreamedLM]:
        used_bytes = psutil.Process().memory_info().rss + reserved_bytes
        used_bytes += trial_bytes(self.plans, self.hidden_size, self.num_blocks, self.first_block)
        options = self.options
        with self._open_model(
            ram=Budget(self.ram_bytes, used_bytes), device=options.device, vram=options.vram, dtype=self.dtype,
            keep_resident=options.keep_resident, job=job, rates=self.rates, granularity=WHOLE_BLOCKS,
        ) as lm:  # fmt: skip
            # A hash of the ends alone would be that of no whole checkpoint.
            self.source_fingerprint = None if lm.checkpoint.absent else lm.fingerprint(of_source=True)
            if options.on_open is not None:
                options.on_open(lm, job, phase, used_bytes + lm.plan.peak_bytes)
            yield lm

    def _open_model(self, **options: Any) -> StreamedLM:
        swarm = self.options.swarm
        if not swarm:
            return open_model(StreamedLM, self.info, **options)
        from slowllm.swarm.client import open_client, options_of

        return open_client(StreamedLM, self.info, options_of(swarm), **options)

    def _open_state(self, stack: contextlib.ExitStack, lm: StreamedLM) -> State | None:
        if self.state_folder is None:
            return None
        job = run_identity(
            "tune", lm,
            trials=[[name, task.digest(), asdict(recipe)] for name, task, recipe in self.plans],
            # Above frozen blocks it is only known when the steps begin, and is kept with them.
            rider_tokens=None if self.first_block else self.max_rider_tokens,
        )  # fmt: skip
        return stack.enter_context(State(self.state_folder, job))

    def _make_trials(self, lm: StreamedLM, state: State | None) -> list[Trial]:
        """Begin all trials, or resume them from the state."""
        saved = None if state is None else state.saved_tensors("trials")
        if saved is None or state is None:
            starts = starts_of(lm, [recipe for _, _, recipe in self.plans], self.first_block)
            return [Trial(*plan, start) for plan, start in zip(self.plans, starts, strict=True)]
        tensors, about = saved
        trials = []
        for number, (name, task, recipe) in enumerate(self.plans):
            prefix = f"{number}:"
            of_trial = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            start = restored_start(of_trial, recipe.kind, self.num_blocks, self.hidden_size)
            trials.append(Trial(name, task, recipe, above(start, self.first_block)))
            trials[-1].restore(of_trial, about["trials"][number])
        self.num_records = about["num_records"]
        for number in range(self.num_records):
            record = state.result(number)
            if record is None:
                raise StateError(f"{state.folder}: the records of its steps are damaged; delete the folder")
            self._report(record)
        self._fix_packing(about["rider_tokens"])
        return trials

    def _loop(self, lm: StreamedLM, trials: Sequence[Trial], state: State | None) -> None:
        while active := [trial for trial in trials if not trial.ended]:
            started, before = time.perf_counter(), lm.report
            # After a last step no rider goes up again.
            hint = Reach(first=self.first_block, again=any(t.step + 1 < t.num_steps for t in active))
            steps = [
                step_of(lm, trial, self.activations.get(trial.name), self.max_rider_tokens, hint)
                for trial in active
            ]
            jobs = itertools.chain.from_iterable(step.learn_jobs + step.judge_jobs for step in steps)
            results = iter([result for _, result in lm.stream(jobs, MAX_RIDERS, lm.plan.sweep_tokens)])
            records: list[Record] = []
            for step in steps:
                learned = list(itertools.islice(results, len(step.learn_jobs)))
                judged = list(itertools.islice(results, len(step.judge_jobs)))
                records += self._close_step(step.trial, learned, judged)
            cost = {
                "seconds": time.perf_counter() - started,
                "read_bytes": lm.report.read_bytes - before.read_bytes,
            }
            for record in records:
                if "loss" in record:
                    record.update(cost)
                if state is not None:
                    state.finish(self.num_records, record)
                self.num_records += 1
                self._report(record)
            if state is not None:
                self._save_trials(state, trials)
            if time.monotonic() - self.saved_at > SAVE_SECONDS:
                self._save_prompts(trials)

    def _close_step(
        self, trial: Trial, learned: Sequence[Learned | SlowLLMError], judged: Sequence[Any]
    ) -> list[Record]:
        """Judge a trial by the results of its riders, and update it."""
        step = trial.step + 1
        records: list[Record] = []
        try:
            for result in (*learned, *judged):
                if isinstance(result, SlowLLMError):
                    raise TuningError(f"{trial.name}: step {step}: {result}")
            if judged:
                loss, accuracy = judgement(trial.task, judged)
                records.append({"trial": trial.name, "step": trial.step, "validation_loss": loss})
                if accuracy is not None:
                    records[-1]["accuracy"] = accuracy
                trial.judge(loss)
                trial.ended |= trial.step >= trial.num_steps
            parts = [result for result in learned if isinstance(result, Learned)]
            if parts and not trial.ended:
                loss = math.fsum(part.loss for part in parts)
                gradients = dict(parts[0].gradients)
                for part in parts[1:]:  # in rider order
                    gradients = {name: gradients[name] + part.gradients[name] for name in gradients}
                vocabulary = int(self.info.config.get_text_config().vocab_size)
                norm, rate = trial.learn(loss, gradients, vocabulary)
                records.append(
                    {
                        "trial": trial.name, "step": step, "epoch": round(trial.epoch, 4), "loss": loss,
                        "grad_norm": norm, "learning_rate": rate,
                        "num_tokens": sum(part.num_tokens for part in parts),
                    }
                )  # fmt: skip
        except TuningError as error:
            trial.failure, trial.ended = str(error), True
            if len(self.plans) > 1:  # of a single trial it is the error that ends the run
                log.warning("%s", error)
        return records

    def _report(self, record: Record) -> None:
        self.records[record["trial"]].append(record)
        if self.options.on_record is not None:
            self.options.on_record(record)

    def _save_trials(self, state: State, trials: Sequence[Trial]) -> None:
        tensors: dict[str, Tensor] = {}
        about: list[Any] = []
        for number, trial in enumerate(trials):
            of_trial, about_trial = trial.saved()
            tensors |= {f"{number}:{name}": tensor.contiguous() for name, tensor in of_trial.items()}
            about.append(about_trial)
        more = {"num_records": self.num_records, "rider_tokens": self.max_rider_tokens}
        state.save_tensors("trials", tensors, {"trials": about, **more})

    def _save_prompts(self, trials: Sequence[Trial]) -> None:
        """Write the prompts of trials that have done a step to the folder of results."""
        self.saved_at = time.monotonic()
        if self.out is None:
            return
        for trial in [trial for trial in trials if trial.step]:
            about = {
                "model": self.info.name, "fingerprint": self.source_fingerprint, "recipe": asdict(trial.recipe),
                "task": trial.task.name, "labels": list(trial.task.labels), "steps": trial.step,
                "best_step": trial.good_step,
                "best_loss": trial.best_loss if math.isfinite(trial.best_loss) else None, "failure": trial.failure,
            }  # fmt: skip
            folder = self.out if len(trials) == 1 else self.out / trial.name
            save_prompt(trial.result, folder, str(self.info.folder), about)
