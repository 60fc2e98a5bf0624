"""`slowllm tune`: tune a soft prompt on examples."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.inputs import check_installed
from slowllm.entrypoints.cli.recipe_file import RecipeFile
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.cli.tune_output import announce, record_printer, writing_log
from slowllm.entrypoints.report.recorder import reporting
from slowllm.entrypoints.report.results import StepDone
from slowllm.errors import InputError, counted
from slowllm.files import system_errors

if TYPE_CHECKING:
    from slowllm.planning.job import Job
    from slowllm.runtime.streamed_lm import StreamedLM

# Each trial holds a prompt and an optimizer, and every step of it is computed.
MAX_TRIALS = 256


@takes_swarm
def tune(
    data: Annotated[
        list[str],
        typer.Argument(
            help='Files of examples, each a task of its own: JSON Lines of {"prompt", "answer"}, {"prompt", "label"} '
            'or {"text"} in a file named .jsonl; CSV or Parquet with such columns; otherwise one text a line.',
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out", help="Folder for the prompt, in PEFT's format, and for its log.", metavar="DIR"
        ),
    ],
    validation: Annotated[
        list[str] | None,
        typer.Option(
            help="File to validate on, one for each file of examples; the best prompt is kept.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Word that may follow a prompt, written as in the examples, with the blank that it begins with; give two "
            "or more.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeFile = None,
    kind: Annotated[
        str,
        typer.Option(
            help="Tune virtual tokens before the text (shallow), also vectors that are added in every block (deep), or "
            "keys and values in every block (prefix).",
            metavar="shallow|deep|prefix",
        ),
    ] = "shallow",
    tokens: Annotated[int, typer.Option(help="Number of virtual tokens.", min=1)] = 8,
    init: Annotated[
        str,
        typer.Option(
            help="Start from random tokens of the vocabulary, from random numbers, or from --init-text.",
            metavar="vocab|random|text",
        ),
    ] = "vocab",
    init_text: Annotated[str | None, typer.Option(help="Start from this text.")] = None,
    top: Annotated[
        int | None,
        typer.Option(
            help="Tune only this many of the uppermost blocks; the blocks below are computed once for all steps.",
            min=1,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of updates; each takes a sweep up and a sweep down.", min=1, show_default="100"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Number of passes over the examples, in place of --steps.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of examples of a batch.", min=1)] = 8,
    accumulate: Annotated[int, typer.Option(help="Number of batches of an update.", min=1)] = 1,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate of AdamW; give several for several trials.", show_default="0.03"),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.", min=0.0)] = 0.0,
    schedule: Annotated[
        str, typer.Option(help="Schedule of the learning rate.", metavar="linear|cosine|constant")
    ] = "linear",
    warmup: Annotated[
        int, typer.Option(help="Number of steps over which the learning rate rises.", min=0)
    ] = 0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Clip gradients to this norm; 0 for never.", min=0.0)
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the initial prompt and of the order of the examples.", min=0)
    ] = 0,
    trials: Annotated[
        int,
        typer.Option(
            help="Number of seeds to try, counted up from --seed; all in the same sweeps.",
            min=1,
            max=MAX_TRIALS,
        ),
    ] = 1,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Number of steps between validations.", min=1, show_default="an epoch"),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many validations without a better one.", min=1)
    ] = None,
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    state: options.State = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the prompt and the log of an earlier run in --out.")
    ] = False,
    report: options.Report = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Tune a soft prompt: a few trained vectors before every text.

    The model is frozen, and need not fit in memory. Each step is a sweep up the blocks and a sweep down, shared by all
    its examples and by all trials: every --lr with every seed on every file. Before the first step it prints how long a
    step takes and how much memory. It prints a line for each step and each validation; they are also written to
    OUT/log.jsonl, and to OUT for TensorBoard where that is installed. Of several trials, each has its own folder in OUT.

    With --state, the same command resumes after a crash or kill and gives the same numbers to the last bit. A loss that
    is NaN or infinite, or far too large, ends its trial with a message that names the step and the example; the last
    good prompt is kept.

    Use the prompt with --prompt OUT of forward, score, yesno, eval and generate, or in PEFT.
    """
    options.log_to_stderr(verbose)
    del recipe  # its fields came as the defaults of the options below
    if steps is not None and epochs is not None:
        raise InputError("--steps and --epochs contradict each other; give one of them")
    if validation and len(validation) != len(data):
        raise InputError(
            f"give as many files with --validation as of examples: {len(data)}, not {len(validation)}"
        )
    names = [Path(file).stem for file in data]
    if len(set(names)) < len(names):
        raise InputError(f"two files have the same name: {', '.join(sorted(names))}; rename one")
    if init_text is not None and init == "random":
        raise InputError("--init random does not go with --init-text")
    if init == "text" and init_text is None:
        raise InputError("--init text needs --init-text")
    if init_text is not None and not init_text.strip():
        raise InputError("--init-text is empty")
    if not out.strip():
        raise InputError("--out is empty; name a folder")
    if init_text is not None:
        init = "text"
    if not validation and (patience is not None or eval_every is not None):
        raise InputError("--patience and --eval-every need --validation")
    if out == "-":
        raise InputError("--out - is no folder; a prompt is a folder of files, so name one")
    for file in (*data, *(validation or ())):
        with system_errors(InputError, file), open(file, "rb"):
            pass
    num_trials = len(lr or [0.03]) * trials * len(data)
    if num_trials > MAX_TRIALS:
        raise InputError(
            f"{num_trials:,} trials (every --lr with every seed on every file) are too many for one run, which takes "
            f"{MAX_TRIALS}"
        )
    check_installed("peft")
    from slowllm.tuning.recipe import Recipe

    recipes = [
        Recipe(
            kind=kind, num_tokens=tokens, init=init, init_text=init_text, top=top, num_steps=steps or 100, num_epochs=epochs,  # type: ignore[arg-type]
            batch_size=batch_size, accumulate=accumulate, learning_rate=rate, weight_decay=weight_decay,
            schedule=schedule, warmup_steps=warmup, max_grad_norm=max_grad_norm, seed=seed + number,  # type: ignore[arg-type]
            eval_every=eval_every, patience=patience,
        )
        for rate in lr or [0.03]
        for number in range(trials)
    ]  # fmt: skip
    runner = Runner(
        model,
        ram,
        device,
        vram,
        dtype,
        resident=resident,
        swarm=swarm,
        state=state,
        kind="tune",
        dry_run=dry_run,
    )
    report = runner.check_report(report, *data, *(validation or ()), out=out)
    runner.load_libraries()
    info = runner.info
    from slowllm.entrypoints.api_tune import tune
    from slowllm.tuning.session import RunOptions
    from slowllm.tuning.tune import phases_of

    if dry_run:
        phases = phases_of(
            info, dict(zip(names, data, strict=True)), dict(zip(names, validation or [], strict=False)),
            labels=label or (), recipes=recipes,
            options=RunOptions(ram, device, vram, dtype, resident, state=state),
        )  # fmt: skip
        for phase in phases:
            print(f"plan of {phase.name}:", file=sys.stderr)
            runner.print_plan(*phase.jobs, as_json=as_json, reserved_bytes=phase.reserved_bytes)
        return
    folder = Path(out).expanduser()
    _refuse_to_replace(folder, info.folder, [*data, *(validation or [])], overwrite or _is_begun(state))
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(reporting(report, "slowllm tune"))
        status = stack.enter_context(contextlib.ExitStack())
        log = stack.enter_context(writing_log(folder))
        show = record_printer(as_json, many=len(recipes) * len(data) > 1)

        def on_open(lm: StreamedLM, job: Job, what: str, peak_bytes: int) -> None:
            announce(lm, job, what, peak_bytes, status, told)

        def on_record(record: dict[str, Any]) -> None:
            log(record)
            show(record)
            told.add(StepDone(record))

        stack.enter_context(_interrupted(folder))
        results = tune(
            info, dict(zip(names, data, strict=True)), dict(zip(names, validation or [], strict=False)),
            labels=label or (), recipes=recipes, ram=ram, device=device, vram=vram, dtype=dtype,
            resident=resident, out=folder, state=state, on_open=on_open, on_record=on_record,
            swarm=runner.swarm_options(),
        )  # fmt: skip
    for result in results:
        losses = [record["loss"] for record in result.records if "loss" in record]
        if not result.failure and not validation and len(losses) > 1 and losses[-1] >= losses[0]:
            print(
                f"{result.name}: its last loss, {losses[-1]:.4g}, is no better than its first, {losses[0]:.4g}; "
                "lower --lr, or give it more --steps",
                file=sys.stderr,
            )
    where = "the prompt is" if len(results) == 1 else f"{len(results)} prompts are"
    print(f"{where} in {folder}", file=sys.stderr)
    if num_failed := sum(result.failure is not None for result in results):
        print(f"slowllm: {num_failed} of {counted(len(results), 'trial')} failed", file=sys.stderr)
        raise typer.Exit(1)


@contextlib.contextmanager
def _interrupted(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"slowllm: interrupted; the last good prompt is in {out}, if a step was done", file=sys.stderr)
        raise


# What a run writes at the top of its folder.
_OWN_FILES = ("log.jsonl", "slowllm.json", "adapter_config.json", "adapter_model.safetensors")


def _is_begun(state: Path | None) -> bool:
    return state is not None and (state.expanduser() / "job.json").is_file()


def _refuse_to_replace(out: Path, model: Path, data: Sequence[str], may_replace: bool) -> None:
    """Refuse a folder in which a run would replace what is not its own.

    Raises:
        InputError: it is the model's, the data lie where the log goes, or an earlier run is there.
    """
    if out.resolve() == model.resolve():
        raise InputError(f"{out}: is the model's own folder; name another one")
    for file in data:
        if Path(file).expanduser().resolve() == (out / "log.jsonl").resolve():
            raise InputError(f"{file}: lies where the log goes; name another folder with --out")
    there = [name for name in _OWN_FILES if (out / name).exists()]
    if there and not may_replace:
        raise InputError(
            f"{out}: has {there[0]} of an earlier run; name another folder, go on with that run's --state, or replace it "
            "with --overwrite"
        )
