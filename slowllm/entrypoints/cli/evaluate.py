"""The verbs of `slowllm eval`: BoolQ, tasks with templates of one's own, and lm-eval."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    Memory,
    ModelOption,
    NormalizeOption,
    PromptOption,
    RamOption,
    Verbose,
    VramOption,
    checked_model,
    checked_output,
    log_to_stderr,
    memory_of,
    opened,
)
from slowllm.entrypoints.cli.output import print_table
from slowllm.errors import InputError

if TYPE_CHECKING:
    from slowllm.inference.choices import Encoded
    from slowllm.inference.prompt_templates import Question
    from slowllm.runtime.description import ModelInfo

# How often the accuracy so far is told.
REPORT_SECONDS = 10.0

eval_app = typer.Typer(
    help="Evaluate a model: BoolQ, tasks with templates of your own, or anything that lm-eval has.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="JSON Lines, JSON, Parquet or CSV file, folder, or hub id of a dataset in the cache of `datasets`.",
    ),
]
TemplatesOption = Annotated[str, typer.Option("--templates", help="Name of a template, or all.")]
SubsetOption = Annotated[
    str | None, typer.Option("--subset", help="Config of a dataset that is no single file.")
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="Split of a dataset that is no single file.", show_default="validation"),
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Most examples.", min=1)]
TruncateOption = Annotated[
    bool,
    typer.Option("--truncate", help="Cut prompts that are too long from the left, instead of refusing them."),
]
PredictionsOption = Annotated[
    Path | None, typer.Option("--out", help="Write each prediction to this file, as JSON lines.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@eval_app.command()
def boolq(
    data: DataOption,
    templates: TemplatesOption = "all",
    template_file: Annotated[
        Path | None,
        typer.Option(
            help="Templates in promptsource's YAML.",
            show_default="promptsource's where it is installed, else slowllm's own",
        ),
    ] = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    prompt: PromptOption = None,
    normalize: NormalizeOption = "none",
    truncate: TruncateOption = False,
    out: PredictionsOption = None,
    as_json: JsonOption = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model's accuracy on BoolQ (question, passage, answer; or super_glue's label), by templates.

    All templates and examples share sweeps over the weights. Prints the accuracy of each template and of all with
    Wilson's 95 % interval.
    """
    log_to_stderr(verbose)
    out = _predictions_file(out, data)
    memory = memory_of(ram, device, vram)
    known = checked_model(model, dtype, normalize, prompt=prompt)
    from slowllm.inference import eval_tasks
    from slowllm.inference.prompt_templates import (
        boolq_templates,
        make_questions,
        read_templates,
        select_templates,
    )

    if template_file is None:
        available, source = boolq_templates()
    else:
        available, source = read_templates(template_file), str(template_file)
    rows = eval_tasks.read_examples(data, subset=subset, split=split, limit=limit)
    chosen = select_templates(available, templates)
    questions = make_questions(chosen, eval_tasks.boolq_examples(data, rows))
    about = {"task": "boolq", "data": data, "templates_from": source}
    _evaluate(known, questions, about, memory, dtype, normalize, truncate, out, as_json)


