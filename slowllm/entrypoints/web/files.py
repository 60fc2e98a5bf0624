"""Score or continue the lines of an uploaded file for a visitor: a few at a time, so that others ride beside them."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slowllm.entrypoints.progress import duration
from slowllm.entrypoints.web.desk import STOPPED, Desk, Errand
from slowllm.entrypoints.web.judging import ask_for, likelihood_of
from slowllm.entrypoints.web.texts import refuse_long
from slowllm.entrypoints.web.waiting import LOOK_SECONDS, REST_SECONDS, Bell, where
from slowllm.errors import BusyError, InputError, counted
from slowllm.files import parse_object, read_lines, replace_file
from slowllm.inference.generation_types import Settings, encode_prompt
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.service_types import Answer, Ask
from slowllm.inference.text import Query, encode_pair
from slowllm.streaming.ride import Ride
from slowllm.tables import kind_of

KIND = "file"
# What a file takes of memory with its tokens and results is some ten times its size.
MAX_UPLOAD_BYTES, MAX_LINES, MAX_FILES = 1 << 20, 10_000, 4
# Lines of one file that are asked for at once; those of others come between them. While some ride, as many wait for the end of
# their sweep.
MAX_AT_ONCE = 32
What = Literal["score", "continue"]
_KEYS = {"score": ("text", "continuation"), "continue": ("prompt", "text")}


@dataclass(frozen=True)
class FileLine:
    """A line of an uploaded file.

    Attributes:
        number: of it, from 1.
        read: what its result begins with.
        ask: what is asked about it.
        query: of a line that is scored.
    """

    number: int
    read: dict[str, Any]
    ask: Ask
    query: Query | None


@dataclass(frozen=True)
class FileProgress:
    """How far a file is.

    Attributes:
        status: in one sentence.
        num_done: lines.
        num_lines: in all.
        result: of the lines that are done, when no more come.
    """

    status: str
    num_done: int
    num_lines: int
    result: Path | None = None


async def answer_file(
    desk: Desk, errand: Errand, upload: Path, what: What, settings: Settings, result: Path
) -> AsyncIterator[FileProgress]:
    """Yield how far the lines of a file are, again and again; all lines are checked before the first is asked for.

    A file that is stopped ends with the result of the lines that were done.

    Args:
        desk: of the service.
        errand: for which is asked.
        upload: lines, or JSON Lines by the end of its name.
        what: scored, or continued.
        settings: of continuations.
        result: file of JSON lines that is written.
    Raises:
        InputError: the file is no text or has too many lines, or the model takes one of its lines not; the message names it.
        BusyError: there are too many files, or the service takes nothing, even with none of these lines under way.
        SlowLLMError: what a ride ends with.
    """
    desk.refuse_more(KIND, MAX_FILES)
    lines = await asyncio.to_thread(_read, desk, upload, what, settings)
    bell, started = Bell(), time.monotonic()
    left, riding = list(reversed(lines)), dict[int, Ride[Answer]]()
    done: dict[int, dict[str, Any]] = {}
    by_number = {line.number: line for line in lines}
    while (left or riding) and not errand.is_stopped:
        _submit(errand, left, riding, bell)
        await bell.wait(LOOK_SECONDS)
        await asyncio.sleep(
            REST_SECONDS
        )  # lines that rode together end together, and the next ones shall, too
        for number in [number for number, ride in riding.items() if ride.done()]:
            ride = riding.pop(number)
            if errand.is_stopped:
                continue
            done[number] = _result(by_number[number], ride.result())
        if left or riding:
            yield FileProgress(
                f"{_how_far(len(done), len(lines), started)}; {where(desk)}", len(done), len(lines)
            )
    rows = [json.dumps(done[number], ensure_ascii=False) + "\n" for number in sorted(done)]
    await asyncio.to_thread(replace_file, result, "".join(rows))
    said = f"{_how_far(len(done), len(lines), started)}" + (f"; {STOPPED}" if len(done) < len(lines) else "")
    yield FileProgress(said, len(done), len(lines), result)


def _submit(errand: Errand, left: list[FileLine], riding: dict[int, Ride[Answer]], bell: Bell) -> None:
    """Ask for as many of the lines that are left as may be under way at once; the last of `left` comes first."""
    while left and len(riding) < MAX_AT_ONCE and not errand.is_stopped:
        try:
            ride = errand.submit(left[-1].ask)
        except BusyError:
            if not riding:
                raise
            return  # asked for again when one of these lines has ended
        riding[left.pop().number] = ride
        ride.add_done_callback(bell.ring)


def _how_far(num_done: int, num_lines: int, started: float) -> str:
    seconds = time.monotonic() - started
    said = f"{num_done:,} of {counted(num_lines, 'line')} in {duration(seconds)}"
    if 0 < num_done < num_lines:
        said += f", about {duration(seconds / num_done * (num_lines - num_done))} left"
    return said


def _read(desk: Desk, upload: Path, what: What, settings: Settings) -> list[FileLine]:
    name, kind = upload.name, kind_of(upload)
    if kind not in ("text", "json"):
        raise InputError(f"{name}: is no file of lines; upload a text file, or JSON Lines that end in .jsonl")
    try:
        entries = read_lines(upload)
    except InputError as error:  # its own name is that of a folder of the server
        raise InputError(str(error).replace(str(upload), name)) from error
    if len(entries) > MAX_LINES:
        raise InputError(f"{name}: has {len(entries):,} lines, and this page takes {MAX_LINES:,}; divide it")
    lines = []
    with desk.tokenizing():
        for number, text in entries:
            try:
                content = (
                    parse_object(text, "is JSON, but no object") if kind == "json" else {_KEYS[what][0]: text}
                )
                lines.append(_line(desk, number, content, what, settings))
            except InputError as error:
                raise InputError(f"{name}: line {number}: {error}") from error
    return lines


def _line(desk: Desk, number: int, content: dict[str, Any], what: What, settings: Settings) -> FileLine:
    """Return a line of a file by its content, checked for this model."""
    key = next((key for key in _KEYS[what] if key in content), None)
    context = content.get("context", "") if key == "continuation" else ""
    if key is None or not isinstance(text := content[key], str) or not isinstance(context, str):
        wanted = '"text", or "context" and "continuation"' if what == "score" else '"prompt"'
        raise InputError(
            f"has no {wanted} that are texts" if what == "score" else f"has no {wanted} that is a text"
        )
    refuse_long(context + text)
    read = {name: content[name] for name in ("context", key) if name in content}
    if what == "score":
        query = encode_pair(desk.lm, context, text)
        ask = ask_for(query)
    else:
        query, ask = None, Ask(encode_prompt(desk.lm, text, settings))
    desk.check(ask)
    return FileLine(number, read, ask, query)


def _result(line: FileLine, answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"line": line.number, **line.read}
    if line.query is None:
        rows = [
            {"text": one.text, "finish_reason": one.finish_reason, "num_tokens": len(one.ids)}
            for one in answer.continuations
        ]
        return {**found, "continuations": rows}
    assert answer.prompt_scores is not None, "it was asked for"
    likelihood: Likelihood = likelihood_of(line.query, answer.prompt_scores)
    return {
        **found,
        "num_tokens": len(likelihood.tokens),
        "log_likelihood": likelihood.log_likelihood,
        "perplexity": likelihood.perplexity if math.isfinite(likelihood.perplexity) else None,
    }
