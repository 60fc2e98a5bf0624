"""`slowllm eval`: accuracy on BoolQ, on tasks with templates of one's own, and lm-eval's command line."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.inputs import check_installed
from slowllm.entrypoints.cli.output import STDOUT, json_writer, print_table
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.cli.verb import add_verb, example
from slowllm.entrypoints.lm_eval_command import ALLOW_DOWNLOADS, check_arguments, stay_offline
from slowllm.entrypoints.report.destination import check_report
from slowllm.entrypoints.report.recorder import reporting
from slowllm.entrypoints.report.results import QuestionAnswered
from slowllm.errors import InputError, counted

if TYPE_CHECKING:
    from slowllm.inference.choices import Encoded
    from slowllm.inference.prompt_templates import Question, Template
    from slowllm.runtime.description import ModelInfo

# Interval between reports of the accuracy so far.
REPORT_SECONDS = 10.0

eval_app = typer.Typer(
    help="Evaluate a model on BoolQ, tasks of your own, or lm-eval's tasks.",
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
TemplatesOption = Annotated[str, typer.Option("--templates", help="Name of one template, or all.")]
SubsetOption = Annotated[
    str | None, typer.Option("--subset", help="Config of a dataset that is not a single file.")
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="Split of a dataset that is not a single file.", show_default="validation"),
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Maximum number of examples.", min=1)]
TruncateOption = Annotated[
    bool,
    typer.Option("--truncate", help="Cut prompts that are too long from the left, instead of refusing them."),
]
PredictionsOption = Annotated[
    Path | None,
    typer.Option("--out", help="Write every prediction to this file as JSON lines; - is standard output."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@takes_swarm
def boolq(
    data: DataOption,
    templates: TemplatesOption = "all",
    template_file: Annotated[
        Path | None,
        typer.Option(
            help="File of templates in promptsource's YAML.",
            show_default="promptsource's where it is installed, else slowllm's own",
        ),
    ] = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    prompt: options.Prompt = None,
    normalize: options.Normalize = "none",
    truncate: TruncateOption = False,
    out: PredictionsOption = None,
    as_json: JsonOption = False,
    state: options.State = None,
    overwrite: options.Overwrite = False,
    report: options.Report = None,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a model's accuracy on BoolQ with templates.

    An example has a question, a passage and an answer, or super_glue's label. All templates and examples share sweeps
    over the weights. Prints the accuracy of each template and of all of them together, with Wilson's 95 % interval.
    """
    options.log_to_stderr(verbose)
    options.check_normalize(normalize)
    runner = Runner(
        model, ram, device, vram, dtype, prompt=prompt, state=state, kind="eval boolq",
        overwrite=overwrite, dry_run=dry_run, exact=exact, swarm=swarm,
    )  # fmt: skip
    out = runner.check_output(out, data, template_file)
    report = runner.check_report(report, data, template_file)
    _check_packages(data)
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
    place_of = functools.partial(eval_tasks.place_of, data)
    questions = make_questions(chosen, eval_tasks.boolq_examples(data, rows), place_of)
    runner.load_libraries()
    items, cut = _encode(runner.info, questions, place_of, normalize, truncate)
    about = {"task": "boolq", "data": data, "templates_from": source, "normalize": normalize}
    options_given = {"subset": subset, "split": split, "limit": limit, "truncate": truncate}
    _evaluate(runner, chosen, questions, items, cut, about, options_given, out, as_json, report)


