"""`slowllm batch`: answer a file of requests in OpenAI's batch format."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs, options
from slowllm.entrypoints.cli.output import json_writer
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.cost import cost_of
from slowllm.errors import InputError, counted
from slowllm.files import read_lines


@takes_swarm
def batch(
    file: Annotated[
        str | None,
        typer.Argument(
            help="JSON Lines file in OpenAI's batch format; - or nothing reads standard input.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    out: options.Out = None,
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    state: options.State = None,
    overwrite: options.Overwrite = False,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Requests are for /v1/completions or /v1/chat/completions, and share the same sweeps. The answers are written in
    their order, one line each, to standard output or --out. The defaults are OpenAI's, so tokens are sampled at
    temperature 1 unless a request says otherwise. A request without a seed gets one that is derived from its custom_id;
    the prompts of a list count up from it. Without max_tokens a completion gets 16 tokens and a chat 128. The model
    that a request names is ignored.

    A request that fails gets an error line, and the others continue. The exit code is 0 when every request was
    answered, 1 when some failed (all lines are written; their number is on standard error), and 2 when nothing was
    done.

    With --out or --state, the same command resumes after a crash or kill: finished micro-batches are not computed again,
    and the bytes written are those of a run that was never interrupted.
    """
    options.log_to_stderr(verbose)
    if file is None:
        if not inputs.has_piped_input():
            raise InputError("give a file of requests, or pipe it into standard input")
        file = "-"
    lines = read_lines(file)  # before the model is opened: an unreadable file should not cost a wait
    runner = Runner(
        model, ram, device, vram, dtype, resident=resident, swarm=swarm, state=state, kind="batch",
        overwrite=overwrite, dry_run=dry_run, exact=exact,
    )  # fmt: skip
    out = runner.check_output(out, file)
    runner.load_libraries()
    from slowllm.entrypoints import openai_batch as requests
    from slowllm.entrypoints.openai_requests import Request, read_requests
    from slowllm.entrypoints.openai_responses import refused
    from slowllm.entrypoints.progress import duration, progress

    started = time.perf_counter()
    # Every request is checked before the first byte of weights is read.
    entries = read_requests(runner.info, lines, runner.inputs())
    refusals = [entry for entry in entries if not isinstance(entry, Request)]
    if dry_run:
        if len(refusals) == len(entries):
            raise InputError(f"{file}: no request can be answered")
        runner.print_plan(requests.plan_of(runner.info, entries, runner.rates, runner.begun))
        return
    num_failed, cost = 0, ""
    with contextlib.ExitStack() as stack:
        if len(refusals) == len(entries):
            runner.refuse_begun()
            answers: Iterator[dict[str, Any]] = map(refused, refusals)
            write = stack.enter_context(json_writer(out))
        else:
            job = requests.plan_of(runner.info, entries, runner.rates, runner.begun)
            lm = stack.enter_context(runner.open(job))
            if others := requests.other_models(lm, entries):
                more = ", ..." if len(others) > 3 else ""
                print(f"{lm.name} answers requests for {', '.join(others[:3])}{more}", file=sys.stderr)
            described = requests.describe(lm, entries, runner.begun)
            chats = requests.rendered_chats(entries)
            saved = stack.enter_context(runner.resuming(lambda: described, inputs=chats or None))
            answers = requests.answer(lm, entries, described, saved)
            write = stack.enter_context(json_writer(out))
            num_good = len(entries) - len(refusals)
            count = stack.enter_context(progress(lm, job, saved, noun="request", total=num_good))
        for line in answers:
            write(line)
            num_failed += line["error"] is not None
            if line["error"] is None:
                count(line["response"]["body"]["usage"]["completion_tokens"])
        if len(refusals) < len(entries):
            cost = f" in {cost_of(lm)}"
    failed = f"; {num_failed} of {counted(len(entries), 'line')} failed" if num_failed else ""
    print(
        f"{counted(len(entries) - num_failed, 'request')} answered{cost}, {duration(time.perf_counter() - started)}"
        f"{failed}",
        file=sys.stderr,
    )
    if num_failed:
        raise typer.Exit(1)
