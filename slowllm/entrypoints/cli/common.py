"""What the verbs of the command line share: common options, input files, output files, logs."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slowllm.errors import InputError
from slowllm.files import part_of
from slowllm.options import parse_bytes, parse_devices, parse_dtype

if TYPE_CHECKING:
    from slowllm.inference.text import Query
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.streamed_lm import StreamedLM

if TYPE_CHECKING:
    from slowllm.runtime.description import ModelInfo

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what is chosen, and why.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Folder or cached hub id of a checkpoint.", show_default="the embedded tiny-bloom"
    ),
]
RamOption = Annotated[str, typer.Option("--ram", help="Memory budget of the whole process.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where blocks are computed: cpu, cuda, cuda:1, or several that take turns, as in cuda:0,cuda:1.",
    ),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        "--vram",
        help="Memory budget on each GPU.",
        show_default="what is free there, less a reserve",
    ),
]
DTypeOption = Annotated[str, typer.Option("--dtype", help="Compute dtype: auto, bf16, fp32 or fp16.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write JSON lines to this file.")]
ResidentOption = Annotated[
    bool,
    typer.Option("--resident/--stream-all", help="Keep blocks that fit the budget, or stream every block."),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="Folder of a soft prompt, of `slowllm tune` or PEFT, before every text.",
        metavar="DIR",
    ),
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state", help="Keep what is done in this folder: the same command goes on after a crash or kill."
    ),
]


@dataclass(frozen=True)
class Memory:
    """Where a model is computed, and the memory that it may take; from `memory_of`."""

    ram: str
    device: str = "cpu"
    vram: str | None = None


def memory_of(ram: str, device: str, vram: str | None) -> Memory:
    """Return the options together, once it is known that each can be read and that they go together."""
    parse_bytes(ram)
    if vram is not None:
        parse_bytes(vram)
    if parse_devices(device) == ("cpu",) and vram is not None:
        raise InputError("--vram is for a GPU; name one with --device cuda, or leave it out")
    return Memory(ram, device, vram)


def checked_output(out: Path, file: str) -> Path:
    """Return the file to write, links followed, once it is known that nothing else is lost by it."""
    try:
        out = out.expanduser().resolve()
        if not out.parent.is_dir():
            raise InputError(f"{out.parent}: no such folder to write {out.name} to")
        if out.is_dir():
            raise InputError(f"{out}: is a folder; name a file")
        for target in (out, part_of(out)):
            if target.exists() and not target.is_file():
                raise InputError(f"{target}: is no ordinary file; leave out --out to print")
            if file != "-" and target.exists() and target.samefile(file):
                raise InputError(f"{target}: is the input; name another file")
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: {getattr(error, 'strerror', None) or error}") from error
    return out


def embedded_model() -> Path:
    """Return the folder of the small BLOOM that comes with the package."""
    here = Path(__file__).resolve().parents[2]
    for folder in (here / "weights" / "tiny-bloom", here.parent / "weights" / "tiny-bloom"):
        if folder.is_dir():
            return folder
    raise InputError("this installation has no embedded model; name one with --model")


def log_to_stderr(verbose: bool) -> None:
    """Log warnings to stderr, and with `verbose` what is chosen, and why."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("slowllm").setLevel(logging.INFO if verbose else logging.WARNING)


def describe(model: str | None, prompt: str | None = None) -> ModelInfo:
    """Open what says what a model is, the embedded one by default, and its soft prompt; weights are left alone."""
    import transformers

    transformers.logging.set_verbosity_error()
    from slowllm.runtime.description import ModelInfo

    return ModelInfo(embedded_model() if model is None else model, prompt)


NORMALIZE = ("none", "tokens", "characters", "unconditional")


NormalizeOption = Annotated[
    str,
    typer.Option(
        help="Compare choices by log-likelihoods as they are (none), by a share of each of their tokens or characters, "
        "or less the log-likelihood without the context (unconditional).",
        metavar="|".join(NORMALIZE),
    ),
]


def checked_model(
    model: str | None, dtype: str, normalize: str = "none", prompt: str | None = None
) -> ModelInfo:
    """Look at the options, and open what says what a model is; its weights are left alone."""
    parse_dtype(dtype)
    if normalize not in NORMALIZE:
        raise InputError(f"--normalize {normalize!r} is unknown; use one of {', '.join(NORMALIZE)}")

    return describe(model, prompt)


@contextlib.contextmanager
def opened(known: ModelInfo, queries: Sequence[Query], memory: Memory, dtype: str) -> Iterator[StreamedLM]:
    """Load a model for queries, show its way, and say at the end what it cost."""
    from slowllm.entrypoints.api import load
    from slowllm.entrypoints.progress import progress
    from slowllm.inference import scoring
    from slowllm.runtime.rates import quick_rates

    rates = quick_rates(known.folder, parse_dtype(dtype))
    job = scoring.job_of_queries(queries, known, rates)
    with load(
        known, ram=memory.ram, device=memory.device, vram=memory.vram, dtype=dtype, job=job, rates=rates
    ) as lm:
        started = time.perf_counter()
        with progress(lm, job):
            yield lm
        num_sweeps = lm.report.num_passages / lm.num_stops
        print(
            f"{num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'} in {time.perf_counter() - started:.2f} s",
            file=sys.stderr,
        )
