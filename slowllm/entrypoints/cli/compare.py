"""`slowllm compare`: how far apart the predictions of two models are, such as of a checkpoint and its store."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs, into_shards, options
from slowllm.entrypoints.cli.output import finite, print_table, printable, prints_text
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cost import cost_of
from slowllm.errors import InputError, counted

if TYPE_CHECKING:
    from slowllm.inference.comparison_totals import Estimate, Summary, TextTotals, WorstPlace
    from slowllm.inference.text_files import Texts
    from slowllm.planning.job import Job
    from slowllm.runtime.streamed_lm import StreamedLM

# Tokens that are shown before a place, and texts in a table.
CONTEXT_TOKENS = 16
SHOWN_TEXTS = 20


def compare(
    a: Annotated[str, typer.Argument(help="The one model, such as a checkpoint: folder, hub id or embedded:tiny-bloom.", metavar="A")],
    b: Annotated[str, typer.Argument(help="The other model, such as a store of that checkpoint.", metavar="B")],
    files: into_shards.Files = None,
    text: inputs.Texts = None,
    ram: options.Ram = "auto",
    dtype: options.DType = "auto",
    column: into_shards.Column = "text",
    prefix: into_shards.Prefix = True,
    max_tokens: into_shards.MaxTokens = None,
    truncate: into_shards.Truncate = False,
    worst: Annotated[
        int, typer.Option(help="Number of places that are shown where the models are farthest apart.", min=0)
    ] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap of the confidence intervals.", min=0)] = 0,
    resident: options.Resident = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Compare two models' predictions on texts, within one budget.

    They must have one tokenizer. Gives the mean of KL(A || B) of a token in nats, exact over the whole vocabulary, with its quantiles; how often both
    find the same token likeliest; both perplexities and their ratio; and the places where they are farthest apart.
    Intervals hold with 95 % by a bootstrap over the texts.

    Example: slowllm compare ./Llama-3.1-70B ./Llama-3.1-70B-int4 texts.txt
    """
    options.log_to_stderr(verbose)
    named = inputs.choose_files(files, text, "a file")
    runners = [
        Runner(model, ram, "cpu", None, dtype, resident=resident, dry_run=dry_run, exact=exact)
        for model in (a, b)
    ]
    runners[0].load_libraries()
    with contextlib.ExitStack() as stack:
        texts, jobs = _read(runners, stack, named, text or [], column, prefix, max_tokens, truncate)
        if dry_run:
            _print_plans(runners, jobs, as_json=as_json)
            return
        first, second = _open(runners, jobs, stack)
        each, summary, places = _run(first, second, texts, jobs[0], worst, seed)
    if prints_text(None, as_json):
        _print(summary, each, places, runners)
    else:
        json.dump(_document(summary, each, places, runners), sys.stdout, ensure_ascii=False)
        print()


def _read(
    runners: list[Runner], stack: contextlib.ExitStack, files: list[str], text: list[str], column: str, prefix: bool,
    max_tokens: int | None, truncate: bool,
) -> tuple[Texts, tuple[Job, Job]]:  # fmt: skip
    """Read the texts with both tokenizers, which must agree; return them, and the job of each model."""
    from slowllm.inference import compare as comparing
    from slowllm.inference.text import max_line_tokens, prefix_id
    from slowllm.inference.text_files import TextFiles, Texts

    infos = [runner.info for runner in runners]
    comparing.check_pair(*infos)
    limit = min(map(max_line_tokens, infos)) - prefix
    if max_tokens is not None and max_tokens > limit:
        raise InputError(f"--max-tokens {max_tokens} is more than the {limit} that these models take")
    opened = stack.enter_context(TextFiles(files, column, text, inputs.TEXTS_NAME))
    each = [
        Texts(
            info, opened, max_tokens=max_tokens or limit, truncate=truncate,
            prefix=prefix_id(info.tokenizer, info.config.get_text_config().vocab_size) if prefix else None,
        )
        for info in infos
    ]  # fmt: skip
    comparing.check_texts(*each)
    widths = [int(info.config.get_text_config().hidden_size) for info in infos]
    jobs = [
        comparing.job_of(own, width, runner.rates)
        for own, width, runner in zip(each, widths, runners, strict=True)
    ]
    return each[0], (jobs[0], jobs[1])


def _open(
    runners: list[Runner], jobs: tuple[Job, Job], stack: contextlib.ExitStack
) -> tuple[StreamedLM, StreamedLM]:
    """Open both models within one budget."""
    import psutil

    from slowllm.inference.compare import open_pair
    from slowllm.planning.budget import Budget
    from slowllm.runtime.memory import budget_bytes

    one, other = runners
    return open_pair(
        one.info, other.info, jobs, Budget(budget_bytes(one.ram), psutil.Process().memory_info().rss),
        dtype=one.dtype, rates=(one.rates, other.rates), keep_resident=one.resident, exact=one.exact, into=stack.enter_context,
    )  # fmt: skip


def _print_plans(runners: list[Runner], jobs: tuple[Job, Job], *, as_json: bool) -> None:
    """Print the plan of each model within its part of the budget, one after the other."""
    import psutil

    from slowllm.inference.compare import divide, measure_share
    from slowllm.planning.budget import Budget
    from slowllm.runtime.memory import budget_bytes

    budget = Budget(budget_bytes(runners[0].ram), psutil.Process().memory_info().rss)
    shares = [
        measure_share(runner.info, job, runner.dtype, runner.resident)
        for runner, job in zip(runners, jobs, strict=True)
    ]
    own = divide(budget, *shares)
    for runner, job, others in zip(runners, jobs, (budget.free_bytes - own, own), strict=True):
        runner.print_plan(job, as_json=as_json, reserved_bytes=others)


