"""The command line's entry point: all verbs, and the exit codes. Results go to stdout, progress and logs to stderr."""

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
from slowllm.entrypoints.cli.score import score
from slowllm.entrypoints.cli.tune import tune
from slowllm.entrypoints.cli.yesno import yesno
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
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from slowllm.version import __version__

        typer.echo(__version__)
        raise typer.Exit


for _verb in (forward, plan, download, generate, batch, chat, score, yesno, tune, convert, verify):
    app.command()(_verb)
app.add_typer(eval_app, name="eval")


def run() -> None:
    """Run the command line. An error that the user can mend is one sentence on stderr and exit code 2.

    An interrupt exits with 130 and a closed pipe with 1, as in click.
    """
    keep_together()
    try:
        app()
    except SlowLLMError as error:
        print(f"slowllm: {error}", file=sys.stderr)
        sys.exit(2)
