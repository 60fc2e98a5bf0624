"""Tune soft prompts: one call for any number of tasks and recipes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slowllm.errors import InputError
from slowllm.options import by_field_name, parse_dtype
from slowllm.runtime.description import ModelInfo
from slowllm.tuning.examples import RawExample as Text
from slowllm.tuning.examples import Task, make_tasks
from slowllm.tuning.recipe import Recipe, make_trials
from slowllm.tuning.session import OnOpen, Phase, Record, RunOptions, Session, Tuned

if TYPE_CHECKING:
    from slowllm.swarm.client import SwarmOptions

# What options of `slowllm tune` are called in `Recipe`.
_OPTIONS = {
    "tokens": "num_tokens", "steps": "num_steps", "epochs": "num_epochs", "lr": "learning_rate", "warmup": "warmup_steps",
}  # fmt: skip


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
    **settings: Any,
) -> list[Tuned]:
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
        settings: fields of `Recipe`, or the options of `slowllm tune` that have other names: ``tokens``, ``steps``,
            ``epochs``, ``lr``, ``warmup``.
    Raises:
        InputError: an example, a setting or a folder cannot be used.
        PlanError: a step does not fit the budget; the message names the smallest that would do.
        TuningError: the only trial has diverged; its last good prompt is in `out`.
        StateError: the state is another run's, or cannot be written.
    """
    chosen = _recipes(recipes, settings)
    info = model if isinstance(model, ModelInfo) else ModelInfo(model)
    keep_resident = resident if keep_resident is None else keep_resident
    options = RunOptions(ram, device, vram, dtype, keep_resident, out, state, on_open, on_record, swarm)
    return tune_tasks(info, _tasks(info, data, validation, labels, chosen), chosen, options)


def phases_of(
    info: ModelInfo,
    data: Any,
    validation: Any,
    *,
    labels: Sequence[str],
    recipes: Sequence[Recipe],
    options: RunOptions,
) -> list[Phase]:
    """Return the phases of a call of `tune` with the same arguments, and do nothing.

    Raises:
        InputError: an example or a setting cannot be used.
    """
    return _session(info, _tasks(info, data, validation, labels, recipes), recipes, options).phases()


def _tasks(
    info: ModelInfo, data: Any, validation: Any, labels: Sequence[str], recipes: Sequence[Recipe]
) -> list[Task]:
    if info.soft_prompt is not None:
        raise InputError("the model has a soft prompt already; tune begins with a new one")
    longest_prompt = max(recipe.num_tokens for recipe in recipes)
    return make_tasks(info, data, validation, labels, longest_prompt)


def tune_tasks(
    info: ModelInfo, tasks: Sequence[Task], recipes: Sequence[Recipe], options: RunOptions
) -> list[Tuned]:
    """Tune a prompt by every recipe on every task, all in the same sweeps; `tune` says what is raised."""
    return _session(info, tasks, recipes, options).run()


def _session(
    info: ModelInfo, tasks: Sequence[Task], recipes: Sequence[Recipe], options: RunOptions
) -> Session:
    parse_dtype(options.dtype)
    num_blocks = int(info.config.get_text_config().num_hidden_layers)
    for recipe in recipes:
        if recipe.top is not None and recipe.top > num_blocks:
            raise InputError(f"top {recipe.top} is more than the model's {num_blocks} blocks")
    if len({recipe.top for recipe in recipes}) > 1:
        raise InputError("all trials of one run must tune as many blocks from the top")
    plans = list(make_trials(tasks, recipes))
    out, state = options.out, options.state
    if out is not None and state is not None and Path(out).resolve() == Path(state).resolve():
        raise InputError(f"{out}: cannot be both the folder of the prompt and that of the state; name two")
    return Session(info, plans, options)


def _recipes(recipes: Recipe | Sequence[Recipe] | None, settings: Mapping[str, Any]) -> list[Recipe]:
    if recipes is not None and settings:
        raise InputError(f"give recipes or settings, not both ({', '.join(settings)})")
    if recipes is None:
        settings = by_field_name(settings, _OPTIONS)
        names = list(Recipe.__dataclass_fields__)
        if wrong := sorted(set(settings) - set(names)):
            raise InputError(f"no such setting: {', '.join(wrong)}; there are {', '.join(names)}")
        return [Recipe(**settings)]
    chosen = [recipes] if isinstance(recipes, Recipe) else list(recipes)
    if not chosen or not all(isinstance(recipe, Recipe) for recipe in chosen):
        raise InputError("recipes must be one slowllm.Recipe or more")
    return chosen
