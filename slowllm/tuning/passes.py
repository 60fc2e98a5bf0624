"""What riders do in tuning: learn a micro-batch, judge one, fill the frozen trunk, and find where prompts begin.

Each function named after a rider runs as one, and returns what it found; the numbers of trials are left as they are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.errors import NonFiniteError, SlowLLMError, TuningError
from slowllm.modeling.losses import choice_logits, token_losses
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.hints import Reach, reach
from slowllm.streaming.journal import journal
from slowllm.tuning.examples import Example, Task
from slowllm.tuning.frozen_activations import Filling, FrozenActivations, StopForward
from slowllm.tuning.rows import NumberedExample
from slowllm.tuning.trial import Trial


@dataclass(frozen=True)
class Learned:
    """A micro-batch's part of a step.

    Attributes:
        loss: its part of the mean.
        gradients: of that, by the trial's numbers.
        num_tokens: that passed, those of the soft prompt not counted.
    """

    loss: float
    gradients: Mapping[str, Tensor]
    num_tokens: int


def _inputs_of(prompt: SoftPrompt, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) and mask (B, T), padded on the right."""
    leading = prompt.virtual_ids
    width = len(leading) + max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        whole = torch.tensor(leading + row.ids)
        ids[number, : len(whole)] = whole
        mask[number, : len(whole)] = 1
    return ids, mask


def learn_rider(
    lm: StreamedLM,
    trial: Trial,
    rows: Sequence[NumberedExample],
    total: int,
    trunk: FrozenActivations | None,
    hint: Reach,
) -> Learned | SlowLLMError:
    """Pass a micro-batch up and down; return its part of the loss and of the gradient, or what is wrong with it."""
    reach.set(hint)
    leaves = trial.leaves()
    examples = [row.example for row in rows]
    try:
        with torch.enable_grad():
            losses, _ = _losses(lm, trial.prompt(leaves), trial.task, rows, trunk)
            _refuse_non_finite(losses, examples)
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
    trunk: FrozenActivations | None,
    hint: Reach,
) -> tuple[Sequence[int], list[float], list[int]] | SlowLLMError:
    """Pass a micro-batch up; return the numbers of its rows, their losses, and the likeliest label of each."""
    reach.set(hint)
    examples = [row.example for row in rows]
    try:
        with torch.no_grad():
            losses, chosen = _losses(lm, trial.prompt(), trial.task, rows, trunk)
            _refuse_non_finite(losses, examples)
    except NonFiniteError as error:
        return _named(error, examples)
    return numbers, losses.tolist(), chosen.tolist()


def _losses(
    lm: StreamedLM,
    prompt: SoftPrompt,
    task: Task,
    rows: Sequence[NumberedExample],
    trunk: FrozenActivations | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) of each row, summed over its answer, and where labels are compared the likeliest (B,)."""
    examples = [row.example for row in rows]
    ids, mask = _inputs_of(prompt, examples)
    if trunk is not None:
        journal.set(trunk.passed([row.number for row in rows]))
    leading = len(prompt.virtual_ids)
    wanted = [
        (number, leading + len(example.context) - 1 + place, token)
        for number, example in enumerate(examples)
        for place, token in enumerate(example.answer)
    ]
    places, positions, tokens = torch.tensor(wanted, dtype=torch.int64).unbind(1)
    with prompt.applied(lm.model, ids, mask) as inputs:
        if task.compares:
            choices = torch.tensor([label[0] for label in task.label_ids])
            logits = choice_logits(lm.model, places, positions, choices, inputs)
            right = torch.tensor([example.label for example in examples])
            return F.cross_entropy(logits, right, reduction="none"), logits.argmax(-1)
        each = token_losses(lm.model, places, positions, tokens, **inputs)
    none = torch.zeros(0, dtype=torch.int64)
    return torch.zeros(len(rows)).index_add(0, places, each), none


def _refuse_non_finite(losses: Tensor, examples: Sequence[Example]) -> None:
    bad = (~losses.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        error = NonFiniteError(f"the loss is {float(losses[bad[0]].detach())}")
        error.row = bad[0]
        raise error


def _named(error: NonFiniteError, examples: Sequence[Example]) -> TuningError:
    """Say which example made a number that is none."""
    where = examples[error.row] if error.row is not None else None
    name = "one of " + ", ".join(e.name for e in examples[:3]) if where is None else where.name
    return TuningError(f"{name}: {error}")


def judgement(task: Task, results: Sequence[Any]) -> tuple[float, float | None]:
    """Return the mean loss of a validation, and the accuracy where there are labels."""
    losses: dict[int, float] = {}
    chosen: dict[int, int] = {}
    for numbers, found, labels in results:
        losses.update(zip(numbers, found, strict=True))
        chosen.update(zip(numbers, labels, strict=False))
    if not task.labels:
        num_tokens = sum(len(example.answer) for example in task.validation)
        return math.fsum(losses[n] for n in range(len(losses))) / num_tokens, None
    count, width = len(task.validation), len(task.labels)
    right = [example.label or 0 for example in task.validation]
    if task.compares:
        mean = math.fsum(losses[n] for n in range(count)) / count
        return mean, sum(chosen[n] == right[n] for n in range(count)) / count
    table = [[losses[n * width + label] for label in range(width)] for n in range(count)]
    total = sum(len(example.answer) for example in task.validation)
    mean = math.fsum(row[label] for row, label in zip(table, right, strict=True)) / total
    hits = sum(row.index(min(row)) == label for row, label in zip(table, right, strict=True))
    return mean, hits / count


def fill_rider(lm: StreamedLM, prompt: SoftPrompt, rows: Sequence[Example], num_blocks: int) -> Any:
    """Pass a micro-batch through the trunk; return what its last block gives."""
    reach.set(Reach(end=num_blocks))
    filling = Filling(num_blocks)
    journal.set(filling)
    ids, mask = _inputs_of(prompt, rows)
    with torch.no_grad(), contextlib.suppress(StopForward), prompt.applied(lm.model, ids, mask) as inputs:
        lm.model(**{"use_cache": False, **inputs})
    return filling.output
