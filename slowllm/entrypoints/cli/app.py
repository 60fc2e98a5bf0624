"""The verbs of the command line: parse, call, print. Results go to stdout, progress and logs to stderr."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slowllm.entrypoints.cli.batch import batch
from slowllm.entrypoints.cli.chat import chat
from slowllm.entrypoints.cli.evaluate import eval_app
from slowllm.entrypoints.cli.forward import forward
from slowllm.entrypoints.cli.generate import generate
from slowllm.entrypoints.cli.plan import plan
from slowllm.entrypoints.cli.prepare import convert, download, verify
from slowllm.entrypoints.cli.score import score, yesno
from slowllm.entrypoints.cli.tune import tune
from slowllm.errors import SlowLLMError
from slowllm.malloc import keep_together

app = typer.Typer(
    name="slowllm",
    help="Run, score and tune language models far larger than memory, by streaming their weights from disk.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from slowllm.version import __version__

        typer.echo(__version__)
        raise typer.Exit


app.command()(forward)


app.command()(plan)


app.command()(download)


app.command()(generate)


app.command()(batch)


app.command()(chat)


app.command()(score)


app.command()(yesno)


app.command()(tune)


app.command()(convert)


app.command()(verify)


app.add_typer(eval_app, name="eval")


def run() -> None:
    """Run the command line: one sentence and exit code 2 for what the user can mend.

    An interrupt exits with 130 and a closed pipe with 1, as click has it.
    """
    keep_together()
    try:
        app()
    except SlowLLMError as error:
        print(f"slowllm: {error}", file=sys.stderr)
        sys.exit(2)
