"""`slowllm score`: score choices, continuations and texts of a JSON Lines file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs, options
from slowllm.entrypoints.cli.output import finite, json_writer, token_rows
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.errors import InputError, counted
from slowllm.files import parse_object, read_raw_lines
from slowllm.tables import kind_of, read_table

if TYPE_CHECKING:
    from slowllm.inference.choices import Encoded
    from slowllm.inference.likelihood import Likelihood
    from slowllm.inference.text import Query
    from slowllm.runtime.description import ModelInfo

KEYS = ("context", "choices", "continuation", "text")
RESULT_KEYS = {
    "line", "error", "probabilities", "scores", "best", "best_choice", "log_likelihood", "perplexity", "num_tokens",
    "is_greedy", "tokens",
}  # fmt: skip


@takes_swarm
def score(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help='JSON Lines files of {"context", "choices"}, {"context", "continuation"} or {"text"}; or CSV or Parquet '
            "files with such columns, in CSV with choices as a list in JSON. - or nothing reads standard input.",
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
    normalize: options.Normalize = "none",
    per_token: options.PerToken = False,
    state: options.State = None,
    overwrite: options.Overwrite = False,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:
    """Score choices after a context, continuations, or texts.

    Prints JSON lines in the order of the input. Each repeats what was read; keys that results have as well are left out
    and named on standard error. Choices add their `probabilities` against one another, `scores`, `best` (the index of
    the best one) and `best_choice`; continuations and texts add `log_likelihood` (nats), `perplexity` and `num_tokens`.
    Choices and continuations are appended to their context as they are, so they must begin with the blank that
    separates them from it. An empty context stands for the beginning of a text.

    A line that cannot be scored gets {"line", "error"} in its place, the others are scored, and the exit code is 1.
    """
    options.log_to_stderr(verbose)
    files = inputs.choose_files(files, text, "a file")
    lines: list[tuple[str, int, Any]] = [
        (inputs.TEXTS_NAME, n, {"text": one}) for n, one in enumerate(text or (), 1)
    ]
    for file in files:
        lines += [(file, number, content) for number, content in _read_file(file)]
    options.check_normalize(normalize)
    runner = Runner(
        model, ram, device, vram, dtype, prompt=prompt, state=state, kind="score",
        overwrite=overwrite, dry_run=dry_run, exact=exact, swarm=swarm,
    )  # fmt: skip
    out = runner.check_output(out, *files)
    runner.load_libraries()
    from slowllm.inference import scoring
    from slowllm.runtime.run_identity import digest_of

    info = runner.info
    # All lines are checked before the first byte of weights is read.
    rows = [_read_row(info, *line, normalize) for line in lines]
    taken = RESULT_KEYS | ({"file"} if len(files) > 1 else set())
    _name_lost_keys(rows, taken)
    queries = [query for row in rows for query in row.queries]
    if dry_run:
        if not queries:
            raise InputError(f"{file}: no line can be scored")
        runner.print_plan_of_queries(queries)
        return
    with contextlib.ExitStack() as stack:
        likelihoods: Iterator[Likelihood] = iter(())
        if queries:

            def settings() -> dict[str, Any]:
                texts = (
                    [
                        file if len(files) > 1 else "",
                        number,
                        raw.decode(errors="surrogateescape") if isinstance(raw, bytes) else raw,
                    ]
                    for file, number, raw in lines
                )
                return {"lines": digest_of(texts), "normalize": normalize}

            num_good = sum(row.error is None for row in rows)
            opened = runner.open_for_queries(queries, settings, "line", num_good)
            lm, saved, count = stack.enter_context(opened)
            likelihoods = scoring.score_queries(lm, queries, state=saved)
        else:
            runner.refuse_begun()
        write = stack.enter_context(json_writer(out))
        for row in rows:
            where = {"file": row.file, "line": row.number} if len(files) > 1 else {"line": row.number}
            if row.error is not None:
                write({**where, "error": row.error})
                continue
            result = _result(info, row, [next(likelihoods) for _ in row.queries], per_token)
            count(0)
            read = {key: value for key, value in row.content.items() if key not in taken}
            write({**read, **where, **result})
    failed = [row for row in rows if row.error is not None]
    print(f"scored {len(rows) - len(failed)} of {counted(len(rows), 'line')}", file=sys.stderr)
    for row in failed[:10]:
        print(f"slowllm: {inputs.Entry(row.file, row.number, '').where}: {row.error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@dataclass
class _Row:
    """One line of the input: its content and its queries, or the reason why it cannot be scored."""

    file: str
    number: int
    content: Mapping[str, Any] = field(default_factory=dict)
    queries: tuple[Query, ...] = ()
    encoded: Encoded | None = None
    error: str | None = None


def _read_file(file: str) -> list[tuple[int, Any]]:
    """Return the rows of a table, or the lines of another file as they are."""
    if kind_of(file) in ("csv", "parquet"):
        return list(read_table(file, KEYS, lists=("choices",)))
    return list(read_raw_lines(file))


def _name_lost_keys(rows: Sequence[_Row], taken: AbstractSet[str]) -> None:
    """Say which keys of the input are left out because results have keys of these names."""
    lost = sorted({key for row in rows if row.error is None for key in row.content if key in taken})
    if lost:
        inputs.warn(
            f"the input's keys {', '.join(lost)} are left out, because results have keys of these names"
        )


def _read_row(
    info: ModelInfo, file: str, number: int, raw: bytes | Mapping[str, Any], normalize: Any
) -> _Row:
    from slowllm.inference.choices import Item, encode_item
    from slowllm.inference.text import encode_pair

    try:
        content: Mapping[str, Any] = (
            parse_object(raw, "is JSON, but no object with text or choices")
            if isinstance(raw, bytes)
            else raw
        )
        if "choices" in content:
            _refuse(content, "text", "continuation")
            context, choices = content.get("context", ""), content["choices"]
            if not (isinstance(context, str) and isinstance(choices, list)):
                raise InputError("context must be a string, and choices a list of strings")
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise InputError("choices must be a list of one string or more, none empty")
            encoded = encode_item(info, Item(context, tuple(choices)), normalize)
            return _Row(file, number, content, encoded.queries, encoded)
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
        return _Row(file, number, content, (encode_pair(info, *pair),))
    except InputError as error:
        return _Row(file, number, error=str(error))


def _refuse(content: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in content:
            others = " and ".join(other for other in KEYS if other in content and other != name)
            raise InputError(f"has {name} beside {others}")


def _result(info: ModelInfo, row: _Row, likelihoods: Sequence[Likelihood], per_token: bool) -> dict[str, Any]:
    from slowllm.inference.choices import judge

    tokens = [
        token_rows(info.tokenizer, likelihood.tokens, likelihood.log_probs)
        for likelihood in likelihoods
        if per_token
    ]
    if row.encoded is None:
        (likelihood,) = likelihoods
        result: dict[str, Any] = {
            "log_likelihood": likelihood.log_likelihood,
            "perplexity": finite(likelihood.perplexity),
            "num_tokens": len(likelihood.tokens),
        }
        if "continuation" in row.content:
            result["is_greedy"] = likelihood.is_greedy
        return {**result, "tokens": tokens[0]} if per_token else result
    judged = judge(row.encoded, likelihoods)
    result = {
        "probabilities": list(judged.probabilities),
        "scores": list(judged.scores),
        "best": judged.best,
        "best_choice": row.content["choices"][judged.best],
    }
    # The choices come first; those without the context, if there are any, after them.
    return {**result, "tokens": tokens[: row.encoded.num_choices]} if per_token else result
