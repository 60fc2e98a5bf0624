"""What each button of the page does, as HTML that is renewed until it is over; knows nothing of Gradio."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slowllm.entrypoints.web import completing, files, judging
from slowllm.entrypoints.web.completing import Completion, complete, settings_of
from slowllm.entrypoints.web.desk import STOPPED, Desk, Errand
from slowllm.entrypoints.web.files import answer_file
from slowllm.entrypoints.web.judging import (
    Scored,
    choices_of,
    choose,
    perplexity_in_words,
    score,
    yes_no_item,
)
from slowllm.entrypoints.web.words import (
    bars_html,
    paragraph,
    progress_html,
    scale_html,
    tokens_html,
)
from slowllm.errors import InputError, RideError, SlowLLMError, counted
from slowllm.html import escaped
from slowllm.inference.choices import Chosen, Item, Normalize


@dataclass(frozen=True)
class Shown:
    """What a tab shows.

    Attributes:
        status: HTML of one sentence.
        body: HTML of what has come so far.
        is_over: whether nothing more comes.
        problem: why it was not done, in one sentence.
        file: to download.
    """

    status: str
    body: str
    is_over: bool = False
    problem: str | None = None
    file: Path | None = None


async def _answers(
    desk: Desk, visitor: str, kind: str, work: Callable[[Errand], AsyncIterator[Shown]]
) -> AsyncIterator[Shown]:
    """Yield what work shows, as an errand of a visitor that ends with it; and at the end what was wrong, if anything was."""
    body = ""
    with desk.errand(visitor, kind) as errand:
        try:
            async with contextlib.aclosing(work(errand)) as found:  # type: ignore[type-var]
                async for shown in found:
                    body = shown.body
                    yield shown
        except SlowLLMError as error:
            if isinstance(error, RideError) and errand.is_stopped:
                yield Shown(paragraph(f"{STOPPED[0].upper()}{STOPPED[1:]}."), body, is_over=True)
            else:
                said = str(error)
                yield Shown(paragraph(said, "problem"), body, is_over=True, problem=said)


def completed(desk: Desk, visitor: str, text: str, form: Mapping[str, Any]) -> AsyncIterator[Shown]:
    """Continue a prompt.

    Args:
        desk: of the service.
        visitor: who asks.
        text: the prompt.
        form: see `settings_of`.
    """

    async def work(errand: Errand) -> AsyncIterator[Shown]:
        settings = settings_of(form)
        async for found in complete(desk, errand, text, settings):
            yield Shown(paragraph(found.status), _completion_html(text, found), found.is_over)

    return _answers(desk, visitor, completing.KIND, work)


def _completion_html(prompt: str, found: Completion) -> str:
    if found.tokens:
        boxes = [f'<div class="continuation">{tokens_html(tokens)}</div>' for tokens in found.tokens]
        return "".join(boxes) + scale_html()
    return "".join(
        f'<div class="continuation"><span class="prompt">{escaped(prompt)}</span><span class="new">{escaped(text)}</span></div>'
        for text in found.texts
    )


def scored(desk: Desk, visitor: str, text: str) -> AsyncIterator[Shown]:
    """Score a text."""

    async def work(errand: Errand) -> AsyncIterator[Shown]:
        if not text.strip():
            raise InputError("give a text to score")
        async for found in score(desk, errand, text):
            yield Shown(paragraph(found), "") if isinstance(found, str) else _scored(found)

    return _answers(desk, visitor, judging.SCORE, work)


def _scored(found: Scored) -> Shown:
    likelihood = found.likelihood
    number = len(likelihood.tokens)
    said = (
        f"{counted(number, 'token')}: log-likelihood {likelihood.log_likelihood:,.3f} nats, {likelihood.mean_nll:.3f} nats of "
        f"surprisal a token, perplexity {perplexity_in_words(likelihood)}"
    )
    body = f'<div class="continuation">{tokens_html(found.tokens)}</div>{scale_html()}'
    return Shown(paragraph(said), body, is_over=True)


def chosen(
    desk: Desk, visitor: str, context: str, choices: str, adds_blank: bool, normalize: Normalize
) -> AsyncIterator[Shown]:
    """Compare choices after a context.

    Args:
        desk: of the service.
        visitor: who asks.
        context: may be empty.
        choices: one a line.
        adds_blank: whether each gets a blank before it.
        normalize: see `encode_item`.
    """

    async def work(errand: Errand) -> AsyncIterator[Shown]:
        item = Item(context, choices_of(choices, adds_blank=adds_blank))
        async for shown in _compared(desk, errand, item, normalize):
            yield shown

    return _answers(desk, visitor, judging.CHOOSE, work)


def yes_or_no(
    desk: Desk, visitor: str, question: str, template: str, yes: str, no: str
) -> AsyncIterator[Shown]:
    """Answer a question with one of two words; see `yes_no_item`."""

    async def work(errand: Errand) -> AsyncIterator[Shown]:
        item = yes_no_item(question, template, yes, no)
        async for shown in _compared(desk, errand, item, "none"):
            yield shown

    return _answers(desk, visitor, judging.YES_NO, work)


async def _compared(desk: Desk, errand: Errand, item: Item, normalize: Normalize) -> AsyncIterator[Shown]:
    async for found in choose(desk, errand, item, normalize):
        yield Shown(paragraph(found), "") if isinstance(found, str) else _bars(item, found)


def _bars(item: Item, found: Chosen) -> Shown:
    names = [choice.strip() or repr(choice) for choice in item.choices]
    rows = [
        (name, share, f"{value:,.3f} nats")
        for name, share, value in zip(names, found.probabilities, found.scores, strict=True)
    ]
    said = f"Likeliest: {names[found.best]}, with probability {found.probabilities[found.best]:.4f} against the others"
    return Shown(paragraph(said), bars_html(rows, found.best), is_over=True)


def file_answered(
    desk: Desk, visitor: str, upload: str | None, what: files.What, max_new_tokens: float | None, folder: Path
) -> AsyncIterator[Shown]:
    """Score or continue the lines of a file.

    Args:
        desk: of the service.
        visitor: who asks.
        upload: its path; None where none was given.
        what: is done with the lines.
        max_new_tokens: of continuations.
        folder: in which the result is written, in one of its own.
    """

    async def work(errand: Errand) -> AsyncIterator[Shown]:
        if upload is None:
            raise InputError("upload a file of lines first")
        settings = settings_of({"max_new_tokens": max_new_tokens})
        own = folder / secrets.token_hex(16)
        own.mkdir()
        result = own / "results.jsonl"
        async for found in answer_file(desk, errand, Path(upload), what, settings, result):
            body = progress_html(found.num_done / found.num_lines)
            yield Shown(paragraph(found.status), body, found.result is not None, file=found.result)

    return _answers(desk, visitor, files.KIND, work)
