"""`slowllm api`: answer OpenAI's requests over HTTP."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import math
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.log_format import write_line
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.service_jobs import CONTEXT, TOTALS, open_first, service_jobs
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.cli.told_to_end import END, has_been_told_to_end, may_end_while_starting
from slowllm.entrypoints.listening import listening_at, url_of
from slowllm.errors import InputError, counted
from slowllm.options import format_binary, format_bytes, parse_bytes

if TYPE_CHECKING:
    from slowllm.runtime.streamed_lm import StreamedLM

_LOOK_SECONDS = 0.2
# What bodies of requests take, and what Python and a tokenizer make of them.
_SERVER_BYTES = 160 << 20
_LEAST_BODY_BYTES = 1 << 10


@takes_swarm
def api(
    model: Annotated[
        str, typer.Argument(help="Folder of a checkpoint or store, hub id of a model in the local cache, or embedded:tiny-bloom.")
    ],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; with any but the loopback's, others can reach the server.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen at; 0 for any that is free.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="File of a key that every request must bear, at least 16 bytes and private (chmod 600).",
            show_default="none: whoever reaches the address is answered",
        ),
    ] = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    context: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of a prompt with its answer; memory is planned for them.", min=2,
            show_default=f"what the model takes, at most {CONTEXT}",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of all requests that are answered at once, answers included; others wait.", min=2,
            show_default=f"as the plan has it, at most {TOTALS[0]}",
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(help="Answers that are made at once; further ones wait.", min=1)
    ] = 64,
    kept_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of ended answers whose keys and values stay in memory, for prompts that begin alike.", min=0,
            show_default="half of --max-tokens",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder in which they are kept as well, also for a later server.", show_default=False),
    ] = None,
    cache_size: Annotated[str, typer.Option(help="Maximum size of the files there.")] = "10GiB",
    max_waiting: Annotated[
        int, typer.Option(help="Prompts that may wait for room; further ones are refused with 429.", min=1)
    ] = 256,
    max_body: Annotated[str, typer.Option(help="Maximum size of a request's body.")] = "4MiB",
    head_seconds: Annotated[
        float, typer.Option(help="Seconds in which the head of a request must have come.", min=0.1)
    ] = 20.0,
    body_seconds: Annotated[
        float, typer.Option(help="Seconds in which the body of a request must have come.", min=0.1)
    ] = 60.0,
    exact: options.ExactPrompts = False,
    drain: Annotated[
        float, typer.Option(help="Seconds that requests get to end after SIGTERM or Ctrl-C; a second signal ends them.", min=0.0)
    ] = 30.0,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Answer OpenAI's requests over HTTP, many at once.

    Prints the base URL for clients when it serves. All requests that are under way share the sweeps over the weights, each token
    of theirs takes a sweep, and streamed answers come as they are made. The model that a request names is ignored. Memory is
    planned before the start; requests for which there is no room wait. Ends at Ctrl-C or SIGTERM.
    """
    options.log_to_stderr(verbose)
    if not math.isfinite(drain):
        raise InputError(f"--drain {drain:g}: requests cannot get that long; give a number of seconds")
    for name, seconds in (("--head-seconds", head_seconds), ("--body-seconds", body_seconds)):
        if not math.isfinite(seconds):
            raise InputError(
                f"{name} {seconds:g}: a client cannot be waited for that long; give a number of seconds"
            )
    if (body_bytes := parse_bytes(max_body)) < _LEAST_BODY_BYTES:
        raise InputError(
            f"--max-body {max_body}: is too small for any request; give {_LEAST_BODY_BYTES} bytes at least"
        )
    cache_bytes = parse_bytes(cache_size)
    runner = Runner(
        model, ram, device, vram, dtype, resident=resident, swarm=swarm, dry_run=dry_run, exact=exact
    )
    if dry_run:
        runner.load_libraries()
        runner.print_plan(
            *service_jobs(runner, context, max_tokens, max_rows, kept_tokens),
            reserved_bytes=_server_bytes(body_bytes),
        )
        return
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed; pip install 'slowllm[api]'")
    from slowllm.entrypoints.server.limits import ClientLimits, read_key

    if cache is not None and cache.expanduser().exists() and not cache.expanduser().is_dir():
        raise InputError(f"--cache {cache}: is not a folder")
    limits = ClientLimits(body_bytes, body_seconds, head_seconds)
    key = None if api_key_file is None else read_key(api_key_file.expanduser())
    # Blocked before any thread begins, so that none of them is interrupted, and waited for below.
    signal.pthread_sigmask(signal.SIG_BLOCK, END)
    try:
        with contextlib.ExitStack() as held:
            listening = held.enter_context(listening_at(host, port))
            runner.load_libraries()
            from slowllm.entrypoints.openai.responses import system_fingerprint
            from slowllm.entrypoints.server.answering import Answering, Served
            from slowllm.entrypoints.server.running import HTTPServer
            from slowllm.inference.cache_folder import CacheFolder
            from slowllm.inference.service import Service
            from slowllm.runtime.memory import budget_of
            from slowllm.runtime.run_identity import run_identity

            jobs = service_jobs(runner, context, max_tokens, max_rows, kept_tokens)
            with may_end_while_starting():
                opened, job = open_first(runner, jobs, budget_of(runner.ram, _server_bytes(body_bytes)))
            lm = held.enter_context(opened)
            folder = None
            if cache is not None:
                owner = f"{lm.fingerprint()}-{str(lm.model.dtype).removeprefix('torch.')}"
                folder = CacheFolder(cache.expanduser(), owner, cache_bytes)
                held.callback(folder.close)
            service = held.enter_context(
                Service(
                    lm,
                    max_rows=max_rows,
                    max_waiting=max_waiting,
                    kept_tokens=job.cache_tokens,
                    folder=folder,
                    is_exact=exact,
                )
            )
            served = Served(
                lm,
                service,
                system_fingerprint(run_identity("api", lm)),
                limits,
                max_prompts=max_waiting,
                key=key,
            )
            answering = Answering(served)
            server = held.enter_context(HTTPServer(answering, listening))
            url = f"{url_of(listening)}v1"
            print(url, flush=True)
            write_line(_described(lm, key is not None, _is_loopback(listening), body_bytes))
            while not has_been_told_to_end(_LOOK_SECONDS):
                server.check()
            answering.leave()
            draining = threading.Thread(target=service.drain, args=(drain,), name="slowllm-drain")
            draining.start()
            if service.status().num_riding + service.status().num_waiting:
                write_line(f"ending when all requests are answered, in {drain:g} s, or at the next signal")
            while draining.is_alive() and not has_been_told_to_end(_LOOK_SECONDS):
                pass
            service.drain(0.0)
            draining.join()
        write_line("ended")
    finally:
        while has_been_told_to_end(0.0):
            pass  # of several signals at once, the first has ended the server
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END)


def _server_bytes(body_bytes: int) -> int:
    from slowllm.entrypoints.server.limits import BODIES_AT_ONCE

    return _SERVER_BYTES + BODIES_AT_ONCE * body_bytes


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _described(lm: StreamedLM, has_key: bool, is_loopback: bool, body_bytes: int) -> str:
    plan = lm.plan
    open_to_all = (
        ""
        if has_key or is_loopback
        else "whoever reaches the address is answered (--api-key-file asks for a key); "
    )
    return (
        f"serves {lm.name}, {format_bytes(lm.weight_bytes)} a sweep: {counted(plan.sweep_tokens, 'token')} of all requests at once, "
        f"{counted(plan.longest, 'token')} in a prompt with its answer, bodies of {format_binary(body_bytes)}; {open_to_all}"
        "Ctrl-C ends it."
    )
