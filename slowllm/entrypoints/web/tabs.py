"""The tabs of the page in which something is asked: their fields, and which of them each button takes."""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from slowllm.entrypoints.web import answers, completing, files, judging
from slowllm.entrypoints.web.answers import Shown
from slowllm.entrypoints.web.desk import Desk
from slowllm.inference.choices import Normalize

# Events are the page's own, and no API for programs.
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_NORMALIZE: tuple[Normalize, ...] = ("none", "tokens", "characters", "unconditional")
_YES_NO_TEMPLATE = r"Question: {question}\nAnswer:"


def _connect(
    desk: Desk,
    kind: str,
    fields: Sequence[Any],
    answer: Callable[..., AsyncIterator[Shown]],
    label: str,
    submits: Sequence[Any] = (),
    file: Any = None,
) -> None:
    """Add the buttons of a tab, and let them ask and stop.

    Args:
        desk: of the service.
        kind: of the tab's errands.
        fields: whose values `answer` takes behind the visitor.
        answer: what is shown.
        label: of the button.
        submits: text boxes in which Enter asks as well.
        file: the component that gets what can be downloaded.
    """
    with gr.Row():
        run = gr.Button(label, variant="primary", elem_id=f"{_id(kind)}-run")
        stop = gr.Button("Stop", interactive=False, elem_id=f"{_id(kind)}-stop")
    status = gr.HTML(elem_id=f"{_id(kind)}-status")
    body = gr.HTML(elem_id=f"{_id(kind)}-body")
    outputs = [status, body, run, stop, *([] if file is None else [file])]

    async def asked(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        downloads = [] if file is None else [gr.File(None, visible=False)]
        yield ["", "", gr.Button(interactive=False), gr.Button(interactive=True), *downloads]
        async for shown in answer(str(request.session_hash), *values):
            if shown.problem is not None:
                gr.Warning(html.escape(shown.problem))
            if shown.file is not None:
                downloads = [gr.File(str(shown.file), visible=True)]
            is_over = shown.is_over
            yield [
                shown.status, shown.body, gr.Button(interactive=is_over), gr.Button(interactive=not is_over), *downloads,
            ]  # fmt: skip

    def stopped(request: gr.Request) -> None:
        desk.leave(str(request.session_hash), kind)

    triggers = [run.click, *(box.submit for box in submits)]
    gr.on(triggers, asked, list(fields), outputs, trigger_mode="once", **_PRIVATE)
    stop.click(stopped, None, None, queue=False, **_PRIVATE)


def _id(kind: str) -> str:
    return kind.replace(" ", "-")


def complete_tab(desk: Desk) -> None:
    """Add the tab that continues a prompt."""
    prompt = gr.Textbox(
        label="Prompt", lines=4, max_lines=12, elem_id="complete-text", placeholder="A text to be continued"
    )
    with gr.Row():
        most = gr.Number(
            32, label="max_new_tokens", precision=0, minimum=1, elem_id="complete-max-new-tokens"
        )
        least = gr.Number(0, label="min_new_tokens", precision=0, minimum=0)
        tops = gr.Textbox(label="top_log_probs", placeholder="none", elem_id="complete-top-log-probs")
    with gr.Accordion("Sampling, beams, penalty and stop strings", open=False):
        samples = gr.Checkbox(False, label="do_sample", info="Draw tokens instead of the likeliest")
        with gr.Row():
            temperature = gr.Number(1.0, label="temperature", minimum=0.0001, step=0.1, interactive=False)
            top_k = gr.Number(50, label="top_k (0 for all)", precision=0, minimum=0, interactive=False)
            top_p = gr.Number(1.0, label="top_p", minimum=0, maximum=1, step=0.05, interactive=False)
            seed = gr.Textbox(label="seed", placeholder="random", interactive=False)
        with gr.Row():
            sequences = gr.Number(1, label="num_return_sequences", precision=0, minimum=1)
            beams = gr.Number(1, label="num_beams", precision=0, minimum=1)
            penalty = gr.Number(1.0, label="repetition_penalty", minimum=0.0001, step=0.1)
        stop = gr.Textbox(label="stop", lines=2, info=r"Strings that end it, one a line; \n is a line break")
    drawn = [temperature, top_k, top_p, seed]
    samples.change(
        lambda on: [gr.update(interactive=on) for _ in drawn], samples, drawn, queue=False, **_PRIVATE
    )
    names = (
        "max_new_tokens", "min_new_tokens", "num_return_sequences", "num_beams", "top_log_probs", "do_sample",
        "temperature", "top_k", "top_p", "seed", "repetition_penalty", "stop",
    )  # fmt: skip
    fields = [prompt, most, least, sequences, beams, tops, samples, *drawn, penalty, stop]

    def answer(visitor: str, text: str, *values: Any) -> AsyncIterator[Shown]:
        return answers.completed(desk, visitor, text or "", dict(zip(names, values, strict=True)))

    _connect(desk, completing.KIND, fields, answer, "Complete")


def score_tab(desk: Desk) -> None:
    """Add the tab that scores a text."""
    text = gr.Textbox(
        label="Text",
        lines=6,
        max_lines=12,
        elem_id="score-text",
        placeholder="A text to be scored, token by token",
    )

    def answer(visitor: str, given: str) -> AsyncIterator[Shown]:
        return answers.scored(desk, visitor, given or "")

    _connect(desk, judging.SCORE, [text], answer, "Score")


def choose_tab(desk: Desk) -> None:
    """Add the tab that compares choices."""
    context = gr.Textbox(
        label="Context",
        lines=3,
        max_lines=12,
        elem_id="choose-context",
        placeholder="What comes before; may be empty",
    )
    choices = gr.Textbox(label="Choices, one a line", lines=4, max_lines=12, elem_id="choose-choices")
    with gr.Row():
        blank = gr.Checkbox(True, label="A blank before each choice")
        normalize = gr.Dropdown(
            list(_NORMALIZE), value="none", label="normalize",
            info="Compare log-likelihoods as they are, by token, by character, or less those without the context",
        )  # fmt: skip

    def answer(
        visitor: str, before: str, given: str, adds_blank: bool, how: Normalize
    ) -> AsyncIterator[Shown]:
        return answers.chosen(desk, visitor, before or "", given or "", adds_blank, how)

    _connect(desk, judging.CHOOSE, [context, choices, blank, normalize], answer, "Choose")


def yes_no_tab(desk: Desk) -> None:
    """Add the tab that answers with yes or no."""
    question = gr.Textbox(label="Question", elem_id="yes-or-no-question")
    with gr.Row():
        template = gr.Textbox(
            _YES_NO_TEMPLATE,
            label="Template",
            info=r"{question} stands for the question, \n for a line break",
            scale=3,
        )
        yes = gr.Textbox("yes", label="One answer", info="By default: yes")
        no = gr.Textbox("no", label="The other", info="By default: no")

    def answer(visitor: str, *given: str) -> AsyncIterator[Shown]:
        return answers.yes_or_no(desk, visitor, *(one or "" for one in given))

    _connect(desk, judging.YES_NO, [question, template, yes, no], answer, "Answer", submits=[question])


def file_tab(desk: Desk, folder: Path) -> None:
    """Add the tab that scores or continues the lines of a file.

    Args:
        desk: of the service.
        folder: in which results are written.
    """
    upload = gr.File(label="Lines of text, or JSON Lines (.jsonl)", elem_id="file-upload", height=140)
    with gr.Row():
        what = gr.Radio(
            [("Score each line", "score"), ("Continue each line", "continue")], value="score", label="What is done",
            elem_id="file-what",
        )  # fmt: skip
        most = gr.Number(16, label="max_new_tokens", precision=0, minimum=1, info="Of each continuation")

    def answer(visitor: str, path: str | None, how: files.What, number: float | None) -> AsyncIterator[Shown]:
        return answers.file_answered(desk, visitor, path, how, number, folder)

    result = gr.File(
        label="Result, JSON Lines", interactive=False, elem_id="file-result", visible=False, render=False
    )
    _connect(desk, files.KIND, [upload, what, most], answer, "Start", file=result)
    result.render()  # type: ignore[no-untyped-call]
