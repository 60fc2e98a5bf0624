"""What may be asked of a service, what it answers, and what memory is planned for.

Plain data; knows no model's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slowllm.errors import InputError
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.prompt_scores import PromptScores
from slowllm.inference.text import TextSide, max_line_tokens
from slowllm.planning.job import ContinuedRow, Job


@dataclass(frozen=True)
class Ask:
    """One prompt, and what is asked about it.

    Attributes:
        prompt: to be continued.
        num_prompt_top: also give the log-probability of each token of the prompt, and the likeliest so many of its place;
            None for none.
        only_prompt: score the prompt, and make no new token.
    """

    prompt: Prompt
    num_prompt_top: int | None = None
    only_prompt: bool = False


@dataclass(frozen=True)
class PartialContinuation:
    """How far a continuation has come.

    Attributes:
        number: among the continuations of its prompt.
        ids: of its tokens so far, EOS not among them.
        log_probs: of these tokens; None where nobody asked for them, or where they are known at the end only.
        top_log_probs: of the likeliest tokens of each place, by id; as `log_probs`.
    """

    number: int
    ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None
    top_log_probs: tuple[dict[int, float], ...] | None = None


# Called on a rider's thread whenever a continuation has grown; must neither block nor raise.
OnPartial = Callable[[PartialContinuation], None]


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        continuations: as many as the settings ask for; none where only the prompt was scored.
        prompt_scores: of the prompt, where they were asked for.
    """

    continuations: tuple[Continuation, ...]
    prompt_scores: PromptScores | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """How a service is doing.

    Attributes:
        num_riding: asks that are under way.
        num_waiting: asks that wait for room.
        held_tokens: for which the asks under way have room.
        max_tokens: for which there is room.
        stop: where the carousel is; None before it has served one.
        num_stops: of the carousel.
        num_sweeps: that have passed the last stop.
        num_prompt_tokens: that have passed the model.
        num_new_tokens: that were made.
        num_found_tokens: of prompts, that were found in kept keys and values.
    """

    num_riding: int
    num_waiting: int
    held_tokens: int
    max_tokens: int
    stop: int | None
    num_stops: int
    num_sweeps: int
    num_prompt_tokens: int
    num_new_tokens: int
    num_found_tokens: int = 0


def service_job(lm: TextSide, max_tokens: int, longest: int, max_rows: int, kept_tokens: int = 0) -> Job:
    """Return the job that a model is opened for if it serves asks that nobody knows yet.

    Args:
        lm: the model, or its `ModelInfo`.
        max_tokens: that all asks under way hold at their end.
        longest: tokens of the longest of them, prompt and answer.
        max_rows: that are continued at once.
        kept_tokens: whose keys and values are kept behind answers.
    Raises:
        InputError: the model takes no sequences of that length, or the numbers do not go together.
    """
    if longest > (most := max_line_tokens(lm)):
        raise InputError(f"a sequence of {longest} tokens is longer than the {most} that the model takes")
    if max_rows < 1 or not 1 <= longest <= max_tokens:
        raise InputError(
            f"{max_tokens} tokens in all cannot hold {max_rows} rows and a sequence of {longest} tokens"
        )
    # The head's chunks and their sum, of every row; and of one row at a time, what its token is chosen with.
    rows = ((ContinuedRow(1, 2, 2, 1), max_rows), (ContinuedRow(1, 2, 0, 12), 1))
    return Job(
        num_tokens=max_tokens, longest=longest, repeated=True, forward_only=True, keeps_results=False,
        num_passes=max(1, longest // 2), rows=rows, cache_tokens=kept_tokens,
    )  # fmt: skip
