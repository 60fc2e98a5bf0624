"""The rows that a task's examples make, each behind a soft prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slowllm.tuning.examples import Example, Task


@dataclass(frozen=True)
class NumberedExample:
    """A row of a trial's task.

    Attributes:
        example: the tokens.
        number: of the row in `all_rows`, under which frozen activations are kept.
    """

    example: Example
    number: int


def all_rows(task: Task) -> list[Example]:
    """Return all rows of a task: those learned, then those of validation."""
    return [*task.train, *(row.example for row in validation_rows(task))]


def validation_rows(task: Task) -> list[NumberedExample]:
    """Return the rows of a validation: each example once, or with every label if labels have several tokens."""
    rows: list[Example] = []
    for example in task.validation:
        if task.labels and not task.compares:
            rows += [replace(example, answer=ids, label=n) for n, ids in enumerate(task.label_ids)]
        else:
            rows.append(example)
    return [NumberedExample(row, len(task.train) + n) for n, row in enumerate(rows)]
