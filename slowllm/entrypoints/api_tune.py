"""Tune soft prompts from Python: one call for any number of tasks and recipes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slowllm.entrypoints.job_progress import Gauge, ShowProgress, check_show, telling
from slowllm.entrypoints.progress import line_of_steps, steps
from slowllm.inference.results import Results
from slowllm.planning.forecast import num_passages
from slowllm.planning.job import Job
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.tuning.examples import RawExample as Text
from slowllm.tuning.recipe import Recipe
from slowllm.tuning.session import OnOpen, RunOptions
from slowllm.tuning.tune import recipes_of, tasks_of, tune_tasks
from slowllm.tuning.tuned import Record, Tuned

if TYPE_CHECKING:
    from slowllm.swarm.client import SwarmOptions


def tune(
    model: str | os.PathLike[str] | ModelInfo,
    data: str | os.PathLike[str] | Sequence[Text] | Mapping[str, Any],
    validation: str | os.PathLike[str] | Sequence[Text] | Mapping[str, Any] = (),
    *,
    labels: Sequence[str] = (),
    recipes: Recipe | Sequence[Recipe] | None = None,
    ram: str | int = "auto",
    device: str = "cpu",
    vram: str | int | None = None,
    dtype: str = "auto",
    resident: bool = True,
    keep_resident: bool | None = None,
    out: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    on_open: OnOpen | None = None,
    on_record: Callable[[Record], Any] | None = None,
    swarm: str | Sequence[str] | SwarmOptions | None = None,
    progress: ShowProgress = False,
    **settings: Any,
) -> Results[Tuned]:
    """Tune one soft prompt or several, all of them in the same sweeps, and return them.

    Args:
        model: as for `load`.
        data: a file (see `examples.read_rows`), or examples (see `examples.make_task`); or several of these by name,
            each of which is a task.
        validation: as `data`; the prompt that does best on it is kept.
        labels: words of which one follows each example, if the task has labels.
        recipes: one for each trial; by default one, made of `settings`.
        ram: budget for the whole process, such as ``16GiB``; ``auto`` is what the machine and its container allow, less
            a reserve.
        device: where blocks are computed; see `load`. Prompts and their optimizer stay on the processor.
        vram: budget on each GPU; see `load`.
        dtype: compute dtype; see `load`. Prompts are always float32.
        resident: whether stops that fit the budget stay in memory.
        keep_resident: the former name of `resident`.
        out: folder for the prompts, with a folder in it for each trial if there are several.
        state: folder that keeps what is done: after a kill, the same call resumes with the same numbers.
        on_open: called before each phase; see `OnOpen`.
        on_record: called with each step and each validation.
        swarm: that computes the blocks, as for `load`; its servers must serve gradients.
        progress: True shows what a step takes and then where it is, a function is called with `JobProgress` for each
            phase, whose sweeps are its steps; see `LM`.
        settings: fields of `Recipe`, or the options of `slowllm tune` that have other names: ``tokens``, ``steps``,
            ``epochs``, ``lr``, ``warmup``.
    Raises:
        InputError: an example, a setting or a folder cannot be used.
        PlanError: a step does not fit the budget; the message names the smallest that would do.
        TuningError: the only trial has diverged; its last good prompt is in `out`.
        StateError: the state is another run's, or cannot be written.
    """
    check_show(progress)
    chosen = recipes_of(recipes, settings)
    info = model if isinstance(model, ModelInfo) else ModelInfo(model)
    keep_resident = resident if keep_resident is None else keep_resident
    tasks = tasks_of(info, data, validation, labels, chosen)
    num_steps = max(recipe.num_updates(task) for task in tasks for recipe in chosen)
    with contextlib.ExitStack() as stack:
        phase = stack.enter_context(contextlib.ExitStack())

        def opened(lm: StreamedLM, job: Job, what: str, peak_bytes: int) -> None:
            phase.close()
            if on_open is not None:
                on_open(lm, job, what, peak_bytes)
            if progress is True:
                print(line_of_steps(lm, job, what, peak_bytes), file=sys.stderr)
                phase.enter_context(steps(lm, job, what))
            elif progress is not False:
                stops_a_step = lm.plan.forecast.num_sweeps * num_passages(lm.sizes, job)
                gauge = Gauge(lm, num_steps if job.turns else 1, stops_a_step)
                phase.enter_context(telling(lm, gauge, progress))

        options = RunOptions(
            ram, device, vram, dtype, keep_resident, out, state, opened, on_record, swarm
        )  # fmt: skip
        return Results(tune_tasks(info, tasks, chosen, options))
