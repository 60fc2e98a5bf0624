"""Open a verb's model as its options say, show the progress, and say at the end what the run cost."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slowllm.entrypoints.cli.options import check_output
from slowllm.errors import InputError
from slowllm.options import AUTO, parse_bytes, parse_devices, parse_dtype

if TYPE_CHECKING:
    from slowllm.inference.text import Query
    from slowllm.planning.budget import Budget
    from slowllm.planning.job import Job, Rates
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.streamed_lm import StreamedLM


class Runner:
    """One call of a verb: which model it opens, where, and in how much memory.

    Args:
        model: folder or hub id; the embedded model by default.
        ram: memory budget for the whole process.
        device: where the blocks are computed.
        vram: memory budget on each GPU.
        dtype: compute dtype.
        prompt: folder of a soft prompt.
        resident: whether blocks that fit the budget stay in memory.
        state: folder in which a job keeps its finished work.
        kind: of that job.
    Attributes:
        begun: what the state folder says about its job, None where no process began one.
        dtype: that of a begun job instead of ``auto``, which might come out otherwise when it is measured again.
    Raises:
        InputError: an option cannot be read, or does not go with another.
        StateError: the state folder belongs to a job of another kind, or is damaged.
    """

    def __init__(
        self, model: str | None, ram: str, device: str, vram: str | None, dtype: str, *,
        prompt: str | None = None, resident: bool = True, state: Path | None = None, kind: str = "",
    ) -> None:  # fmt: skip
        if ram != AUTO:
            parse_bytes(ram)
        if vram is not None:
            parse_bytes(vram)
        if parse_devices(device) == ("cpu",) and vram is not None:
            raise InputError("--vram is for a GPU; name one with --device cuda, or leave it out")
        parse_dtype(dtype)
        self.ram, self.device, self.vram, self.dtype, self.resident = ram, device, vram, dtype, resident
        self._model, self._prompt, self._state = model, prompt, state
        self._out: Path | None = None
        self.begun: Mapping[str, Any] | None = None
        if state is not None:
            from slowllm.runtime.state import read_job

            self.begun = read_job(state, kind)
            if self.begun is not None and dtype == "auto":
                self.dtype = str(self.begun.get("dtype"))

    def check_output(self, out: Path | None, *files: str | Path | None) -> Path | None:
        """Return the file to write; see `options.check_output`. No file of the model, prompt or state is one.

        Raises:
            InputError: it cannot be written, or writing it would destroy something.
        """
        out = check_output(out, *files)
        _refuse_file_of(self._prompt, out)
        if self._state is not None and out is not None and self._state.expanduser().resolve() in out.parents:
            raise InputError(f"{out}: lies in the folder of --state; name another file")
        self._out = out
        return out

    @functools.cached_property
    def info(self) -> ModelInfo:
        """What the checkpoint and its soft prompt say about themselves; no weight is read."""
        import transformers

        transformers.logging.set_verbosity_error()
        from slowllm.runtime.description import ModelInfo

        info = ModelInfo(embedded_model() if self._model is None else self._model, self._prompt)
        _refuse_file_of(info.folder, self._out)
        return info

    @functools.cached_property
    def rates(self) -> Rates:
        """The rates of this machine, measured on the model's own files."""
        from slowllm.runtime.rates import quick_rates

        return quick_rates(self.info.folder, parse_dtype(self.dtype))

    def open(self, job: Job, budget: Budget | None = None) -> StreamedLM:
        """Open the model for a job; the caller closes it.

        Args:
            job: what the plan must know.
            budget: memory that it shares with another model, instead of `ram`.
        """
        from slowllm.runtime.load import open_model
        from slowllm.runtime.streamed_lm import StreamedLM

        return open_model(
            StreamedLM, self.info, ram=budget or self.ram, device=self.device, vram=self.vram, dtype=self.dtype,
            keep_resident=self.resident, job=job, rates=self.rates,
        )  # fmt: skip

    @contextlib.contextmanager
    def open_for_queries(self, queries: Sequence[Query]) -> Iterator[StreamedLM]:
        """Open the model to answer queries, show the progress, and say at the end what they cost."""
        from slowllm.entrypoints.progress import progress
        from slowllm.inference import scoring

        job = scoring.job_of_queries(queries, self.info, self.rates)
        with self.open(job) as lm:
            started = time.perf_counter()
            with progress(lm, job):
                yield lm
            print(f"{sweeps_of(lm)} in {time.perf_counter() - started:.2f} s", file=sys.stderr)


def _refuse_file_of(folder: str | Path | None, out: Path | None) -> None:
    """Refuse to replace a file of a folder; results of an earlier run, JSON lines, may lie there."""
    if folder is None or out is None:
        return
    inside = Path(folder).expanduser().resolve() in out.parents
    if inside and out.exists() and out.suffix != ".jsonl":
        raise InputError(f"{out}: is a file of {folder}; name another file")


def sweeps_of(lm: StreamedLM) -> str:
    """Return how many sweeps a model has made, in words."""
    num_sweeps = lm.report.num_passages / lm.num_stops
    return f"{num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'}"


def embedded_model() -> Path:
    """Return the folder of the small BLOOM that comes with the package."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "weights" / "tiny-bloom", package.parent / "weights" / "tiny-bloom"):
        if folder.is_dir():
            return folder
    raise InputError("this installation has no embedded model; name one with --model")
