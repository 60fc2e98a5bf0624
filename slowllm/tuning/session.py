"""Tune soft prompts on a model that does not fit: each step goes up the stops and down again, once for all examples.

A step's examples, and those of other trials, are riders of one sweep; each rider goes up, computes its losses from one
pass over the head, and comes down. The step after it begins with the block at which they arrive. Validation rides up
with the next step. Where only the top blocks are tuned, the blocks below are passed once for all steps (`trunk`), and
the model is then opened anew for the top alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor

from slowllm.errors import InputError, PlanError, SlowLLMError, StateError, TuningError
from slowllm.modeling.soft_prompt_files import check_folder, save_prompt
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.options import format_bytes, parse_bytes, parse_dtype
from slowllm.planning.budget import Budget
from slowllm.planning.job import Job
from slowllm.planning.packing import pack
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.rates import quick_rates
from slowllm.runtime.run_identity import computed_by
from slowllm.runtime.state import State, read_job
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.hints import Reach
from slowllm.streaming.riders import Sized
from slowllm.tuning.examples import Example, Task
from slowllm.tuning.frozen_activations import FrozenActivations
from slowllm.tuning.initialization import above, starts_of
from slowllm.tuning.passes import fill_rider, judge_rider, judgement, learn_rider
from slowllm.tuning.recipe import Recipe
from slowllm.tuning.rows import NumberedExample, all_rows, validation_rows
from slowllm.tuning.step_jobs import PADDING_TOKENS, RIDER_TOKENS, TRIAL_COPIES
from slowllm.tuning.trial import Trial, restored_start
from slowllm.version import __version__

log = logging.getLogger(__name__)


MAX_RIDERS = 256


# What a trunk may take of the budget before it goes to a file.
TRUNK_SHARE = 0.125


# How long the prompts in the folder of results may be behind.
SAVE_SECONDS = 30.0


Record = dict[str, Any]


# Called with a model, what it was planned for, in words what for, and the most memory that the process will take.
OnOpen = Callable[[StreamedLM, Job, str, int], Any]


@dataclass(frozen=True)
class Tuned:
    """What became of a trial.

    Attributes:
        name: of the trial.
        prompt: the best by validation, else the last.
        recipe: how it was tuned.
        records: of its steps and validations, in order.
        failure: why it stopped early, if something was wrong.
    """

    name: str
    prompt: SoftPrompt
    recipe: Recipe
    records: tuple[Record, ...]
    failure: str | None = None


class Session:
    """One run of `tune`."""

    def __init__(
        self,
        known: ModelInfo,
        plans: Sequence[tuple[str, Task, Recipe]],
        ram: str | int,
        device: tuple[str, str | int | None],
        dtype: str,
        keep_resident: bool,
        out: Path | None,
        state: Path | None,
        num_blocks: int,
        on_open: OnOpen | None,
        on_record: Callable[[Record], Any] | None,
    ) -> None:
        self.known, self.plans, self.ram, self.dtype = known, list(plans), parse_bytes(ram), dtype
        self.device, self.vram = device
        self.keep_resident, self.out, self.folder = keep_resident, out, state
        self.on_open, self.on_record = on_open, on_record
        top = plans[0][2].top
        self.first = 0 if top is None else num_blocks - top
        self.num_blocks = num_blocks
        begun = None if state is None else read_job(state, "tune")
        self.most, self.is_bound = RIDER_TOKENS[0], False
        if begun is not None:
            if dtype == "auto":
                self.dtype = str(begun.get("dtype"))  # measured anew it might come out otherwise
            self._bind(begun.get("rider_tokens"))
        self.rates = quick_rates(known.folder, parse_dtype(self.dtype))
        self.records: dict[str, list[Record]] = {name: [] for name, _, _ in plans}
        self.num_records = 0
        self.saved_at = (
            -math.inf
        )  # after the first step the folder holds this run's prompt, and no earlier one's
        self.trunks: dict[str, FrozenActivations] = {}
        self.trunk_bytes = 0

    def run(self) -> list[Tuned]:
        """Do all of it."""
        with contextlib.ExitStack() as stack:
            if self.out is not None:
                stack.enter_context(check_folder(self.out, is_shared=len(self.plans) > 1))
            if self.first:
                trials, kept = self._pass_trunk(stack)
                lm = stack.enter_context(self._opened_for("steps", self._step_job))
            else:
                lm = stack.enter_context(self._opened_for("steps", self._step_job))
                kept = self._state(stack, lm)
                trials = self._trials(lm, kept)
            try:
                self._loop(lm, trials, kept)
            finally:  # after an interrupt or a failed disk as well
                self._save(trials)
        failures = [trial.failure for trial in trials if trial.failure]
        if len(failures) == len(trials):
            is_saved = self.out is not None and any(trial.step for trial in trials)
            where = f"; the last good prompt is in {self.out}" if is_saved else ""
            raise TuningError(f"{failures[0]}{where}")
        return [Tuned(t.name, t.result, t.recipe, tuple(self.records[t.name]), t.failure) for t in trials]

    def _pass_trunk(self, stack: contextlib.ExitStack) -> tuple[list[Trial], State | None]:
        """Begin all trials, and pass their examples through the frozen blocks."""
        # In memory it is not yet there when the model is opened, and is when it is opened again.
        width = int(self.known.config.get_text_config().hidden_size)
        most = sum(sum(self._lengths(task, recipe)) for _, task, recipe in self.plans) * width * 4
        reserved = 0 if self.folder is not None else min(most, int(TRUNK_SHARE * self.ram))
        with self._opened_for("the frozen trunk", self._trunk_job, reserved) as lm:
            kept = self._state(stack, lm)
            trials = self._trials(lm, kept)
            self._fill(lm, trials)
        return trials, kept

    # Opening.

    def _bind(self, most: Any) -> None:
        """Pack micro-batches as the run that is gone on with did.

        Raises:
            StateError: it says nothing of that.
        """
        if most is None:
            return
        if type(most) is not int or most < 1:
            raise StateError("the state is another version's, or damaged; delete its folder")
        self.most, self.is_bound = most, True

    @contextlib.contextmanager
    def _opened_for(self, what: str, job_of: Callable[[], Job], reserved: int = 0) -> Iterator[StreamedLM]:
        """Open the model with the largest micro-batches that the budget has room for."""
        for most in RIDER_TOKENS:
            if not self.is_bound:
                self.most = most
            stack = contextlib.ExitStack()
            try:
                lm = stack.enter_context(self._opened(job_of(), what, reserved))
            except PlanError:
                if self.is_bound or most == RIDER_TOKENS[-1]:
                    raise
                continue
            with stack:
                yield lm
            return

    @contextlib.contextmanager
    def _opened(self, job: Job, what: str, reserved: int) -> Iterator[StreamedLM]:
        used = psutil.Process().memory_info().rss + reserved + self._trial_bytes()
        with open_model(StreamedLM,
            self.known, ram=Budget(self.ram, used), device=self.device, vram=self.vram, dtype=self.dtype, keep_resident=self.keep_resident, job=job,
            rates=self.rates, granularity="blocks",
        ) as lm:  # fmt: skip
            self.fingerprint = lm.fingerprint()
            self.source_fingerprint = lm.fingerprint(of_source=True)
            if self.on_open is not None:
                self.on_open(lm, job, what, used + lm.plan.peak_bytes)
            yield lm

    def _trial_bytes(self) -> int:
        """Return what all trials hold beside the model: their numbers, the optimizer's, copies and gradients."""
        config = self.known.config.get_text_config()
        num_rows = {"shallow": 1, "deep": 1 + self.num_blocks - self.first, "prefix": 2 * self.num_blocks}
        numbers = sum(r.num_tokens * int(config.hidden_size) * num_rows[r.kind] for _, _, r in self.plans)
        return numbers * 4 * TRIAL_COPIES

    def _lengths(self, task: Task, recipe: Recipe) -> list[int]:
        return [recipe.num_tokens + len(row.ids) for row in all_rows(task)]

    def _trunk_job(self) -> Job:
        lengths = [n for _, task, recipe in self.plans for n in self._lengths(task, recipe)]
        longest = max(lengths)
        rider = max(longest, min(self.most, sum(lengths)))
        return Job(sum(lengths), longest, forward_only=True, keeps_results=False, rider_tokens=rider)

    def _step_job(self) -> Job:
        longest = max(max(self._lengths(task, recipe)) for _, task, recipe in self.plans)
        total = sum(self._step_tokens(task, recipe) for _, task, recipe in self.plans)
        rider = max(self._rider_tokens(task, recipe) for _, task, recipe in self.plans)
        # A prefix counts as tokens: what is held of it in a batch is less than theirs.
        return Job(
            max(total, longest), longest, repeated=True, forward_only=False, keeps_results=False, turns=True,
            first_stop=self.first, rider_tokens=rider,
        )  # fmt: skip

    def _step_tokens(self, task: Task, recipe: Recipe) -> int:
        """Return the most tokens of a step, padding included."""
        lengths = sorted((recipe.num_tokens + len(e.ids) for e in task.train), reverse=True)
        chosen = lengths[: recipe.step_examples]
        num_batches = len(pack(chosen, self._rider_tokens(task, recipe), PADDING_TOKENS))
        return min(len(chosen) * lengths[0], sum(chosen) + (num_batches + 1) * PADDING_TOKENS)

    def _rider_tokens(self, task: Task, recipe: Recipe) -> int:
        """Return the tokens of a trial's micro-batches, on which its rounding depends, so by the trial alone."""
        lengths = sorted((recipe.num_tokens + len(e.ids) for e in task.train), reverse=True)
        return max(*self._lengths(task, recipe), min(self.most, sum(lengths[: recipe.step_examples])))

    def _state(self, stack: contextlib.ExitStack, lm: StreamedLM) -> State | None:
        if self.folder is None:
            return None
        job = {
            "kind": "tune",
            "versions": {
                "slowllm": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "model": self.fingerprint,
            **computed_by(lm.model),
            "trials": [[name, task.digest(), asdict(recipe)] for name, task, recipe in self.plans],
            # That of steps above a trunk is only known when they begin, and kept with them.
            "rider_tokens": None if self.first else self.most,
            "threads": torch.get_num_threads(),
        }
        return stack.enter_context(State(self.folder, job))

    # Beginnings.

    def _trials(self, lm: StreamedLM, kept: State | None) -> list[Trial]:
        found = None if kept is None else kept.kept("trials")
        trials = []
        if found is None:
            starts = starts_of(lm, [recipe for _, _, recipe in self.plans], self.first)
        for number, (name, task, recipe) in enumerate(self.plans):
            if found is None:
                trials.append(Trial(name, task, recipe, starts[number]))
                continue
            tensors, about = found
            own = {k.partition(":")[2]: t for k, t in tensors.items() if k.partition(":")[0] == str(number)}
            width = int(lm.config.get_text_config().hidden_size)
            start = above(restored_start(own, recipe.kind, self.num_blocks, width), self.first)
            trials.append(Trial(name, task, recipe, start))
            trials[-1].restore(own, about["trials"][number])
        if found is not None and kept is not None:
            for number in range(found[1]["num_records"]):
                record = kept.result(number)
                if record is None:
                    raise StateError(
                        f"{kept.folder}: the records of its steps are damaged; delete the folder"
                    )
                self._tell(record)
            self.num_records = found[1]["num_records"]
            self._bind(found[1]["rider_tokens"])
        return trials

    def _fill(self, lm: StreamedLM, trials: Sequence[Trial]) -> None:
        """Pass all examples through the blocks below the tuned ones."""
        config = lm.model.config.get_text_config()
        for trial in trials:
            rows = all_rows(trial.task)
            start = trial.prompt()
            lower = SoftPrompt(start.kind, start.embeddings, (), start.pairs[: self.first])
            key = hashlib.sha256(
                json.dumps(
                    [lower.digest(), trial.task.digest(), self.fingerprint, self.first, self.dtype]
                ).encode()
            ).hexdigest()
            if key in self.trunks:
                self.trunks[trial.name] = self.trunks[key]
                continue
            lengths = [len(start.virtual_ids) + len(row.ids) for row in rows]
            num_bytes = sum(lengths) * int(config.hidden_size) * lm.model.dtype.itemsize
            path = None
            if self.folder is not None:
                path = self.folder / "riders" / f"trunk-{key[:16]}.bin"
            elif self.trunk_bytes + num_bytes > TRUNK_SHARE * self.ram:
                raise InputError(
                    f"the trunk's output of {format_bytes(num_bytes)} is too large to be kept in memory; name a folder "
                    "for it with --state"
                )
            else:
                self.trunk_bytes += num_bytes
            trunk = FrozenActivations(self.first, lengths, int(config.hidden_size), lm.model.dtype, path, key)
            self.trunks[key] = self.trunks[trial.name] = trunk
            if trunk.is_filled:
                continue
            batches = pack(lengths, max(self.most, *lengths), PADDING_TOKENS)
            jobs = [
                Sized(
                    functools.partial(fill_rider, lm, trial.prompt(), [rows[n] for n in batch], self.first),
                    len(batch) * lengths[batch[0]],
                )
                for batch in batches
            ]
            outputs = lm.stream(jobs, MAX_RIDERS, lm.plan.sweep_tokens)
            for batch, (_, output) in zip(batches, outputs, strict=True):
                trunk.put(batch, output)
            trunk.finish()

    # Steps.

    def _loop(self, lm: StreamedLM, trials: Sequence[Trial], kept: State | None) -> None:
        while active := [trial for trial in trials if not trial.ended]:
            started, before = time.perf_counter(), lm.report
            jobs: list[Sized] = []
            shares: list[tuple[Trial, list[int], int, tuple[int, int]]] = []
            # Behind a last step nobody goes up again.
            hint = Reach(first=self.first, again=any(t.step + 1 < t.num_steps for t in active))
            for trial in active:
                train, judged = trial.batch(), validation_rows(trial.task) if trial.validates else []
                batches = [self._pack(trial, [trial.task.train[n] for n in train])]
                batches.append(self._pack(trial, [row.example for row in judged]))
                shares.append((trial, train, len(judged), (len(batches[0]), len(batches[1]))))
                jobs += self._jobs(lm, trial, train, judged, batches, hint)
            found = [result for _, result in lm.stream(jobs, MAX_RIDERS, lm.plan.sweep_tokens)]
            records: list[Record] = []
            for trial, train, num_judged, (num_train, num_validation) in shares:
                results, found = found[: num_train + num_validation], found[num_train + num_validation :]
                records += self._close_step(trial, train, num_judged, results, num_train)
            cost = {
                "seconds": time.perf_counter() - started,
                "read_bytes": lm.report.read_bytes - before.read_bytes,
            }
            records = [{**record, **cost} if "loss" in record else record for record in records]
            for record in records:
                if kept is not None:
                    kept.finish(self.num_records, record)
                self.num_records += 1
                self._tell(record)
            if kept is not None:
                self._keep(kept, trials)
            if time.monotonic() - self.saved_at > SAVE_SECONDS:
                self._save(trials)

    def _pack(self, trial: Trial, examples: Sequence[Example]) -> list[list[int]]:
        lengths = [trial.recipe.num_tokens + len(example.ids) for example in examples]
        return pack(lengths, self._rider_tokens(trial.task, trial.recipe), PADDING_TOKENS)

    def _jobs(
        self,
        lm: StreamedLM,
        trial: Trial,
        train: Sequence[int],
        judged: Sequence[NumberedExample],
        batches: Any,
        hint: Reach,
    ) -> Iterator[Sized]:
        task, recipe, trunk = trial.task, trial.recipe, self.trunks.get(trial.name)
        examples = [task.train[n] for n in train]
        total = len(examples) if task.compares else sum(len(example.answer) for example in examples)
        for batch in batches[0]:
            rows = [NumberedExample(examples[n], train[n]) for n in batch]
            num_tokens = len(batch) * (recipe.num_tokens + max(len(row.example.ids) for row in rows))
            yield Sized(functools.partial(learn_rider, lm, trial, rows, total, trunk, hint), num_tokens)
        for batch in batches[1]:
            rows = [judged[n] for n in batch]
            num_tokens = len(batch) * (recipe.num_tokens + max(len(row.example.ids) for row in rows))
            yield Sized(functools.partial(judge_rider, lm, trial, rows, batch, trunk, hint), num_tokens)

    def _close_step(
        self,
        trial: Trial,
        train: Sequence[int],
        num_judged: int,
        results: Sequence[Any],
        num_train: int,
    ) -> list[Record]:
        """Judge a trial by what its riders found, and update it."""
        step = trial.step + 1
        records: list[Record] = []
        try:
            for result in results:
                if isinstance(result, SlowLLMError):
                    raise TuningError(f"{trial.name}: step {step}: {result}")
            if num_judged:
                loss, accuracy = judgement(trial.task, results[num_train:])
                records.append({"trial": trial.name, "step": trial.step, "validation_loss": loss})
                if accuracy is not None:
                    records[-1]["accuracy"] = accuracy
                trial.judge(loss)
                trial.ended |= trial.step >= trial.num_steps
            if train and not trial.ended:
                learned = results[:num_train]
                loss = math.fsum(found.loss for found in learned)
                gradients = dict(learned[0].gradients)
                for found in learned[1:]:  # in rider order
                    gradients = {name: gradients[name] + found.gradients[name] for name in gradients}
                vocabulary = int(self.known.config.get_text_config().vocab_size)
                norm, rate = trial.learn(loss, gradients, vocabulary)
                records.append(
                    {
                        "trial": trial.name, "step": step, "epoch": round(trial.epoch, 4), "loss": loss,
                        "grad_norm": norm, "learning_rate": rate,
                        "num_tokens": sum(found.num_tokens for found in learned),
                    }
                )  # fmt: skip
        except TuningError as error:
            trial.failure, trial.ended = str(error), True
            if len(self.plans) > 1:  # of one trial it is the error that ends the run
                log.warning("%s", error)
        return records

    def _tell(self, record: Record) -> None:
        self.records[record["trial"]].append(record)
        if self.on_record is not None:
            self.on_record(record)

    def _keep(self, kept: State, trials: Sequence[Trial]) -> None:
        tensors: dict[str, Tensor] = {}
        about: list[Any] = []
        for number, trial in enumerate(trials):
            own, said = trial.saved()
            tensors |= {f"{number}:{name}": tensor.contiguous() for name, tensor in own.items()}
            about.append(said)
        kept.keep(
            "trials", tensors, {"trials": about, "num_records": self.num_records, "rider_tokens": self.most}
        )

    def _save(self, trials: Sequence[Trial]) -> None:
        """Write the prompts to the folder of results; none of a trial that has learned nothing yet."""
        self.saved_at = time.monotonic()
        for trial in [t for t in trials if t.step] if self.out is not None else ():
            assert self.out is not None, "looked at above"
            folder = self.out if len(trials) == 1 else self.out / trial.name
            about = {
                "model": self.known.name, "fingerprint": self.source_fingerprint, "recipe": asdict(trial.recipe),
                "task": trial.task.name, "labels": list(trial.task.labels), "steps": trial.step,
                "best_step": trial.good_step,
                "best_loss": trial.best_loss if math.isfinite(trial.best_loss) else None, "failure": trial.failure,
            }  # fmt: skip
            save_prompt(trial.result, folder, str(self.known.folder), about)
