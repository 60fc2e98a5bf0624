"""The verb `tune`: parse, call, print."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    ModelOption,
    RamOption,
    ResidentOption,
    StateOption,
    Verbose,
    VramOption,
    describe,
    log_to_stderr,
    memory_of,
)
from slowllm.errors import InputError
from slowllm.options import format_binary, format_bytes, parse_dtype

if TYPE_CHECKING:
    from slowllm.planning.job import Job
    from slowllm.runtime.streamed_lm import StreamedLM
    from slowllm.tuning.recipe import Recipe


def tune(
    data: Annotated[
        list[str],
        typer.Argument(
            help='Examples, each file a task of its own: JSON Lines of {"prompt", "answer"}, {"prompt", "label"} or '
            '{"text"}, in a file named .jsonl; else a text a line.',
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", help="Folder for the prompt, in PEFT's format, and its log.", metavar="DIR"),
    ],
    validation: Annotated[
        list[str] | None,
        typer.Option(
            help="File to judge by, one for each file of examples; the best prompt is kept.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Word that may follow a prompt, with the blank it begins with; give two or more.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="Virtual tokens before the text (shallow), vectors added in every block besides (deep), or keys and "
            "values in every block (prefix).",
            metavar="shallow|deep|prefix",
        ),
    ] = "shallow",
    tokens: Annotated[int, typer.Option(help="Virtual tokens.", min=1)] = 8,
    init: Annotated[
        str,
        typer.Option(
            help="Start from tokens drawn from the vocabulary, from random numbers, or from --init-text.",
            metavar="vocab|random|text",
        ),
    ] = "vocab",
    init_text: Annotated[str | None, typer.Option(help="Start from this text.")] = None,
    top: Annotated[
        int | None,
        typer.Option(
            help="Tune only in so many of the uppermost blocks; those below are then passed once for all steps.",
            min=1,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates; each takes a sweep up and one down.", min=1)] = 100,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the examples, instead of --steps.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a batch.", min=1)] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches of an update.", min=1)] = 1,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate of AdamW; given again, another trial.", show_default="0.03"),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", min=0.0)] = 0.0,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate.", metavar="linear|cosine|constant")
    ] = "linear",
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.", min=0)] = 0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this; 0 for never.", min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the start and the order of examples.", min=0)] = 0,
    trials: Annotated[
        int, typer.Option(help="Seeds to try, counted on from --seed; all in the same sweeps.", min=1)
    ] = 1,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between validations.", min=1, show_default="an epoch")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a better one.", min=1)
    ] = None,
    resident: ResidentOption = True,
    state: StateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Tune a soft prompt: a few numbers before every text, on a model that stays as it is and need not fit.

    Each step goes up the blocks and down again, once for all its examples, and for all trials: every --lr with every
    seed on every file. Says before the first step what it takes and how much memory. Prints a line for each step and
    each validation; they are also in OUT/log.jsonl, and for TensorBoard in OUT where it is installed. Several trials have
    a folder each in OUT.

    With --state the same command goes on after a crash or kill, with the same numbers to the last bit. A loss that is no
    number, or one beyond all measure, ends its trial with the step and the example named; the last good prompt stays.

    Use the prompt with --prompt OUT of forward, score, yesno, eval and generate, or in PEFT.
    """
    log_to_stderr(verbose)
    memory = memory_of(ram, device, vram)
    parse_dtype(dtype)
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
    known = describe(model)
    from slowllm.tuning.recipe import Recipe
    from slowllm.tuning.tune import tune

    recipes = [
        Recipe(
            kind=kind, num_tokens=tokens, init=init, init_text=init_text, top=top, num_steps=steps, num_epochs=epochs,  # type: ignore[arg-type]
            batch_size=batch_size, accumulate=accumulate, learning_rate=rate, weight_decay=weight_decay,
            schedule=schedule, warmup_steps=warmup, max_grad_norm=max_grad_norm, seed=seed + number,  # type: ignore[arg-type]
            eval_every=eval_every, patience=patience,
        )
        for rate in lr or [0.03]
        for number in range(trials)
    ]  # fmt: skip
    folder = Path(out).expanduser()
    with contextlib.ExitStack() as stack:
        shown = _Shown(stack, recipes)
        log = stack.enter_context(_log(folder))
        write = _line_writer(as_json, many=len(recipes) * len(data) > 1)

        def on_record(record: dict[str, Any]) -> None:
            log(record)
            write(record)

        stack.enter_context(_interrupted(folder))
        found = tune(
            known, dict(zip(names, data, strict=True)), dict(zip(names, validation or [], strict=False)),
            labels=label or (), recipes=recipes, ram=memory.ram, device=memory.device, vram=memory.vram, dtype=dtype,
            keep_resident=resident, out=folder, state=state, on_open=shown.open, on_record=on_record,
        )  # fmt: skip
    for one in found:
        losses = [record["loss"] for record in one.records if "loss" in record]
        if not one.failure and not validation and len(losses) > 1 and losses[-1] >= losses[0]:
            print(
                f"{one.name}: its last loss, {losses[-1]:.4g}, is no better than its first, {losses[0]:.4g}; "
                "lower --lr, or give it more --steps",
                file=sys.stderr,
            )
    print(
        f"{'the prompt is' if len(found) == 1 else f'{len(found)} prompts are'} in {folder}", file=sys.stderr
    )
    if num_failed := sum(one.failure is not None for one in found):
        print(f"slowllm: {num_failed} of {len(found)} trials failed", file=sys.stderr)
        raise typer.Exit(1)


