"""The verbs that compare likelihoods, `score` and `yesno`, and what they share with `eval`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    ModelOption,
    OutOption,
    PromptOption,
    RamOption,
    Verbose,
    VramOption,
    checked_output,
    log_to_stderr,
    memory_of,
)
from slowllm.errors import InputError
from slowllm.files import parse_object, read_lines, read_raw_lines

if TYPE_CHECKING:
    from slowllm.inference.choices import Encoded
    from slowllm.inference.likelihood import Likelihood
    from slowllm.inference.text import Query
    from slowllm.runtime.description import ModelInfo
from slowllm.entrypoints.cli.common import NormalizeOption, checked_model, opened
from slowllm.entrypoints.cli.output import print_table

KEYS = ("context", "choices", "continuation", "text")


@dataclass
class _Row:
    """One line of a file to be scored: what was read, what is asked, or what is wrong with it."""

    number: int
    content: Mapping[str, Any] = field(default_factory=dict)
    queries: tuple[Query, ...] = ()
    encoded: Encoded | None = None
    error: str | None = None


def score(
    file: Annotated[
        str,
        typer.Argument(
            help='JSON Lines: {"context", "choices"}, {"context", "continuation"} or {"text"}; - reads standard input.'
        ),
    ],
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    prompt: PromptOption = None,
    out: OutOption = None,
    normalize: NormalizeOption = "none",
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also give every scored token and its log-probability.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Score every line of a JSON Lines file: choices after a context, a continuation, or a text.

    Prints JSON lines in the file's order: what was read (but for a key `error`, which marks a line that failed), and for choices `probabilities` (of the choices against one
    another), `scores`, `best` (its index) and `best_choice`; else `log_likelihood` (nats), `perplexity` and
    `num_tokens`. Choices and continuations follow their context as they are, so give the blank that parts them. An
    empty context stands for the beginning of a text.

    A line that cannot be scored gets {"line", "error"} in its place, the others are scored, and the exit code is 1.
    """
    log_to_stderr(verbose)
    lines = read_raw_lines(file)
    if out is not None:
        out = checked_output(out, file)
    memory = memory_of(ram, device, vram)
    known = checked_model(model, dtype, normalize, prompt=prompt)
    from slowllm.entrypoints.cli import output
    from slowllm.inference import scoring

    # All lines are looked at before the first byte of weights is read.
    rows = [_row(known, number, raw, normalize) for number, raw in lines]
    queries = [query for row in rows for query in row.queries]
    with output.json_writer(out) as write, contextlib.ExitStack() as stack:
        likelihoods: Iterator[Likelihood] = iter(())
        if queries:
            likelihoods = scoring.score_queries(
                stack.enter_context(opened(known, queries, memory, dtype)), queries
            )
        for row in rows:
            if row.error is not None:
                write({"line": row.number, "error": row.error})
                continue
            found = [next(likelihoods) for _ in row.queries]
            kept = {key: value for key, value in row.content.items() if key != "error"}
            write({**kept, "line": row.number, **_result(known, row, found, per_token)})
    wrong = [row for row in rows if row.error is not None]
    print(f"scored {len(rows) - len(wrong)} of {len(rows)} lines", file=sys.stderr)
    for row in wrong[:10]:
        print(f"slowllm: {file}: line {row.number}: {row.error}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def _row(known: ModelInfo, number: int, raw: bytes, normalize: Any) -> _Row:
    from slowllm.inference.choices import Item, encode_item
    from slowllm.inference.text import encode_pair

    try:
        content = parse_object(raw, "is JSON, but no object with text or choices")
        if "choices" in content:
            _refuse(content, "text", "continuation")
            context, choices = content.get("context", ""), content["choices"]
            if not (isinstance(context, str) and isinstance(choices, list)):
                raise InputError("context must be a string, and choices a list of strings")
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise InputError("choices must be a list of one string or more, none empty")
            encoded = encode_item(known, Item(context, tuple(choices)), normalize)
            return _Row(number, content, encoded.queries, encoded)
        if "continuation" in content:
            _refuse(content, "text")
            pair = (content.get("context", ""), content["continuation"])
        elif "text" in content:
            _refuse(content, "context")
            pair = ("", content["text"])
        else:
            raise InputError("needs context and choices, context and continuation, or text")
        if not all(isinstance(text, str) for text in pair):
            raise InputError("text, context and continuation must be strings")
        return _Row(number, content, (encode_pair(known, *pair),))
    except InputError as error:
        return _Row(number, error=str(error))


def _refuse(content: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in content:
            raise InputError(
                f"has {name} beside {' and '.join(other for other in KEYS if other in content and other != name)}"
            )


def _result(known: ModelInfo, row: _Row, found: Sequence[Likelihood], per_token: bool) -> dict[str, Any]:
    if row.encoded is None:
        (likelihood,) = found
        perplexity = likelihood.perplexity
        result: dict[str, Any] = {
            "log_likelihood": likelihood.log_likelihood,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "num_tokens": len(likelihood.tokens),
        }
        if "continuation" in row.content:
            result["is_greedy"] = likelihood.is_greedy
        if per_token:
            result["tokens"] = _tokens(known, likelihood)
        return result
    from slowllm.inference.choices import judge

    judged = judge(row.encoded, found)
    result = {
        "probabilities": list(judged.probabilities),
        "scores": list(judged.scores),
        "best": judged.best,
        "best_choice": row.content["choices"][judged.best],
    }
    if per_token:
        result["tokens"] = [_tokens(known, likelihood) for likelihood in found[: row.encoded.num_choices]]
    return result


def _tokens(known: ModelInfo, likelihood: Likelihood) -> list[dict[str, Any]]:
    return [
        {"id": token, "token": known.tokenizer.decode([token]), "log_prob": value}
        for token, value in zip(likelihood.tokens, likelihood.log_probs, strict=True)
    ]


def yesno(
    file: Annotated[str, typer.Argument(help="Text file, one question a line; - reads standard input.")],
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    prompt: PromptOption = None,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
    yes: Annotated[str, typer.Option("--yes", help="The one answer.")] = "yes",
    no: Annotated[str, typer.Option("--no", help="The other.")] = "no",
    template: Annotated[
        str,
        typer.Option(
            help=r"Prompt, with {question} in it; \n is a line break. The answer follows after a blank."
        ),
    ] = r"Question: {question}\nAnswer:",
    verbose: Verbose = False,
) -> None:
    """Answer every non-empty line of a file with yes or no, and say how likely yes is against no."""
    log_to_stderr(verbose)
    lines = read_lines(file)
    if out is not None:
        out = checked_output(out, file)
    if "{question}" not in template:
        raise InputError(f"--template {template!r} has no {{question}}")
    pattern = template.replace("\\n", "\n")
    if not yes.strip() or not no.strip() or yes.strip() == no.strip():
        raise InputError(f"--yes {yes!r} and --no {no!r} must be two different words, neither of them empty")
    memory = memory_of(ram, device, vram)
    known = checked_model(model, dtype, prompt=prompt)
    from slowllm.entrypoints.cli import output
    from slowllm.inference import choices

    blank = "" if pattern[-1].isspace() else " "
    items = []
    for number, text in lines:
        item = choices.Item(pattern.replace("{question}", text), (blank + yes.strip(), blank + no.strip()))
        try:
            items.append(choices.encode_item(known, item))
        except InputError as error:
            raise InputError(f"{file}: line {number}: {error}") from error
    queries = [query for item in items for query in item.queries]
    relative = all(item.is_relative for item in items)
    as_table = out is None and not as_json and sys.stdout.isatty()
    cells = []
    with contextlib.ExitStack() as stack:
        write = None if as_table else stack.enter_context(output.json_writer(out))
        lm = stack.enter_context(opened(known, queries, memory, dtype))
        for (number, text), found in zip(lines, choices.choose(lm, items, relative=relative), strict=True):
            answer = (yes, no)[found.best].strip()
            if write is None:
                cells.append((str(number), f"{found.probabilities[0]:.4f}", answer, text))
            else:
                write({"line": number, "question": text, "p_yes": found.probabilities[0], "answer": answer})
    if as_table:
        print_table(("line", "P(yes)", "answer", "question"), cells)
