"""The riders of tuning: they learn a micro-batch, validate one, or pass one through the frozen blocks.

Each function named after a rider runs as one and returns its result; it leaves the numbers of trials as they are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.errors import InputError, NonFiniteError, SlowLLMError, TuningError, forward_errors
from slowllm.modeling.batching import batch_rule
from slowllm.modeling.losses import choice_logits, token_losses
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.options import format_bytes
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.hints import Reach
from slowllm.streaming.riders import Sized
from slowllm.streaming.way import StopAfterBlocks, StopForward, Way
from slowllm.tuning.examples import Example, Task
from slowllm.tuning.frozen_activations import FrozenActivations
from slowllm.tuning.rows import NumberedExample, all_rows, validation_rows
from slowllm.tuning.step_jobs import pack_alike, pack_rows
from slowllm.tuning.trial import Trial

# The most riders at a time.
MAX_RIDERS = 256


@dataclass(frozen=True)
class Learned:
    """A micro-batch's part of a step.

    Attributes:
        loss: its part of the mean.
        gradients: of that loss, by the names of the trial's numbers.
        num_tokens: that passed, without those of the soft prompt.
    """

    loss: float
    gradients: Mapping[str, Tensor]
    num_tokens: int


@dataclass(frozen=True)
class TrialStep:
    """The riders of one trial in one step: those that learn, and those that validate."""

    trial: Trial
    learn_jobs: list[Sized]
    judge_jobs: list[Sized]


def step_of(
    lm: StreamedLM, trial: Trial, activations: FrozenActivations | None, max_rider_tokens: int, hint: Reach
) -> TrialStep:
    """Return the riders of a trial's next step, and of the validation that is due."""
    task, recipe, rule = trial.task, trial.recipe, batch_rule(lm.config)
    train = [NumberedExample(task.train[number], number) for number in trial.batch()]
    validation = validation_rows(task) if trial.validates else []
    total = len(train) if task.compares else sum(len(row.example.answer) for row in train)

    def batches(rows: Sequence[NumberedExample]) -> Iterator[tuple[list[int], list[NumberedExample], int]]:
        examples = [row.example for row in rows]
        for batch, num_tokens in pack_rows(examples, task, recipe, max_rider_tokens, rule):
            yield batch, [rows[n] for n in batch], num_tokens

    learn_jobs = [
        Sized(functools.partial(learn_rider, lm, trial, rows, total, activations, hint), num_tokens)
        for _, rows, num_tokens in batches(train)
    ]
    judge_jobs = [
        Sized(functools.partial(judge_rider, lm, trial, rows, batch, activations, hint), num_tokens)
        for batch, rows, num_tokens in batches(validation)
    ]
    return TrialStep(trial, learn_jobs, judge_jobs)


def learn_rider(
    lm: StreamedLM,
    trial: Trial,
    rows: Sequence[NumberedExample],
    total: int,
    activations: FrozenActivations | None,
    hint: Reach,
) -> Learned | SlowLLMError:
    """Pass a micro-batch up and down; return its part of the loss and of the gradient, or what is wrong with it.

    The loss is divided by `total`, the tokens or examples of the whole step.
    """
    leaves = trial.leaves()
    examples = [row.example for row in rows]
    try:
        with call_context(reach=hint), torch.enable_grad():
            losses, _ = _losses(lm, trial.prompt(leaves), trial.task, rows, activations)
            loss = losses.sum() / total
            gradients = torch.autograd.grad(loss, list(leaves.values()))
    except NonFiniteError as error:
        return _named(error, examples)
    num_tokens = sum(len(example.ids) for example in examples)
    return Learned(float(loss.detach()), dict(zip(leaves, gradients, strict=True)), num_tokens)


def judge_rider(
    lm: StreamedLM,
    trial: Trial,
    rows: Sequence[NumberedExample],
    numbers: Sequence[int],
    activations: FrozenActivations | None,
    hint: Reach,
) -> tuple[Sequence[int], list[float], list[int]] | SlowLLMError:
    """Pass a micro-batch up; return the numbers of its rows, their losses, and the likeliest label of each."""
    examples = [row.example for row in rows]
    try:
        with call_context(reach=hint), torch.no_grad():
            losses, chosen = _losses(lm, trial.prompt(), trial.task, rows, activations)
    except NonFiniteError as error:
        return _named(error, examples)
    return numbers, losses.tolist(), chosen.tolist()