def _run(
    a: StreamedLM, b: StreamedLM, texts: Texts, job: Job, num_worst: int, seed: int
) -> tuple[list[TextTotals], Summary, list[dict[str, Any]]]:
    """Compare the models; return what is said of each text, of all, and of the worst places."""
    from slowllm.entrypoints.progress import progress
    from slowllm.inference.compare import compare_texts
    from slowllm.inference.comparison_totals import ComparisonTotals

    totals, started = ComparisonTotals(num_worst), time.perf_counter()
    each = []
    with progress(a, job, noun="text", total=texts.num_texts) as count:
        for compared in compare_texts(a, b, texts):
            each.append(totals.add(compared))
            count(len(compared.text.ids))
    print(
        f"{counted(texts.num_texts, 'text')} in {time.perf_counter() - started:.2f} s: {cost_of(a)} of A, "
        f"{cost_of(b)} of B",
        file=sys.stderr,
    )
    return each, totals.summary(seed), [_place(a, place) for place in totals.worst]


def _place(lm: StreamedLM, place: WorstPlace) -> dict[str, Any]:
    """Return a place with its tokens as text."""
    ids, tokenizer = place.text.ids, lm.tokenizer
    context = ids[max(0, place.position - CONTEXT_TOKENS) : place.position]
    return {
        "file": place.text.file, "line": place.text.line.number, "position": place.position, "kl": finite(place.kl),
        "context": tokenizer.decode(context), "token": tokenizer.decode([ids[place.position]]),
        "log_prob_a": finite(place.log_prob_a), "log_prob_b": finite(place.log_prob_b),
        "likeliest_a": tokenizer.decode([place.likeliest_a]), "likeliest_b": tokenizer.decode([place.likeliest_b]),
    }  # fmt: skip


def _document(
    summary: Summary, each: list[TextTotals], places: list[dict[str, Any]], runners: list[Runner]
) -> dict[str, Any]:
    def estimate(found: Estimate) -> dict[str, float | None]:
        return {name: finite(value) for name, value in asdict(found).items()}

    return {
        "a": runners[0].info.name, "b": runners[1].info.name,
        "num_texts": summary.num_texts, "num_tokens": summary.num_places,
        "kl": estimate(summary.kl),
        "kl_quantiles": {f"{share:g}": finite(value) for share, value in summary.quantiles},
        "top_1_agreement": estimate(summary.agreement),
        "perplexity_a": estimate(summary.perplexity_a), "perplexity_b": estimate(summary.perplexity_b),
        "perplexity_ratio": estimate(summary.perplexity_ratio),
        "worst": places,
        "texts": [
            {
                "file": one.file, "line": one.line, "num_tokens": one.num_places, "kl": finite(one.kl),
                "top_1_agreement": finite(one.agreement), "perplexity_a": finite(one.perplexity_a),
                "perplexity_b": finite(one.perplexity_b),
            }
            for one in each
        ],
    }  # fmt: skip


def _print(
    summary: Summary, each: list[TextTotals], places: list[dict[str, Any]], runners: list[Runner]
) -> None:
    def row(name: str, found: Estimate, form: str) -> list[str]:
        return [f"{found.value:{form}}", f"{found.low:{form}} to {found.high:{form}}", name]

    names = [runner.info.name for runner in runners]
    print_table(
        ["value", "95 % interval", f"A is {names[0]}, B is {names[1]}"],
        [
            row("mean KL(A || B) of a token, nats", summary.kl, ".6f"),
            row("both find the same token likeliest", summary.agreement, ".4f"),
            row("perplexity of A", summary.perplexity_a, ",.3f"),
            row("perplexity of B", summary.perplexity_b, ",.3f"),
            row("perplexity of B over that of A", summary.perplexity_ratio, ".5f"),
        ],
    )
    print()
    print_table(
        ["KL", "at most, of so many tokens"],
        [[f"{value:.6f}", f"{share * 100:g} %"] for share, value in summary.quantiles],
    )
    print()
    shown = sorted(each, key=lambda one: -one.kl)[:SHOWN_TEXTS]
    title = "text" if len(shown) == len(each) else f"text (the {len(shown)} farthest apart of {len(each):,})"
    print_table(
        ["tokens", "KL", "agreement", "perplexity A", "perplexity B", title],
        [
            [f"{one.num_places:,}", f"{one.kl:.6f}", f"{one.agreement:.3f}", f"{one.perplexity_a:,.3f}",
             f"{one.perplexity_b:,.3f}", f"{one.file}: {one.line}"]
            for one in shown
        ],
    )  # fmt: skip
    for line in _worst_lines(places):
        print(line)


def _worst_lines(places: list[dict[str, Any]]) -> Iterator[str]:
    for place in places:
        yield ""
        yield printable(
            f"KL {place['kl']:.4f} at {place['file']}: line {place['line']}, token {place['position']}: "
            f"...{place['context']}[{place['token']}]"
        )
        yield printable(
            f"  log-probability {place['log_prob_a']:.3f} by A, {place['log_prob_b']:.3f} by B; likeliest "
            f"{place['likeliest_a']!r} by A, {place['likeliest_b']!r} by B"
        )
