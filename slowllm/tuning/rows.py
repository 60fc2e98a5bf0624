"""The rows of a step: examples behind their soft prompts, with the tokens to be learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slowllm.tuning.examples import Example, Task


@dataclass(frozen=True)
class NumberedExample:
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


def validation_rows(task: Task) -> list[NumberedExample]:
    """Return the rows by which a prompt is judged: each example, or each with every label that is not one token."""
    rows: list[Example] = []
    for example in task.validation:
        if task.labels and not task.compares:
            rows += [replace(example, answer=ids, label=n) for n, ids in enumerate(task.label_ids)]
        else:
            rows.append(example)
    return [NumberedExample(row, len(task.train) + n) for n, row in enumerate(rows)]