def pass_frozen_blocks(
    lm: StreamedLM,
    trials: Sequence[Trial],
    *,
    first_block: int,
    max_rider_tokens: int,
    memory_bytes: int,
    state_folder: Path | None,
    key_parts: Sequence[str | int],
) -> dict[str, FrozenActivations]:
    """Return the output of the last frozen block for the rows of each trial, by the trial's name.

    Trials with the same task and the same soft prompt below `first_block` share it. Without a state folder it is kept
    in memory, of which it may take `memory_bytes`; `key_parts` are what it depends on beside the trial.

    Raises:
        InputError: it is too large for memory.
        StateError: a file of the state folder cannot be made.
    """
    hidden_size, dtype = int(lm.config.get_text_config().hidden_size), lm.model.dtype
    by_key: dict[str, FrozenActivations] = {}
    by_name: dict[str, FrozenActivations] = {}
    for trial in trials:
        prompt, rows = trial.prompt(), all_rows(trial.task)
        lower = SoftPrompt(prompt.kind, prompt.embeddings, (), prompt.pairs[:first_block])
        text = json.dumps([lower.digest(), trial.task.digest(), *key_parts])
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in by_key:
            by_name[trial.name] = by_key[key]
            continue
        lengths = [len(prompt.virtual_ids) + len(row.ids) for row in rows]
        num_bytes = sum(lengths) * hidden_size * dtype.itemsize
        path = None
        if state_folder is not None:
            # Named as in earlier versions, so that their folders can be resumed.
            path = state_folder / "riders" / f"trunk-{key[:16]}.bin"
        elif num_bytes > memory_bytes:
            raise InputError(
                f"the frozen blocks' output of {format_bytes(num_bytes)} is too large to be kept in memory; name a "
                "folder for it with --state"
            )
        else:
            memory_bytes -= num_bytes
        activations = FrozenActivations(first_block, lengths, hidden_size, dtype, path, key)
        by_key[key] = by_name[trial.name] = activations
        if activations.is_filled:
            continue
        batches = pack_alike(lengths, max(max_rider_tokens, *lengths), batch_rule(lm.config))
        jobs = [
            Sized(
                functools.partial(_fill_rider, lm, prompt, [rows[n] for n in batch], first_block),
                len(batch) * lengths[batch[0]],
            )
            for batch in batches
        ]
        outputs = lm.stream(jobs, MAX_RIDERS, lm.plan.sweep_tokens)
        for batch, (_, output) in zip(batches, outputs, strict=True):
            activations.put(batch, output)
        activations.finish()
    return by_name


def _fill_rider(lm: StreamedLM, prompt: SoftPrompt, rows: Sequence[Example], num_blocks: int) -> Any:
    """Pass a micro-batch through the frozen blocks; return the output of the last of them."""
    way = StopAfterBlocks(num_blocks)
    ids, mask = _inputs_of(prompt, rows)
    with (
        forward_errors(lm.model),
        call_context(reach=Reach(end=num_blocks), way=way),
        torch.no_grad(),
        contextlib.suppress(StopForward),
        prompt.applied(lm.model, ids, mask) as inputs,
    ):
        lm.model(**{"use_cache": False, **inputs})
    return way.output


def _inputs_of(prompt: SoftPrompt, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) and mask (B, T), padded on the right."""
    leading = prompt.virtual_ids
    width = len(leading) + max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        row_ids = torch.tensor(leading + row.ids)
        ids[number, : len(row_ids)] = row_ids
        mask[number, : len(row_ids)] = 1
    return ids, mask


def _losses(
    lm: StreamedLM,
    prompt: SoftPrompt,
    task: Task,
    rows: Sequence[NumberedExample],
    activations: FrozenActivations | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) of each row, summed over its answer, and the likeliest label (B,) if labels are compared.

    Raises:
        NonFiniteError: a loss is not finite; the error has the number of the row.
    """
    examples = [row.example for row in rows]
    ids, mask = _inputs_of(prompt, examples)
    way = Way() if activations is None else activations.way_of([row.number for row in rows])
    leading = len(prompt.virtual_ids)
    targets = [
        (number, leading + len(example.context) - 1 + place, token)
        for number, example in enumerate(examples)
        for place, token in enumerate(example.answer)
    ]
    target_rows, positions, tokens = torch.tensor(targets, dtype=torch.int64).unbind(1)
    with (
        forward_errors(lm.model),
        call_context(way=way),
        prompt.applied(lm.model, ids, mask) as inputs,
    ):
        if task.compares:
            choices = torch.tensor([label[0] for label in task.label_ids])
            logits = choice_logits(lm.model, target_rows, positions, choices, inputs)
            right = torch.tensor([example.label for example in examples])
            losses, chosen = F.cross_entropy(logits, right, reduction="none"), logits.argmax(-1)
        else:
            each = token_losses(lm.model, target_rows, positions, tokens, **inputs)
            losses = torch.zeros(len(rows)).index_add(0, target_rows, each)
            chosen = torch.zeros(0, dtype=torch.int64)
    for row, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            error = NonFiniteError(f"the loss is {loss}")
            error.row = row
            raise error
    return losses, chosen


def _named(error: NonFiniteError, examples: Sequence[Example]) -> TuningError:
    """Return an error that names the example with the non-finite number."""
    if error.row is not None:
        return TuningError(f"{examples[error.row].name}: {error}")
    return TuningError(f"one of {', '.join(example.name for example in examples[:3])}: {error}")


def judgement(task: Task, results: Sequence[Any]) -> tuple[float, float | None]:
    """Return the mean loss of a validation from the results of `judge_rider`, and the accuracy if there are labels."""
    losses: dict[int, float] = {}
    chosen: dict[int, int] = {}
    for numbers, row_losses, labels in results:
        losses.update(zip(numbers, row_losses, strict=True))
        chosen.update(zip(numbers, labels, strict=False))
    count, num_labels = len(task.validation), len(task.labels)
    num_tokens = sum(len(example.answer) for example in task.validation)
    if not num_labels:
        return math.fsum(losses[n] for n in range(len(losses))) / num_tokens, None
    right = [example.label or 0 for example in task.validation]
    if task.compares:
        mean = math.fsum(losses[n] for n in range(count)) / count
        return mean, sum(chosen[n] == right[n] for n in range(count)) / count
    table = [[losses[n * num_labels + label] for label in range(num_labels)] for n in range(count)]
    mean = math.fsum(row[label] for row, label in zip(table, right, strict=True)) / num_tokens
    hits = sum(row.index(min(row)) == label for row, label in zip(table, right, strict=True))
    return mean, hits / count