@eval_app.command()
def task(
    data: DataOption,
    template_file: Annotated[Path, typer.Option(help="Templates in promptsource's YAML.")],
    templates: TemplatesOption = "all",
    subset: SubsetOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    prompt: PromptOption = None,
    normalize: NormalizeOption = "none",
    truncate: TruncateOption = False,
    out: PredictionsOption = None,
    as_json: JsonOption = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model's accuracy on any dataset, by templates whose target is one of their answer choices."""
    log_to_stderr(verbose)
    out = _predictions_file(out, data)
    memory = memory_of(ram, device, vram)
    known = checked_model(model, dtype, normalize, prompt=prompt)
    from slowllm.inference import eval_tasks
    from slowllm.inference.prompt_templates import (
        make_questions,
        read_templates,
        select_templates,
    )

    chosen = select_templates(read_templates(template_file), templates)
    rows = eval_tasks.read_examples(data, subset=subset, split=split, limit=limit)
    questions = make_questions(chosen, rows)
    about = {"data": data, "templates_from": str(template_file)}
    _evaluate(known, questions, about, memory, dtype, normalize, truncate, out, as_json)


@eval_app.command(
    "lm",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def lm(context: typer.Context) -> None:
    """Run lm-eval's command line with `--model slowllm`, all requests of a kind in as few sweeps as can be.

    For example: slowllm eval lm --tasks boolq --model_args pretrained=DIR,ram=16GiB
    """
    from slowllm.entrypoints import lm_eval_model

    lm_eval_model.main(context.args)


def _predictions_file(out: Path | None, data: str) -> Path | None:
    return None if out is None else checked_output(out, data if Path(data).expanduser().is_file() else "-")


def _evaluate(
    known: ModelInfo,
    questions: Sequence[Question],
    about: Mapping[str, Any],
    memory: Memory,
    dtype: str,
    normalize: Any,
    truncate: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    from slowllm.entrypoints.cli import output
    from slowllm.inference import choices, eval_tasks

    items, cut = _encoded(known, questions, normalize, truncate)
    queries = [query for item in items for query in item.queries]
    relative = all(item.is_relative for item in items)
    tally, told = eval_tasks.Tally(), time.monotonic()
    with contextlib.ExitStack() as stack:
        write = None if out is None else stack.enter_context(output.json_writer(out))
        lm = stack.enter_context(opened(known, queries, memory, dtype))
        found = choices.choose(lm, items, relative=relative)
        for number, (question, one) in enumerate(zip(questions, found, strict=True)):
            tally.add(question, one.best)
            if write is not None:
                write(_prediction(question, one, number in cut))
            if time.monotonic() - told >= REPORT_SECONDS:
                told = time.monotonic()
                print(f"{number + 1} of {len(questions)}: accuracy {tally.accuracy:.4f}", file=sys.stderr)
    rows = tally.rows()
    if cut:
        print(f"{len(cut)} prompts were cut from the left", file=sys.stderr)
    if as_json or not sys.stdout.isatty():
        document = {"model": known.name, **about, "normalize": normalize, "num_truncated": len(cut)}
        print(json.dumps({**document, "templates": rows[:-1], "all": rows[-1]}, ensure_ascii=False))
        return
    cells = [
        (
            f"{row['num_correct']}/{row['num_questions']}",
            f"{row['accuracy']:.4f}",
            f"{row['low']:.4f} to {row['high']:.4f}",
            "all" if row["template"] is None else row["template"],
        )
        for row in rows
    ]
    print_table(("correct", "accuracy", "95 % interval", "template"), cells)


def _encoded(
    known: ModelInfo, questions: Sequence[Question], normalize: Any, truncate: bool
) -> tuple[list[Encoded], set[int]]:
    """Return questions as queries, and the numbers of those that were cut."""
    from slowllm.inference.choices import Item, encode_item

    items, cut, contexts = list[Any](), set[int](), dict[tuple[int, ...], tuple[int, ...]]()
    ids: dict[int, int] = {}
    for number, question in enumerate(questions):
        item = Item(question.prompt, question.continuations)
        try:
            found = encode_item(known, item, normalize)
        except InputError as error:
            where = f"example {question.example}, template {question.template!r}"
            try:
                found = encode_item(known, item, normalize, truncate=True)
            except InputError:
                raise InputError(f"{where}: {error}") from error
            if not truncate:
                raise InputError(
                    f"{where}: {error}; use --truncate to cut such prompts from the left"
                ) from error
            cut.add(number)
        # One object for each token id, and one context for all its choices: a tenth of the memory.
        queries = []
        for query in found.queries:
            context = tuple(ids.setdefault(token, token) for token in query.context)
            queries.append(replace(query, context=contexts.setdefault(context, context)))
        items.append(replace(found, queries=tuple(queries)))
    return items, cut


def _prediction(question: Question, found: Any, is_cut: bool) -> dict[str, Any]:
    row = {
        "template": question.template,
        "example": question.example,
        "prediction": question.choices[found.best],
        "gold": question.choices[question.gold],
        "correct": found.best == question.gold,
        "choices": list(question.choices),
        "probabilities": list(found.probabilities),
    }
    return {**row, "truncated": True} if is_cut else row
