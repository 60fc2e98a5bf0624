"""Continue a prompt for a visitor, and say what has come while it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slowllm.entrypoints.web.desk import Desk, Errand
from slowllm.entrypoints.web.texts import refuse_long
from slowllm.entrypoints.web.waiting import Bell, until_done, where
from slowllm.entrypoints.web.words import ShownToken
from slowllm.errors import InputError, counted
from slowllm.inference.continuation import text_of
from slowllm.inference.generation_types import SAMPLING, Continuation, Prompt, Settings, encode_prompt
from slowllm.inference.pieces import pieces_of
from slowllm.inference.service_types import Ask, PartialContinuation

KIND = "complete"
# Settings that are whole numbers; a form may give them as 3.0.
_WHOLE = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "num_return_sequences",
    "top_k",
    "seed",
    "top_log_probs",
)


@dataclass(frozen=True)
class Completion:
    """What has come of a prompt so far.

    Attributes:
        status: in one sentence.
        texts: of the continuations so far, as many as were asked for.
        tokens: of each of them with its likelihood, at the end, where asked for.
        num_tokens: of the longest.
        seconds_a_token: without the first, of which the sweep passes the prompt; None before the second.
        is_over: whether no more comes.
    """

    status: str
    texts: tuple[str, ...]
    tokens: tuple[tuple[ShownToken, ...], ...] = ()
    num_tokens: int = 0
    seconds_a_token: float | None = None
    is_over: bool = False


def settings_of(form: Mapping[str, Any]) -> Settings:
    """Return settings from the fields of a form, by the names of `Settings`.

    Empty fields have their defaults, fields of sampling as well where `do_sample` is off; numbers may be given as texts; `stop` has
    a string a line.

    Raises:
        InputError: a value cannot be used.
    """
    given = {name: value for name, value in form.items() if value is not None and value != ""}
    if not given.get("do_sample"):
        given = {name: value for name, value in given.items() if name not in (*SAMPLING, "top_k")}
    given |= {name: _whole(name, given[name]) for name in _WHOLE if name in given}
    # A stop string may have a line break in it, which is written as in the command line.
    stops = str(given.pop("stop", "")).splitlines()
    return Settings(**given, stop=tuple(stop.replace("\\n", "\n") for stop in stops if stop))


def _whole(name: str, value: object) -> int:
    try:
        number = int(value) if isinstance(value, str | int) else int(float(str(value)))
    except (ValueError, OverflowError):
        number = None
    if number is None or (isinstance(value, float) and number != value):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    return number


async def complete(desk: Desk, errand: Errand, text: str, settings: Settings) -> AsyncIterator[Completion]:
    """Yield what has come of a prompt, again and again until it has ended.

    Raises:
        SlowLLMError: what `Errand.submit` raises and its ride ends with, and InputError of a prompt without tokens.
    """
    prompt = await asyncio.to_thread(_encoded, desk, text, settings)
    bell, told = Bell(), dict[int, tuple[int, ...]]()
    started, first = time.monotonic(), list[float]()

    def on_partial(partial: PartialContinuation) -> None:
        told[partial.number] = partial.ids
        if not first:
            first.append(time.monotonic())
        bell.ring()

    ride = errand.submit(Ask(prompt), on_partial)
    async for _ in until_done([ride], bell):
        yield _so_far(desk, prompt, dict(told), started, first)
    found = ride.result().continuations
    yield await asyncio.to_thread(_ended, desk, prompt, found, started, first)


def _encoded(desk: Desk, text: str, settings: Settings) -> Prompt:
    refuse_long(text)
    with desk.tokenizing():
        return encode_prompt(desk.lm, text, settings)


def _so_far(
    desk: Desk, prompt: Prompt, told: Mapping[int, tuple[int, ...]], started: float, first: list[float]
) -> Completion:
    num_tokens = max(map(len, told.values()), default=0)
    texts = tuple(
        text_of(desk.lm, prompt, told.get(index, ())) for index in range(prompt.settings.num_return_sequences)
    )
    now = time.monotonic()
    if not first:
        return Completion(f"{now - started:.0f} s, no token yet: {where(desk)}", texts)
    seconds = (now - first[0]) / (num_tokens - 1) if num_tokens > 1 else None
    return Completion(
        f"{_rate(num_tokens, seconds, first[0] - started)}; {where(desk)}", texts, (), num_tokens, seconds
    )


def _ended(
    desk: Desk, prompt: Prompt, found: tuple[Continuation, ...], started: float, first: list[float]
) -> Completion:
    now, num_tokens = time.monotonic(), max(len(one.ids) for one in found)
    began = first[0] if first else now
    seconds = (now - began) / (num_tokens - 1) if num_tokens > 1 else None
    reasons = {"stop": "ended by EOS or a stop string", "length": "ended by max_new_tokens"}
    ends = ", ".join(reasons[reason] for reason in sorted({one.finish_reason for one in found}))
    shown = tuple(_shown(desk, prompt, one) for one in found if one.log_probs is not None)
    done = Completion("", tuple(one.text for one in found), shown, num_tokens, seconds, is_over=True)
    return replace(done, status=f"{_rate(num_tokens, seconds, began - started)}; {ends}")


def _rate(num_tokens: int, seconds: float | None, first_seconds: float) -> str:
    rate = "" if seconds is None else f", {seconds:.3g} s a token"
    return f"{counted(num_tokens, 'token')}{rate}, the first after {first_seconds:.2g} s"


def _shown(desk: Desk, prompt: Prompt, found: Continuation) -> tuple[ShownToken, ...]:
    assert found.log_probs is not None, "asked for"
    assert found.top_log_probs is not None, "asked for together"
    tokenizer = desk.lm.tokenizer
    texts = pieces_of(tokenizer, prompt.ids, found.ids)
    return tuple(
        ShownToken(text, log_prob, likeliest(tokenizer, top))
        for text, log_prob, top in zip(texts, found.log_probs, found.top_log_probs, strict=True)
    )


def likeliest(tokenizer: Any, top: Mapping[int, float]) -> tuple[tuple[str, float], ...]:
    """Return the texts of the likeliest tokens of a place, with their log-probabilities."""
    return tuple((tokenizer.decode([token]), log_prob) for token, log_prob in top.items())
