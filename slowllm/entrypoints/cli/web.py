"""`slowllm web`: a page in the browser over a streamed model."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.service_jobs import CONTEXT, TOTALS, open_first, service_jobs
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.listening import listening_at, url_of
from slowllm.entrypoints.web.running import PageServer, quiet_gradio
from slowllm.errors import InputError

if TYPE_CHECKING:
    pass

_LOOK_SECONDS = 0.5
# What requests, uploads and answers take beside the model; and Gradio itself, which a dry run does not load.
_PAGE_BYTES, _GRADIO_BYTES = 192 << 20, 160 << 20


@takes_swarm
def web(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint or store, hub id of a model in the local cache, or embedded:tiny-bloom.",
            show_default="the embedded tiny-bloom",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen at; with any but the loopback's, others can use the page."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port to listen at; 0 for any that is free.", min=0, max=65535)
    ] = 7860,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    context: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of a text with its continuation; memory is planned for them.", min=2,
            show_default=f"what the model takes, at most {CONTEXT}",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of all visitors at once, continuations included; others wait.", min=2,
            show_default=f"as many as memory has room for, at most {TOTALS[0]}",
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(help="Continuations that are made at once; further ones wait.", min=1)
    ] = 32,
    max_waiting: Annotated[
        int, typer.Option(help="Texts that may wait for room; further ones are refused.", min=1)
    ] = 128,
    exact: options.ExactPrompts = False,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Show a page in the browser over a model.

    It completes, scores and compares texts. Prints the page's address when it serves. All visitors share the sweeps over the weights; who leaves, or presses Stop,
    makes room for others. Nothing is sent to or loaded from any other machine. Ends at Ctrl-C or SIGTERM.
    """
    options.log_to_stderr(verbose)
    runner = Runner(
        model, ram, device, vram, dtype, resident=resident, swarm=swarm, dry_run=dry_run, exact=exact
    )
    if dry_run:
        runner.load_libraries()
        runner.print_plan(
            *service_jobs(runner, context, max_tokens, max_rows, 0),
            reserved_bytes=_PAGE_BYTES + _GRADIO_BYTES,
        )
        return
    if importlib.util.find_spec("gradio") is None:
        raise InputError("gradio is not installed; pip install gradio, or in a checkout pip install '.[web]'")
    with contextlib.ExitStack() as held:
        bound = held.enter_context(listening_at(host, port))
        folder = held.enter_context(quiet_gradio())
        runner.load_libraries()
        jobs = service_jobs(runner, context, max_tokens, max_rows, 0)
        # Before the model, so that the budget counts what it holds.
        from slowllm.entrypoints.web.desk import Desk
        from slowllm.entrypoints.web.machine import MachineView
        from slowllm.entrypoints.web.page import page_app
        from slowllm.inference.service import Service
        from slowllm.runtime.memory import budget_of

        budget = budget_of(runner.ram, _PAGE_BYTES)
        opened, _ = open_first(runner, jobs, budget)
        lm = held.enter_context(opened)
        service = held.enter_context(Service(lm, max_rows=max_rows, max_waiting=max_waiting, is_exact=exact))
        desk = Desk(lm, service, max_rows)
        machine = held.enter_context(MachineView(desk, runner.rates, budget.total_bytes))
        results = folder / "results"
        results.mkdir()
        app, end_streams = page_app(desk, machine, results)
        with _ends() as ending, PageServer(app, bound, end_streams) as server:
            print(url_of(bound), flush=True)
            if not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
                typer.echo("whoever reaches this address can use the page", err=True)
            typer.echo(f"serves {lm.name}; Ctrl-C ends it", err=True)
            while not ending.wait(_LOOK_SECONDS):
                server.check()
            # Whoever waits for tokens is told, before the connections are closed.
            service.drain(0.0)


@contextlib.contextmanager
def _ends() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set for the length of the context."""
    ending = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ending.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
