"""Make a session of tuning from examples, recipes and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slowllm.errors import InputError
from slowllm.options import by_field_name, parse_dtype
from slowllm.runtime.description import ModelInfo
from slowllm.tuning.examples import Task, make_tasks
from slowllm.tuning.recipe import Recipe, make_trials
from slowllm.tuning.session import Phase, RunOptions, Session
from slowllm.tuning.tuned import Tuned

# What options of `slowllm tune` are called in `Recipe`.
_OPTIONS = {
    "tokens": "num_tokens", "steps": "num_steps", "epochs": "num_epochs", "lr": "learning_rate", "warmup": "warmup_steps",
}  # fmt: skip


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
    return _session(info, tasks_of(info, data, validation, labels, recipes), recipes, options).phases()


def tasks_of(
    info: ModelInfo, data: Any, validation: Any, labels: Sequence[str], recipes: Sequence[Recipe]
) -> list[Task]:
    """Return the tasks of examples; `slowllm.tune` says what these may be.

    Raises:
        InputError: an example cannot be used, or the model has a soft prompt.
    """
    if info.soft_prompt is not None:
        raise InputError("the model has a soft prompt already; tune begins with a new one")
    longest_prompt = max(recipe.num_tokens for recipe in recipes)
    return make_tasks(info, data, validation, labels, longest_prompt)


def tune_tasks(
    info: ModelInfo, tasks: Sequence[Task], recipes: Sequence[Recipe], options: RunOptions
) -> list[Tuned]:
    """Tune a prompt by every recipe on every task, all in the same sweeps; `slowllm.tune` says what is raised."""
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


def recipes_of(recipes: Recipe | Sequence[Recipe] | None, settings: Mapping[str, Any]) -> list[Recipe]:
    """Return recipes, or the one that settings make.

    Raises:
        InputError: both are given, or a setting is unknown or out of its range.
    """
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
