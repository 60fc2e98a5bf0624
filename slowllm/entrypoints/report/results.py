"""What a verb hands over to its report: one object for each result, as small as the verb has it anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slowllm.inference.choices import Chosen
    from slowllm.inference.generation_types import Continuation
    from slowllm.inference.likelihood import Likelihood
    from slowllm.inference.prompt_templates import Question


@dataclass(frozen=True)
class LineScored:
    """A line that `forward` has scored.

    Attributes:
        where: what its row in a table is called.
        text: of the line.
        ids: of its tokens, the first of which may be unscored.
        likelihood: of those that are scored.
    """

    where: str
    text: str
    ids: Sequence[int]
    likelihood: Likelihood


@dataclass(frozen=True)
class QuestionAnswered:
    """A question that `eval` has answered."""

    question: Question
    chosen: Chosen


@dataclass(frozen=True)
class TaskMeasured:
    """A figure of one of lm-eval's tasks.

    Attributes:
        task: its name.
        metric: its name, with that of the filter.
        value: of the metric.
        stderr: its standard error, where it is known.
    """

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class StepDone:
    """A record of `tune`: of a step, or of a validation; see `slowllm.tuning.session`."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class PromptContinued:
    """A prompt that `generate` has continued."""

    prompt: str
    continuations: Sequence[Continuation]


Result = LineScored | QuestionAnswered | TaskMeasured | StepDone | PromptContinued
