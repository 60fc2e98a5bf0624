"""`slowllm yesno`: answer questions with yes or no by likelihood."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs, options
from slowllm.entrypoints.cli.output import json_writer, print_table, prints_text
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.errors import InputError
from slowllm.files import parse_object
from slowllm.tables import kind_of


@takes_swarm
def yesno(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, one question a line; or CSV, Parquet or JSON Lines with questions in `question`. - or "
            "nothing reads standard input.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    text: inputs.Texts = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
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
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer questions with yes or no.

    Every non-empty line is a question. Prints each answer with the probability of yes against no.
    """
    options.log_to_stderr(verbose)
    files = inputs.choose_files(files, text, "a file of questions")
    entries = inputs.read_entries((), text)
    for file in files:
        entries += _questions(file)
    if "{question}" not in template:
        raise InputError(f"--template {template!r} has no {{question}}")
    pattern = template.replace("\\n", "\n")
    if not yes.strip() or not no.strip() or yes.strip() == no.strip():
        raise InputError(f"--yes {yes!r} and --no {no!r} must be two different words, neither of them empty")
    runner = Runner(
        model, ram, device, vram, dtype, prompt=prompt, state=state, kind="yesno",
        overwrite=overwrite, dry_run=dry_run, exact=exact, swarm=swarm,
    )  # fmt: skip
    out = runner.check_output(out, *files)
    runner.load_libraries()
    from slowllm.inference import choices
    from slowllm.runtime.run_identity import digest_of

    blank = "" if pattern[-1].isspace() else " "
    items = []
    for entry in entries:
        context = pattern.replace("{question}", entry.text)
        item = choices.Item(context, (blank + yes.strip(), blank + no.strip()))
        try:
            items.append(choices.encode_item(runner.info, item))
        except InputError as error:
            raise InputError(f"{entry.where}: {error}") from error
    queries = [query for item in items for query in item.queries]
    if dry_run:
        runner.print_plan_of_queries(queries, as_json=as_json)
        return
    relative = all(item.is_relative for item in items)
    cells = []

    def settings() -> dict[str, Any]:
        words = {"template": pattern, "yes": yes.strip(), "no": no.strip()}
        return {
            **words,
            "lines": digest_of(
                [entry.file if len(files) > 1 else "", entry.number, entry.text] for entry in entries
            ),
        }

    with contextlib.ExitStack() as stack:
        opened = runner.open_for_queries(queries, settings, "question", len(entries))
        lm, saved, count = stack.enter_context(opened)
        write = None if prints_text(out, as_json) else stack.enter_context(json_writer(out))
        answers = choices.choose(lm, items, relative=relative, state=saved)
        for entry, judged in zip(entries, answers, strict=True):
            answer, p_yes = (yes, no)[judged.best].strip(), judged.probabilities[0]
            count(0)
            if write is None:
                number = f"{entry.file}:{entry.number}" if len(files) > 1 else str(entry.number)
                cells.append((number, f"{p_yes:.4f}", answer, entry.text))
            else:
                row = {"line": entry.number, "question": entry.text, "p_yes": p_yes, "answer": answer}
                write({"file": entry.file, **row} if len(files) > 1 else row)
    if write is None:
        print_table(("line", "P(yes)", "answer", "question"), cells)


def _questions(file: str) -> list[inputs.Entry]:
    """Return the questions of a file: its key or column `question`, where its name and first line say so, else its lines."""
    kind = kind_of(file)
    if kind in ("csv", "parquet"):
        return inputs.read_column(file, "question")
    lines = inputs.read_entries([file], None)
    if kind == "text":
        return lines
    try:
        has_key = isinstance(parse_object(lines[0].text, "").get("question"), str)
    except InputError:
        has_key = False
    if not has_key:
        inputs.warn_of_parts(
            file,
            "asked",
            "questions are read from the key `question`, and `slowllm score` reads texts and choices",
        )
        return lines
    questions = []
    for line in lines:
        try:
            question = parse_object(line.text, "is JSON, but no object with a question").get("question")
        except InputError as error:
            raise InputError(f"{line.where} {error}") from error
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{line.where} has no question")
        questions.append(inputs.Entry(file, line.number, question.strip()))
    return questions
