"""Open a verb's model as its options say, show the progress, and say at the end what the run cost."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slowllm.entrypoints.cli.options import check_output
from slowllm.entrypoints.cli.output import STDOUT
from slowllm.entrypoints.cli.swarm_options import SwarmChoice
from slowllm.entrypoints.cost import cost_of
from slowllm.entrypoints.report.destination import check_report
from slowllm.entrypoints.report.recorder import RunReport
from slowllm.errors import CheckpointError, InputError, OtherJobError, PlanError
from slowllm.files import part_of, state_of
from slowllm.options import AUTO, parse_bytes, parse_devices, parse_dtype
from slowllm.runtime.known_models import find_folder_or_known
from slowllm.runtime.model_folder import DEFAULT, EMBEDDED, find_folder
from slowllm.storage.gguf_files import gguf_files
from slowllm.swarm.addresses import refuse_dead

if TYPE_CHECKING:
    from slowllm.entrypoints.progress import CountResult
    from slowllm.inference.text import Query
    from slowllm.modeling.parts import Part
    from slowllm.planning.budget import Budget
    from slowllm.planning.job import Job, Rates
    from slowllm.runtime.blueprint import Blueprint
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM
    from slowllm.swarm.client import SwarmOptions


class Runner:
    """One call of a verb: which model it opens, where, and in how much memory.

    Args:
        model: folder, hub id or embedded model; the embedded tiny-bloom by default.
        ram: memory budget for the whole process.
        device: where the blocks are computed.
        vram: memory budget on each GPU.
        dtype: compute dtype.
        prompt: folder of a soft prompt.
        resident: whether blocks that fit the budget stay in memory.
        state: folder in which a job keeps its finished work; by default a job with an output file has one beside it,
            as long as the file is not complete.
        kind: of that job.
        overwrite: whether to begin anew beside the lines of another job.
        exact: of experts that are read on demand, whether each micro-batch has the bits that it has alone.
        swarm: that computes the blocks; without peers, they are computed here.
        dry_run: whether the verb only prints the plan of its job, for which the weights need not be there.
    Raises:
        InputError: an option cannot be read, or does not go with another.
        CheckpointError: there is no such model.
    Attributes:
        part: of the model that is opened; None, as it is at first, for the whole.
    """

    def __init__(
        self, model: str | None, ram: str, device: str, vram: str | None, dtype: str, *,
        prompt: str | None = None, resident: bool = True, state: Path | None = None, kind: str = "",
        overwrite: bool = False, dry_run: bool = False, exact: bool = True, swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    ) -> None:  # fmt: skip
        if ram != AUTO:
            parse_bytes(ram)
        if vram is not None:
            parse_bytes(vram)
        if parse_devices(device) == ("cpu",) and vram is not None:
            raise InputError("--vram is for a GPU; name one with --device cuda, or leave it out")
        parse_dtype(dtype)
        self.ram, self.device, self.vram, self.resident = ram, device, vram, resident
        self.dry_run, self.exact, self._swarm = dry_run, exact, swarm
        self.part: Part | None = None
        if swarm.peers and dry_run:
            raise InputError(
                "--dry-run plans what this machine does, and with --swarm others do it; leave one of them out"
            )
        self._model, self._prompt, self._state = DEFAULT if model is None else model, prompt, state
        self._dtype, self._kind = dtype, kind
        self._out: Path | None = None
        self._report: Path | None = None
        self._overwrites, self._is_new = overwrite, False
        if dry_run:
            find_folder_or_known(self._model)
        else:
            folder = find_folder(self._model)
            if not (folder / "config.json").is_file() and not gguf_files(folder):
                raise CheckpointError(
                    f"{folder}: has no config.json, so it is not a Hugging Face model folder"
                )
        if prompt and not Path(prompt).expanduser().is_dir():
            raise InputError(f"{prompt}: no such folder; --prompt takes the folder of a soft prompt")

    def load_libraries(self) -> None:
        """Load torch and transformers, which takes seconds, and say so on a terminal.

        To be called when everything that can be checked without them is checked.

        Raises:
            NetworkError: nobody listens at any peer of the swarm.
        """
        refuse_dead(self._swarm.peers)
        if sys.stderr.isatty():
            print(f"loading {self._model.removeprefix(EMBEDDED)}", file=sys.stderr)
        import transformers

        transformers.logging.set_verbosity_error()

    @functools.cached_property
    def begun(self) -> Mapping[str, Any] | None:
        """What the state folder says about its job, None where no process began one.

        Raises:
            StateError: the folder belongs to a job of another kind, or is damaged.
        """
        if self._state is None or self._is_new:
            return None
        from slowllm.runtime.state import read_job

        return read_job(self._state, self._kind)

    @property
    def dtype(self) -> str:
        """The compute dtype: a begun job's instead of ``auto``, which might come out otherwise when measured again."""
        return (
            str(self.begun.get("dtype")) if self.begun is not None and self._dtype == "auto" else self._dtype
        )

    def check_output(self, out: Path | None, *files: str | Path | None) -> Path | None:
        """Return the file to write; see `options.check_output`. No file of the model, prompt or state is one.

        Without `state`, the job's state is from now on the one beside the file.

        Raises:
            InputError: it cannot be written, or writing it would destroy something, such as lines of another job.
        """
        out = check_output(out, *files)
        _refuse_file_of(self._prompt, out)
        if (
            self._state is not None
            and out is not None
            and out != STDOUT
            and self._state.expanduser().resolve() in out.parents
        ):
            raise InputError(f"{out}: lies in the folder of --state; name another file")
        self._out = None if out == STDOUT else out
        if self._out is not None and self._kind:
            self._find_unfinished(self._out)
        return out

    def check_report(
        self, report: Path | None, *files: str | Path | None, out: str | Path | None = None
    ) -> Path | None:
        """Return the file of the report; see `report.destination`. To be called after `check_output`.

        Raises:
            InputError: it cannot be written, or writing it would destroy something.
        """
        report = check_report(report, out or self._out, *files, dry_run=self.dry_run)
        _refuse_file_of(self._prompt, report)
        self._report = report
        return report

    def _find_unfinished(self, out: Path) -> None:
        """Find out whether the partial file is this job's, another's, or there is none."""
        partial, folder = part_of(out), state_of(out)
        work = (partial, folder / "results.jsonl")
        has_work = partial.exists() and any(file.exists() and file.stat().st_size for file in work)
        if self._state is not None:
            if has_work and self.begun is None and not self._overwrites:
                raise self._other_job(f"{self._state} has none of them")
            return
        self._state = folder
        # Without a partial file the folder is what was left of a job that is done.
        self._is_new = self._overwrites or not has_work
        if self._is_new:
            return
        try:
            is_known = self.begun is not None
        except OtherJobError as error:
            raise self._other_job(error.difference) from error
        if not is_known:
            raise self._other_job("which one is not known")

    def _other_job(self, difference: str) -> InputError:
        assert self._out is not None
        return InputError(
            f"{part_of(self._out)}: has lines of another job that was not finished ({difference}); run that job's "
            "command to go on with it, name another --out, or begin anew with --overwrite"
        )

    @contextlib.contextmanager
    def resuming(
        self, describe: Callable[[], Mapping[str, Any]], save_seconds: float | None = None, inputs: Any = None
    ) -> Iterator[State | None]:
        """Open the state of the job, None where there is none; say after an interrupt how to go on.

        The state beside an output file keeps finished micro-batches only, and is deleted when the file is complete.

        Args:
            describe: returns the job's `run_identity`; called only if there is a state.
            save_seconds: as for `State`.
            inputs: as for `State`.
        Raises:
            InputError: the partial file has lines of another job.
            StateError: see `State`.
        """
        from slowllm.runtime.state import SAVE_SECONDS, State

        if self._state is None:
            try:
                yield None
            except KeyboardInterrupt:
                print(
                    "slowllm: interrupted; nothing was kept, as it would be with --out FILE or --state DIR",
                    file=sys.stderr,
                )
                raise
            return
        is_beside = self._out is not None and self._state == state_of(self._out)
        seconds = math.inf if is_beside else SAVE_SECONDS if save_seconds is None else save_seconds
        try:
            state = State(self._state, describe(), seconds, inputs=inputs, is_new=self._is_new)
        except OtherJobError as error:
            if not is_beside:
                raise
            raise self._other_job(error.difference) from error
        with state:
            try:
                yield state
            except KeyboardInterrupt:
                if self._out is None:
                    print("slowllm: interrupted; the same command goes on from there", file=sys.stderr)
                raise
            if is_beside:
                state.delete()

    def refuse_begun(self) -> None:
        """Refuse to write a file for which no model is asked, where lines of a job that asks one would be lost.

        Raises:
            InputError: there are such lines.
        """
        if self.begun is not None and self._out is not None:
            raise self._other_job("it has lines that can be scored or continued")

    def inputs(self) -> Any:
        """Return the inputs with which the job was begun, from its state; None where there are none."""
        from slowllm.runtime.state import read_inputs

        return None if self.begun is None or self._state is None else read_inputs(self._state)

    @functools.cached_property
    def info(self) -> ModelInfo:
        """What the checkpoint and its soft prompt say about themselves; no weight is read."""
        from slowllm.runtime.description import ModelInfo

        info = ModelInfo(self._model, self._prompt)
        for file in (self._out, self._report):
            _refuse_file_of(info.folder, file)
        return info

    @functools.cached_property
    def rates(self) -> Rates:
        """The rates of this machine, measured on the model's own files."""
        from slowllm.planning.job import Rates
        from slowllm.runtime.rates import quick_rates

        if self._blueprint is not None:
            return Rates()
        return quick_rates(self.info.folder, parse_dtype(self.dtype))

    @functools.cached_property
    def _blueprint(self) -> Blueprint | None:
        """What a dry run plans by where the weights are not there."""
        if not self.dry_run:
            return None
        from slowllm.runtime.blueprint import find_blueprint

        return find_blueprint(self._model, None)

    def print_plan(self, *jobs: Job, as_json: bool = False, reserved_bytes: int = 0) -> None:
        """Print the plan of a job instead of doing it.

        Args:
            jobs: the first of them that fits the budget is planned.
            as_json: as JSON instead of a table.
            reserved_bytes: of the budget, what the job holds beside the model.
        Raises:
            PlanError: none of them fits.
        """
        from slowllm.entrypoints.cli.survey_output import print_survey
        from slowllm.runtime.memory import budget_bytes
        from slowllm.runtime.survey import survey, survey_blueprint

        ram = budget_bytes(self.ram)
        for job in jobs:
            try:
                if self._blueprint is not None:
                    found = survey_blueprint(
                        self._blueprint, ram=ram, dtype=self.dtype, job=job, keep_resident=self.resident,
                        reserved_bytes=reserved_bytes,
                    )  # fmt: skip
                else:
                    found = survey(
                        self.info, ram=ram, device=self.device, vram=self.vram, dtype=self.dtype, job=job,
                        keep_resident=self.resident, reserved_bytes=reserved_bytes, part=self.part,
                    )  # fmt: skip
            except PlanError:
                if job is jobs[-1]:
                    raise
                continue
            print_survey(found, as_json=as_json)
            return

    def print_plan_of_queries(self, queries: Sequence[Query], *, as_json: bool = False) -> None:
        """Print the plan of answering queries instead of answering them."""
        from slowllm.inference import scoring

        self.print_plan(scoring.job_of_queries(queries, self.info, self.rates, self.begun), as_json=as_json)

    def swarm_options(self) -> SwarmOptions | None:
        """Return how the swarm is used that was chosen; None where the blocks are computed here."""
        return self._swarm.to_options()

    def open(self, job: Job, budget: Budget | None = None) -> StreamedLM:
        """Open the model for a job; the caller closes it.

        Args:
            job: what the plan must know.
            budget: memory that it shares with another model, instead of `ram`.
        """
        from slowllm.runtime.load import open_model
        from slowllm.runtime.streamed_lm import StreamedLM

        options: dict[str, Any] = {
            "ram": budget or self.ram, "device": self.device, "vram": self.vram, "dtype": self.dtype,
            "keep_resident": self.resident, "job": job, "rates": self.rates, "exact": self.exact,
        }  # fmt: skip
        if (swarm := self.swarm_options()) is not None:
            from slowllm.swarm.client import open_client

            return open_client(StreamedLM, self.info, swarm, **options)
        return open_model(StreamedLM, self.info, part=self.part, **options)

    @contextlib.contextmanager
    def open_for_queries(
        self,
        queries: Sequence[Query],
        settings: Callable[[], Mapping[str, Any]],
        noun: str,
        total: int,
        report: RunReport = RunReport(None),  # noqa: B008 (without a file it keeps nothing)
    ) -> Iterator[tuple[StreamedLM, State | None, CountResult]]:
        """Open the model to answer queries, and the job's state; show the progress, and say what the answers cost.

        Args:
            queries: all of them.
            settings: returns what else the results depend on, by name, for the state.
            noun: what a result is, in the singular.
            total: number of results.
            report: that follows the run.
        """
        from slowllm.entrypoints.progress import progress
        from slowllm.inference import scoring

        job = scoring.job_of_queries(queries, self.info, self.rates, self.begun)
        with self.open(job) as lm:

            def describe() -> dict[str, Any]:
                return scoring.describe(self._kind, lm, queries, self.begun, **settings())

            started = time.perf_counter()
            with (
                self.resuming(describe) as state,
                report.watching(lm, job, state),
                progress(lm, job, state, noun=noun, total=total) as count,
            ):
                yield lm, state, count
            print(f"{cost_of(lm)} in {time.perf_counter() - started:.2f} s", file=sys.stderr)


def _refuse_file_of(folder: str | Path | None, out: Path | None) -> None:
    """Refuse to replace a file of a folder; results of an earlier run, JSON lines, may lie there."""
    if folder is None or out is None or out == STDOUT:
        return
    inside = Path(folder).expanduser().resolve() in out.parents
    if inside and out.exists() and out.suffix != ".jsonl":
        raise InputError(f"{out}: is a file of {folder}; name another file")
