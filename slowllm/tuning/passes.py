"""What riders do in tuning: learn a micro-batch, judge one, fill the frozen trunk, and find where prompts begin.

Each function named after a rider runs as one, and returns what it found; the numbers of trials are left as they are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from slowllm.errors import InputError, NonFiniteError, SlowLLMError, TuningError
from slowllm.modeling.head import last_hidden
from slowllm.modeling.losses import choice_logits, token_losses
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.runtime.state import journal
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.riders import Reach, reach
from slowllm.tuning.examples import Example, Task
from slowllm.tuning.frozen_activations import Enough, Filling, Trunk
from slowllm.tuning.trial import Recipe, Trial


@dataclass(frozen=True)
class Row:
    """A row of a trial's task.

    Attributes:
        example: what is passed.
        number: under which the trunk knows it.
    """

    example: Example
    number: int


def all_rows(task: Task) -> list[Example]:
    """Return all rows that a task's examples make: those learned, then those judged."""
    return [*task.train, *(row.example for row in validation_rows(task))]


def validation_rows(task: Task) -> list[Row]:
    """Return the rows by which a prompt is judged: each example, or each with every label that is not one token."""
    rows: list[Example] = []
    for example in task.validation:
        if task.labels and not task.compares:
            rows += [replace(example, answer=ids, label=n) for n, ids in enumerate(task.label_ids)]
        else:
            rows.append(example)
    return [Row(row, len(task.train) + n) for n, row in enumerate(rows)]


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
    lm: StreamedLM, trial: Trial, rows: Sequence[Row], total: int, trunk: Trunk | None, hint: Reach
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
    rows: Sequence[Row],
    numbers: Sequence[int],
    trunk: Trunk | None,
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
    lm: StreamedLM, prompt: SoftPrompt, task: Task, rows: Sequence[Row], trunk: Trunk | None
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
    with torch.no_grad(), contextlib.suppress(Enough), prompt.applied(lm.model, ids, mask) as inputs:
        lm.model(**{"use_cache": False, **inputs})
    return filling.output


def starts_of(lm: StreamedLM, recipes: Sequence[Recipe], first: int) -> list[SoftPrompt]:
    """Return where each trial begins; keys and values of prefixes take one sweep for all of them."""
    ids = [_first_ids(lm, recipe) for recipe in recipes]
    jobs = [
        functools.partial(_pairs_rider, lm, found)
        for recipe, found in zip(recipes, ids, strict=True)
        if recipe.kind == "prefix"
    ]
    pairs = iter(lm.ride(jobs) if jobs else [])
    width, num_blocks = int(lm.config.get_text_config().hidden_size), len(lm.layout.blocks)
    starts = []
    for recipe, found in zip(recipes, ids, strict=True):
        if recipe.kind == "prefix":
            starts.append(above(_spread_alike(SoftPrompt("prefix", pairs=next(pairs)), recipe), first))
            continue
        with torch.no_grad():
            rows = lm.model.get_input_embeddings()(found).float().cpu()
        vectors: tuple[Tensor, ...] = ()
        if recipe.kind == "deep":
            vectors = tuple(torch.zeros(recipe.num_tokens, width) for _ in range(num_blocks))
        starts.append(above(_spread_alike(SoftPrompt(recipe.kind, rows, vectors), recipe), first))
    return starts


def above(start: SoftPrompt, first: int) -> SoftPrompt:
    """Take away the vectors of blocks that are not tuned."""
    return replace(start, vectors=(*[None] * min(first, len(start.vectors)), *start.vectors[first:]))


def _first_ids(lm: StreamedLM, recipe: Recipe) -> Tensor:
    """Return the tokens (P,) whose embeddings a prompt begins with."""
    if recipe.init == "text":
        found = lm.tokenizer(recipe.init_text, add_special_tokens=False, verbose=False)["input_ids"]
        if not found:
            raise InputError(f"the tokenizer makes no tokens of init_text {recipe.init_text!r}")
        repeated = -(-recipe.num_tokens // len(found)) * list(found)
        return torch.tensor(repeated[: recipe.num_tokens])
    dice = torch.Generator("cpu").manual_seed(recipe.seed)
    return torch.randint(int(lm.config.get_text_config().vocab_size), (recipe.num_tokens,), generator=dice)


def _pairs_rider(lm: StreamedLM, ids: Tensor) -> tuple[Tensor, ...]:
    cache = DynamicCache(config=lm.model.config.get_text_config())
    # The head has no keys and values.
    reach.set(Reach(end=len(lm.layout.blocks)))
    with torch.no_grad():
        last_hidden(lm.model, {"input_ids": ids[None], "past_key_values": cache, "use_cache": True})
    pairs = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape != values.shape or keys.shape[2] != len(ids):
            raise InputError(
                "this model does not keep keys and values of one shape for every token, so it takes no prefix; use a "
                "shallow or deep prompt"
            )
        pairs.append(torch.stack([keys[0], values[0]]).float().cpu())
    return tuple(pairs)


def _spread_alike(start: SoftPrompt, recipe: Recipe) -> SoftPrompt:
    """Replace the numbers of a start by random ones of their mean and spread, where the recipe says so."""
    if recipe.init != "random":
        return start
    dice = torch.Generator("cpu").manual_seed(recipe.seed)

    def drawn(tensor: Tensor) -> Tensor:
        return tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=dice)

    embeddings = None if start.embeddings is None else drawn(start.embeddings)
    pairs = tuple(torch.stack([drawn(side) for side in pair]) for pair in start.pairs)
    return replace(start, embeddings=embeddings, pairs=pairs)