@takes_swarm
def task(
    data: DataOption,
    template_file: Annotated[Path, typer.Option(help="File of templates in promptsource's YAML.")],
    templates: TemplatesOption = "all",
    subset: SubsetOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    prompt: options.Prompt = None,
    normalize: options.Normalize = "none",
    truncate: TruncateOption = False,
    out: PredictionsOption = None,
    as_json: JsonOption = False,
    state: options.State = None,
    overwrite: options.Overwrite = False,
    report: options.Report = None,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a model's accuracy on any dataset with templates of your own.

    The target of a template is one of its answer choices.
    """
    options.log_to_stderr(verbose)
    options.check_normalize(normalize)
    runner = Runner(
        model, ram, device, vram, dtype, prompt=prompt, state=state, kind="eval task",
        overwrite=overwrite, dry_run=dry_run, exact=exact, swarm=swarm,
    )  # fmt: skip
    out = runner.check_output(out, data, template_file)
    report = runner.check_report(report, data, template_file)
    _check_packages(data)
    from slowllm.inference import eval_tasks
    from slowllm.inference.prompt_templates import make_questions, read_templates, select_templates

    chosen = select_templates(read_templates(template_file), templates)
    place_of = functools.partial(eval_tasks.place_of, data)
    rows = eval_tasks.read_examples(data, subset=subset, split=split, limit=limit)
    questions = make_questions(chosen, rows, place_of)
    runner.load_libraries()
    items, cut = _encode(runner.info, questions, place_of, normalize, truncate)
    about = {"data": data, "templates_from": str(template_file), "normalize": normalize}
    options_given = {"subset": subset, "split": split, "limit": limit, "truncate": truncate}
    _evaluate(runner, chosen, questions, items, cut, about, options_given, out, as_json, report)


add_verb(eval_app, boolq, "slowllm eval boolq --data boolq.jsonl --templates all --out answers.jsonl")
add_verb(eval_app, task, "slowllm eval task --data reviews.jsonl --template-file templates.yaml")


@eval_app.command(
    "lm",
    epilog=example("slowllm eval lm --tasks boolq --model_args pretrained=DIR,ram=16GiB"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def lm(
    context: typer.Context,
    allow_downloads: Annotated[
        bool,
        typer.Option(
            ALLOW_DOWNLOADS,
            help="Let lm-eval fetch the data sets and metrics of tasks that are not on this machine.",
        ),
    ] = False,
    report: options.Report = None,
) -> None:
    """Run lm-eval's command line with slowllm's model.

    All requests of a kind share as few sweeps as possible.

    All other options are lm-eval's own, which `slowllm eval lm run --help` prints. --model_args takes pretrained (a
    folder, or a model of the local cache), ram, dtype, device, vram, prompt, exact and max_length.

    Nothing is downloaded without --allow-downloads: a task whose data are not on this machine ends in a sentence.
    """
    if not context.args or context.args in (["-h"], ["--help"]):
        typer.echo(context.get_help())
        return
    switch = [ALLOW_DOWNLOADS] if allow_downloads else []
    arguments = check_arguments(stay_offline([*context.args, *switch]))
    check_installed("lm_eval")
    report = check_report(report, None)
    from slowllm.entrypoints import lm_eval_run

    with reporting(report, "slowllm eval lm") as told:
        lm_eval_run.main(arguments, told)


def _check_packages(data: str) -> None:
    """Refuse to go on without the packages that read templates, and data of other kinds than JSON Lines."""
    check_installed("jinja2", "yaml", *(() if Path(data).suffix == ".jsonl" else ("datasets",)))


def _evaluate(
    runner: Runner,
    templates: Sequence[Template],
    questions: Sequence[Question],
    items: Sequence[Encoded],
    cut: set[int],
    about: Mapping[str, Any],
    options_given: Mapping[str, Any],
    out: Path | None,
    as_json: bool,
    report: Path | None,
) -> None:
    """Answer all questions; write each prediction, and print the accuracy of each template."""
    from slowllm.inference import choices, eval_tasks
    from slowllm.runtime.run_identity import digest_of

    queries = [query for item in items for query in item.queries]
    if runner.dry_run:
        runner.print_plan_of_queries(queries, as_json=as_json)
        return
    relative = all(item.is_relative for item in items)
    tally, reported_at = eval_tasks.Tally(), time.monotonic()

    def settings() -> dict[str, Any]:
        return {
            **about,
            **options_given,
            "templates": digest_of(asdict(template) for template in templates),
            "questions": digest_of([asdict(question), n in cut] for n, question in enumerate(questions)),
        }

    with contextlib.ExitStack() as stack:
        told = stack.enter_context(reporting(report, f"slowllm eval {about.get('task', 'task')}"))
        opened = runner.open_for_queries(queries, settings, "question", len(questions), told)
        lm, saved, count = stack.enter_context(opened)
        write = None if out is None else stack.enter_context(json_writer(out))
        judgements = choices.choose(lm, items, relative=relative, state=saved)
        for number, (question, judged) in enumerate(zip(questions, judgements, strict=True)):
            tally.add(question, judged.best)
            told.add(QuestionAnswered(question, judged))
            count(0)
            if write is not None:
                write(_prediction(question, judged, number in cut))
            if time.monotonic() - reported_at >= REPORT_SECONDS:
                reported_at = time.monotonic()
                print(f"{number + 1} of {len(questions)}: accuracy {tally.accuracy:.4f}", file=sys.stderr)
    rows = tally.rows()
    if cut:
        print(f"{counted(len(cut), 'prompt was', 'prompts were')} cut from the left", file=sys.stderr)
    if as_json or out == STDOUT or not sys.stdout.isatty():
        document = {"model": runner.info.name, **about, "num_truncated": len(cut)}
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


def _encode(
    info: ModelInfo,
    questions: Sequence[Question],
    place_of: Callable[[int], str],
    normalize: Any,
    truncate: bool,
) -> tuple[list[Encoded], set[int]]:
    """Return the questions as queries, and the numbers of those whose prompts were cut."""
    from slowllm.inference.choices import Item, encode_item

    items, cut, contexts = list[Any](), set[int](), dict[tuple[int, ...], tuple[int, ...]]()
    ids: dict[int, int] = {}
    for number, question in enumerate(questions):
        item = Item(question.prompt, question.continuations)
        try:
            encoded = encode_item(info, item, normalize)
        except InputError as error:
            where = f"{place_of(question.example)}, template {question.template!r}"
            try:
                encoded = encode_item(info, item, normalize, truncate=True)
            except InputError:
                raise InputError(f"{where}: {error}") from error
            if not truncate:
                raise InputError(
                    f"{where}: {error}; use --truncate to cut such prompts from the left"
                ) from error
            cut.add(number)
        # One object for each token id, and one context for all its choices: a tenth of the memory.
        queries = []
        for query in encoded.queries:
            context = tuple(ids.setdefault(token, token) for token in query.context)
            queries.append(replace(query, context=contexts.setdefault(context, context)))
        items.append(replace(encoded, queries=tuple(queries)))
    return items, cut


def _prediction(question: Question, judged: Any, is_cut: bool) -> dict[str, Any]:
    row = {
        "template": question.template,
        "example": question.example,
        "prediction": question.choices[judged.best],
        "gold": question.choices[question.gold],
        "correct": judged.best == question.gold,
        "choices": list(question.choices),
        "probabilities": list(judged.probabilities),
    }
    return {**row, "truncated": True} if is_cut else row
