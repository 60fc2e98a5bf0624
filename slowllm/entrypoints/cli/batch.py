"""The verbs `batch` and `chat`: parse, call, print."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Annotated

import typer

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    ModelOption,
    OutOption,
    RamOption,
    ResidentOption,
    StateOption,
    Verbose,
    VramOption,
    checked_output,
    describe,
    log_to_stderr,
    memory_of,
)
from slowllm.files import read_lines
from slowllm.options import parse_dtype


def batch(
    file: Annotated[str, typer.Argument(help="JSON lines in OpenAI's batch format; - reads standard input.")],
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    out: OutOption = None,
    resident: ResidentOption = True,
    state: StateOption = None,
    verbose: Verbose = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format, all of them in the same sweeps.

    Requests are for /v1/completions or /v1/chat/completions; answers come in their order, one line each, to standard
    output or --out. Defaults are OpenAI's, so tokens are drawn at temperature 1 unless a request says otherwise;
    where it has no seed, one is made of its custom_id, and the prompts of a list count on from it. Without max_tokens
    a completion gets 16 tokens and a chat 128. The model that a request names is left aside.

    A line that cannot be done gets an error line and the others go on. Exit code: 0 when every request was
    answered, 1 when some lines failed (all of them are written; the number is on standard error), 2 when nothing
    was done.

    With --state the same command goes on after a crash or kill: micro-batches that had ended are not done again,
    and the bytes written are those of a run that was never interrupted.
    """
    log_to_stderr(verbose)
    lines = read_lines(file)  # before the model is opened: an unreadable file should not cost a wait
    memory = memory_of(ram, device, vram)
    parse_dtype(dtype)
    if out is not None:
        out = checked_output(out, file)
    begun = None
    if state is not None:
        from slowllm.runtime.state import read_job

        begun = read_job(state, "batch")
    from slowllm.entrypoints import openai_batch as requests
    from slowllm.entrypoints.cli import output
    from slowllm.entrypoints.openai_requests import Request, read_requests
    from slowllm.entrypoints.openai_responses import refused
    from slowllm.entrypoints.progress import duration, progress
    from slowllm.runtime.load import open_model
    from slowllm.runtime.rates import quick_rates
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM

    started = time.perf_counter()
    known = describe(model)
    # Every request is looked at before the first byte of weights is read.
    entries = read_requests(known, lines)
    num_failed, cost = 0, ""
    if any(isinstance(entry, Request) for entry in entries):
        if begun is not None and dtype == "auto":
            dtype = str(begun.get("dtype"))  # measured anew it might come out otherwise
        rates = quick_rates(known.folder, parse_dtype(dtype))
        job = requests.plan_of(known, entries, rates, begun)
        with (
            open_model(
                StreamedLM,
                known,
                ram=memory.ram,
                device=memory.device,
                vram=memory.vram,
                dtype=dtype,
                keep_resident=resident,
                job=job,
                rates=rates,
            ) as lm,
            contextlib.ExitStack() as stack,
        ):
            if others := requests.other_models(lm, entries):
                more = ", ..." if len(others) > 3 else ""
                print(f"{lm.name} answers requests for {', '.join(others[:3])}{more}", file=sys.stderr)
            described = requests.describe(lm, entries, begun)
            kept = None if state is None else stack.enter_context(State(state, described))
            with output.json_writer(out) as write, progress(lm, job, kept):
                for line in requests.answer(lm, entries, described, kept):
                    write(line)
                    num_failed += line["error"] is not None
            num_sweeps = lm.report.num_passages / lm.num_stops
            cost = f" in {num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'}"
    else:
        with output.json_writer(out) as write:
            for entry in entries:
                assert not isinstance(entry, Request), "all were refused"
                write(refused(entry))
                num_failed += 1
    failed = f"; {num_failed} of {len(entries)} lines failed" if num_failed else ""
    print(
        f"{len(entries) - num_failed} requests answered{cost}, {duration(time.perf_counter() - started)}"
        f"{failed}",
        file=sys.stderr,
    )
    if num_failed:
        raise typer.Exit(1)
