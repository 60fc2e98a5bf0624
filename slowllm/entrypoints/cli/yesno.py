"""`slowllm yesno`: answer questions with yes or no by likelihood."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.output import json_writer, print_table, prints_text
from slowllm.entrypoints.cli.runner import Runner
from slowllm.errors import InputError
from slowllm.files import read_lines


def yesno(
    file: Annotated[str, typer.Argument(help="Text file, one question a line; - reads standard input.")],
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    prompt: options.Prompt = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
    yes: Annotated[str, typer.Option("--yes", help="The word for the first answer.")] = "yes",
    no: Annotated[str, typer.Option("--no", help="The word for the second answer.")] = "no",
    template: Annotated[
        str,
        typer.Option(
            help=r"Prompt that contains {question}; \n is a line break. The answer follows it after a blank."
        ),
    ] = r"Question: {question}\nAnswer:",
    state: options.State = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer the questions of a text file with yes or no.

    Every non-empty line is a question. Prints each answer with the probability of yes against no.
    """
    options.log_to_stderr(verbose)
    lines = read_lines(file)
    if "{question}" not in template:
        raise InputError(f"--template {template!r} has no {{question}}")
    pattern = template.replace("\\n", "\n")
    if not yes.strip() or not no.strip() or yes.strip() == no.strip():
        raise InputError(f"--yes {yes!r} and --no {no!r} must be two different words, neither of them empty")
    runner = Runner(
        model,
        ram,
        device,
        vram,
        dtype,
        prompt=prompt,
        state=state,
        kind="yesno",
        overwrite=overwrite,
        dry_run=dry_run,
    )
    out = runner.check_output(out, file)
    from slowllm.inference import choices
    from slowllm.runtime.run_identity import digest_of

    blank = "" if pattern[-1].isspace() else " "
    items = []
    for number, text in lines:
        item = choices.Item(pattern.replace("{question}", text), (blank + yes.strip(), blank + no.strip()))
        try:
            items.append(choices.encode_item(runner.info, item))
        except InputError as error:
            raise InputError(f"{file}: line {number}: {error}") from error
    queries = [query for item in items for query in item.queries]
    if dry_run:
        runner.print_plan_of_queries(queries, as_json=as_json)
        return
    relative = all(item.is_relative for item in items)
    cells = []

    def settings() -> dict[str, Any]:
        words = {"template": pattern, "yes": yes.strip(), "no": no.strip()}
        return {**words, "lines": digest_of(lines)}

    with contextlib.ExitStack() as stack:
        lm, saved = stack.enter_context(runner.open_for_queries(queries, settings))
        write = None if prints_text(out, as_json) else stack.enter_context(json_writer(out))
        answers = choices.choose(lm, items, relative=relative, state=saved)
        for (number, text), judged in zip(lines, answers, strict=True):
            answer, p_yes = (yes, no)[judged.best].strip(), judged.probabilities[0]
            if write is None:
                cells.append((str(number), f"{p_yes:.4f}", answer, text))
            else:
                write({"line": number, "question": text, "p_yes": p_yes, "answer": answer})
    if write is None:
        print_table(("line", "P(yes)", "answer", "question"), cells)
