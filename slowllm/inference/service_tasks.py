"""An ask on its way through a service, and the room that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from slowllm.errors import InputError
from slowllm.inference.generation_types import Continuation, Prompt, check_prompt
from slowllm.inference.prompt_scores import PromptScores
from slowllm.inference.service_types import Answer, Ask, OnPartial
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.ride import Ride

# A row may be padded to the length of its class; lengths of one class differ by this factor at most.
GROWTH = 2
# The shortest class.
LEAST_TOKENS = 64


@dataclass(eq=False)
class ServiceTask:
    """An ask on its way: what has come of it, and what is still to come.

    Attributes:
        num_tokens: that it holds at its end, padding included.
        num_rows: of a batch that it takes.
        num_parts: riders and rows that still work on it.
        is_over: whether it was answered, has failed or was cancelled.
    """

    ask: Ask
    on_partial: OnPartial | None
    ride: Ride[Answer]
    num_tokens: int
    num_rows: int
    num_parts: int = 0
    scores: PromptScores | None = None
    continuations: dict[int, Continuation] = field(default_factory=dict)
    is_over: bool = False
    is_riding: bool = False
    cancel_rider: Callable[[], None] | None = None


def checked_size(lm: StreamedLM, ask: Ask, max_rows: int, *, joins: bool) -> tuple[int, int]:
    """Return the tokens and rows for which an ask needs room.

    Args:
        lm: a loaded model.
        ask: what is asked.
        max_rows: that are continued at once.
        joins: whether its rows share a batch with those of others, and so are padded.
    Raises:
        InputError: this model cannot do that, or was not opened for so much.
    """
    plan, settings = lm.plan, ask.prompt.settings
    check_prompt(lm, ask.prompt, "the prompt")
    prompt = replace(ask.prompt, num_virtual=lm.num_virtual_tokens)
    length = prompt.width + (0 if ask.only_prompt else settings.max_new_tokens)
    num_rows = 1 if ask.only_prompt else settings.num_rows
    if length * num_rows > plan.sweep_tokens or length > plan.longest or num_rows > max_rows:
        raise InputError(
            f"the request has {num_rows} times {length} tokens, its answers included, but memory was planned for "
            f"{max_rows} rows and {plan.sweep_tokens} tokens in all, {plan.longest} in one"
        )
    if joins:
        length = min(class_of(prompt), plan.sweep_tokens // num_rows)
    return length * num_rows, num_rows


def class_of(prompt: Prompt) -> int:
    """Return the length to which a row may be padded."""
    length = LEAST_TOKENS
    while length < prompt.width + prompt.settings.max_new_tokens:
        length *= GROWTH
    return length
