"""The command line's entry point: all verbs, and the exit codes. Results go to stdout, progress and logs to stderr."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from slowllm.entrypoints.cli.batch import batch
from slowllm.entrypoints.cli.chat import chat
from slowllm.entrypoints.cli.dht import dht
from slowllm.entrypoints.cli.evaluate import eval_app
from slowllm.entrypoints.cli.forward import forward
from slowllm.entrypoints.cli.generate import generate
from slowllm.entrypoints.cli.log_format import as_logged, write_line
from slowllm.entrypoints.cli.petals_flags import from_petals
from slowllm.entrypoints.cli.plan import plan
from slowllm.entrypoints.cli.prepare import convert, download, verify
from slowllm.entrypoints.cli.score import score
from slowllm.entrypoints.cli.serve import serve
from slowllm.entrypoints.cli.swarm import swarm_app
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


for _verb in (
    forward,
    plan,
    download,
    generate,
    batch,
    chat,
    score,
    yesno,
    tune,
    convert,
    verify,
    serve,
    dht,
):
    app.command()(_verb)
app.add_typer(eval_app, name="eval")
app.add_typer(swarm_app, name="swarm")


def run() -> None:
    """Run the command line; a stderr that takes nothing more changes no exit code."""
    try:
        _run()
    finally:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except OSError:  # Python would fail to write what is left when it ends, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _run() -> None:
    """Run the command line. An error that the user can mend is one sentence on stderr and exit code 2.

    An interrupt exits with 130 and a closed pipe with 1, as in click.
    """
    if sys.stdout is None:
        _leave("standard output is closed")
    keep_together()
    try:
        try:
            arguments, said = from_petals(sys.argv[1:])
            for line in said:
                write_line(line)
            app(args=arguments)
        finally:
            sys.stdout.flush()  # else what cannot be written would fail when Python ends, with another exit code
    except SlowLLMError as error:
        _leave(str(error))
    except OSError as error:
        if not _stdout_fails():
            raise
        # Python writes what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)  # whoever read has left, and needs no sentence
        _leave(f"standard output: {error.strerror or error}")


def _leave(reason: str) -> NoReturn:
    write_line(as_logged(reason) or f"slowllm: {reason}")
    sys.exit(2)


def _stdout_fails() -> bool:
    try:
        sys.stdout.flush()  # fails again with what could not be written
    except OSError:
        return True
    return False
