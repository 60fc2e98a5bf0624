"""The command line's entry point: all verbs, and the exit codes. Results go to stdout, progress and logs to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from slowllm.entrypoints.cli.api import api
from slowllm.entrypoints.cli.batch import batch
from slowllm.entrypoints.cli.chat import chat
from slowllm.entrypoints.cli.compare import compare
from slowllm.entrypoints.cli.config import config
from slowllm.entrypoints.cli.dht import dht
from slowllm.entrypoints.cli.doctor import doctor
from slowllm.entrypoints.cli.evaluate import eval_app
from slowllm.entrypoints.cli.forward import forward
from slowllm.entrypoints.cli.generate import generate
from slowllm.entrypoints.cli.hidden import hidden
from slowllm.entrypoints.cli.log_format import Stderr, write_line
from slowllm.entrypoints.cli.petals_flags import from_petals
from slowllm.entrypoints.cli.plan import plan
from slowllm.entrypoints.cli.prepare import convert, download, verify
from slowllm.entrypoints.cli.score import score
from slowllm.entrypoints.cli.serve import serve
from slowllm.entrypoints.cli.swarm import swarm_app
from slowllm.entrypoints.cli.teach import teach
from slowllm.entrypoints.cli.tune import tune
from slowllm.entrypoints.cli.verb import add_verb
from slowllm.entrypoints.cli.web import web
from slowllm.entrypoints.cli.yesno import yesno
from slowllm.errors import SlowLLMError
from slowllm.malloc import keep_few_kernels, keep_together

app = typer.Typer(
    name="slowllm",
    help="Run, score and tune language models far larger than memory, by streaming their weights from disk.",
    no_args_is_help=True,
    # Completion of a shell: --install-completion, --show-completion.
    add_completion=True,
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


# Each verb with an example of its use, which ends its help.
_VERBS: tuple[tuple[Callable[..., Any], str], ...] = (
    (forward, "slowllm forward sentences.txt --ram 12GiB --out scores.jsonl"),
    (plan, "slowllm plan bigscience/bloom --ram 12GiB --tokens 100000 --longest 60"),
    (doctor, "slowllm doctor bigscience/bloom --folder ~/models"),
    (config, "slowllm config forward --preset bloom-176b-16gb"),
    (download, "slowllm download bigscience/bloom"),
    (generate, 'slowllm generate "The value is" --max-new-tokens 5'),
    (batch, "slowllm batch requests.jsonl --out answers.jsonl"),
    (chat, "slowllm chat --model bigscience/bloomz-7b1 --context 512"),
    (score, "slowllm score items.jsonl --out scores.jsonl"),
    (teach, "slowllm teach texts.txt --top 64 --out teacher"),
    (compare, "slowllm compare bloom bloom-int8 texts.txt"),
    (hidden, "slowllm hidden texts.txt --blocks 10,20 --out states"),
    (yesno, "slowllm yesno questions.txt"),
    (tune, "slowllm tune train.jsonl --validation test.jsonl --out prompt --steps 200"),
    (convert, "slowllm convert bigscience/bloom bloom-int8 --store int8"),
    (verify, "slowllm verify bloom-int8"),
    (api, "slowllm api bigscience/bloomz-7b1 --port 8000"),
    (web, "slowllm web bigscience/bloomz-7b1 --port 7860"),
    (serve, "slowllm serve bigscience/bloom --blocks 0:8"),
    (dht, "slowllm dht --identity peer.key --host-maddrs /ip4/0.0.0.0/tcp/31330"),
)
for _verb, _command in _VERBS:
    # What follows the verb of `config` are options of that verb.
    add_verb(app, _verb, _command, context_settings={"ignore_unknown_options": _verb is config})
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
    with Stderr() as stderr:
        if sys.stdout is None:
            stderr.error("standard output is closed")
            sys.exit(2)
        keep_together()
        keep_few_kernels()
        try:
            try:
                arguments, said = from_petals(sys.argv[1:])
                for line in said:
                    write_line(line)
                app(args=arguments, obj=stderr)
            finally:
                sys.stdout.flush()  # else what cannot be written would fail when Python ends, with another exit code
        except SlowLLMError as error:
            stderr.error(str(error))
            sys.exit(2)
        except OSError as error:
            if not _stdout_fails():
                _leave_unexpected(stderr, error)
            # Python writes what is left when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                sys.exit(1)  # whoever read has left, and needs no sentence
            stderr.error(f"standard output: {error.strerror or error}")
            sys.exit(2)
        except Exception as error:
            _leave_unexpected(stderr, error)


def _leave_unexpected(stderr: Stderr, error: Exception) -> NoReturn:
    """End with a traceback, as JSON where stderr is JSON lines."""
    if stderr.unexpected(error):
        sys.exit(1)
    raise error


def _stdout_fails() -> bool:
    try:
        sys.stdout.flush()  # fails again with what could not be written
    except OSError:
        return True
    return False
