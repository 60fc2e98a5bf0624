"""What the plan must know of tuning steps: their tokens, their micro-batches and the memory of trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slowllm.modeling.batching import BatchRule
from slowllm.planning.job import Job
from slowllm.planning.packing import pack
from slowllm.tuning.examples import Example, Task
from slowllm.tuning.recipe import Recipe
from slowllm.tuning.rows import all_rows

# Most tokens of a micro-batch: as many as reach the processor's rate, or fewer where memory is short.
RIDER_TOKENS = (512, 256, 128, 64)
PADDING_TOKENS = 64
# Copies that a trial holds of each of its numbers: the number itself, where it began, the last good one, two of AdamW;
# and while a step ends the copies of riders, gradients, and what goes to the state.
TRIAL_COPIES = 12

# The name, the task and the recipe of a trial; see `recipe.make_trials`.
TrialPlan = tuple[str, Task, Recipe]


def trial_bytes(plans: Sequence[TrialPlan], hidden_size: int, num_blocks: int, first_block: int) -> int:
    """Return the memory of all trials beside the model: numbers, optimizer states, copies and gradients."""
    num_vectors = {"shallow": 1, "deep": 1 + num_blocks - first_block, "prefix": 2 * num_blocks}
    count = sum(recipe.num_tokens * hidden_size * num_vectors[recipe.kind] for _, _, recipe in plans)
    return count * 4 * TRIAL_COPIES


def row_tokens(task: Task, recipe: Recipe) -> list[int]:
    """Return the tokens of each row of a task, those of the soft prompt included."""
    return [recipe.num_tokens + len(row.ids) for row in all_rows(task)]


def frozen_job(plans: Sequence[TrialPlan], max_rider_tokens: int) -> Job:
    """Return the job of passing all rows through the frozen blocks once."""
    lengths = [tokens for _, task, recipe in plans for tokens in row_tokens(task, recipe)]
    longest, total = max(lengths), sum(lengths)
    rider = max(longest, min(max_rider_tokens, total))
    return Job(total, longest, forward_only=True, keeps_results=False, rider_tokens=rider)


def step_job(plans: Sequence[TrialPlan], first_block: int, max_rider_tokens: int) -> Job:
    """Return the job of one step of all trials, in which a prefix counts as tokens: fewer examples then fit a micro-batch."""
    longest = max(max(row_tokens(task, recipe)) for _, task, recipe in plans)
    total = sum(_step_tokens(task, recipe, max_rider_tokens) for _, task, recipe in plans)
    rider = max(rider_tokens(task, recipe, max_rider_tokens) for _, task, recipe in plans)
    return Job(
        max(total, longest), longest, repeated=True, forward_only=False, keeps_results=False, turns=True,
        first_stop=first_block, rider_tokens=rider,
    )  # fmt: skip


def rider_tokens(task: Task, recipe: Recipe, max_rider_tokens: int) -> int:
    """Return the tokens of a trial's micro-batches. They follow from the trial alone, because rounding depends on them."""
    return max(*row_tokens(task, recipe), min(max_rider_tokens, sum(_longest_step(task, recipe))))


def pack_rows(
    examples: Sequence[Example], task: Task, recipe: Recipe, max_rider_tokens: int, rule: BatchRule
) -> Iterator[tuple[list[int], int]]:
    """Yield the micro-batches of some examples: the indices of each, and its tokens with padding."""
    lengths = [recipe.num_tokens + len(example.ids) for example in examples]
    for batch in pack_alike(lengths, rider_tokens(task, recipe, max_rider_tokens), rule):
        yield batch, len(batch) * lengths[batch[0]]  # the longest comes first


def pack_alike(lengths: Sequence[int], rider_tokens: int, rule: BatchRule) -> list[list[int]]:
    """Divide rows into micro-batches of rows that the model computes as each alone; see `packing.pack`."""
    classes = [rule.length_class(length) for length in lengths]
    return pack(lengths, 1 if rule.rides_alone else rider_tokens, PADDING_TOKENS, classes=classes)


def _longest_step(task: Task, recipe: Recipe) -> list[int]:
    """Return the tokens of a step's examples, longest first, if it drew the longest of all."""
    lengths = sorted((recipe.num_tokens + len(example.ids) for example in task.train), reverse=True)
    return lengths[: recipe.step_examples]


def _step_tokens(task: Task, recipe: Recipe, max_rider_tokens: int) -> int:
    """Return the most tokens of a step, padding included."""
    lengths = _longest_step(task, recipe)
    num_batches = len(pack(lengths, rider_tokens(task, recipe, max_rider_tokens), PADDING_TOKENS))
    return min(len(lengths) * lengths[0], sum(lengths) + (num_batches + 1) * PADDING_TOKENS)