@contextlib.contextmanager
def _interrupted(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"slowllm: interrupted; the last good prompt is in {out}, if a step was done", file=sys.stderr)
        raise


class _Shown:
    """Says on stderr what is about to be done, and where the carousel is."""

    def __init__(self, stack: contextlib.ExitStack, recipes: list[Recipe]) -> None:
        self._status, self._recipes = stack.enter_context(contextlib.ExitStack()), recipes

    def open(self, lm: StreamedLM, job: Job, what: str, peak_bytes: int) -> None:
        """Tell what a phase takes."""
        from slowllm.entrypoints.progress import duration, steps

        plan, forecast = lm.plan, lm.plan.forecast
        held = "all that is used fits in memory"
        if plan.ring_bytes:
            num_used = lm.num_stops - len(plan.unused)
            held = f"{len(lm.resident - plan.unused)} of {num_used} stops stay in memory"
        if job.turns:
            times = max(1, forecast.num_sweeps)
            about = ""
            if plan.ring_bytes:
                first, later = (
                    duration(forecast.first_seconds),
                    duration(forecast.later_seconds * times),
                )
                about = f"; about {first} for the first step and {later} for each later one"
            line = f"steps of up to {job.num_tokens:,} tokens{about}"
        else:
            line = f"{what}: {job.num_tokens:,} tokens, once" + (
                f", about {duration(forecast.seconds)}" if plan.ring_bytes else ""
            )
        print(
            f"{lm.name}: {format_bytes(lm.weight_bytes)} of weights, {held}; {line}; at most {format_binary(peak_bytes)} of RAM",
            file=sys.stderr,
        )
        self._status.close()
        self._status.enter_context(steps(lm, what))


@contextlib.contextmanager
def _log(out: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes a record to the log, and to TensorBoard's where that is installed.

    Nothing is touched before the first record, when all has been looked at and the folder is this run's.
    """
    with contextlib.ExitStack() as stack:
        file: IO[str] | None = None
        board: Any = None

        def write(record: dict[str, Any]) -> None:
            nonlocal file, board
            if file is None:
                file = stack.enter_context(open(out / "log.jsonl", "w", encoding="utf-8"))
                board = _board(out)
                if board is not None:
                    stack.callback(board.close)
            file.write(json.dumps(record) + "\n")
            file.flush()
            for name, value in record.items():
                if board is not None and name not in ("trial", "step"):
                    board.add_scalar(f"{record['trial']}/{name}", value, record["step"])

        yield write


def _board(out: Path) -> Any:
    """Return TensorBoard's writer, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    for old in out.glob("events.out.tfevents.*"):  # of a run that this one goes on from, or replaces
        old.unlink()
    return SummaryWriter(str(out))


def _line_writer(as_json: bool, *, many: bool) -> Callable[[dict[str, Any]], None]:
    """Return a function that prints a record: as JSON, or on a terminal as a line of a table."""
    if as_json or not sys.stdout.isatty():
        return lambda record: print(json.dumps(record), flush=True)

    def line(record: dict[str, Any]) -> None:
        parts = [record["trial"]] if many else []
        parts.append(f"step {record['step']:>4}")
        if "loss" in record:
            parts += [
                f"loss {record['loss']:.4f}", f"gradient {record['grad_norm']:.3g}",
                f"rate {record['learning_rate']:.3g}", f"{record['num_tokens']:,} tokens",
                f"{record['seconds']:.2f} s", f"{format_bytes(record['read_bytes'])} read",
            ]  # fmt: skip
        else:
            parts.append(f"validation {record['validation_loss']:.4f}")
            parts += [f"accuracy {record['accuracy']:.3f}"] if "accuracy" in record else []
        print("  ".join(parts), flush=True)

    return line
