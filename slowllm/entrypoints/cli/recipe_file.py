"""`--recipe` of `slowllm tune`: the fields of a recipe from a YAML file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from slowllm.entrypoints.cli.defaults import GIVEN_FILE, given_of, values_for, words_of
from slowllm.entrypoints.settings.yaml_files import nearest, read_yaml
from slowllm.errors import InputError

# What options of `slowllm tune` are called in `Recipe`.
_OPTIONS = {
    "num_tokens": "tokens", "num_steps": "steps", "num_epochs": "epochs", "learning_rate": "lr", "warmup_steps": "warmup",
}  # fmt: skip


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the fields of a recipe that a file has, by the names of the verb's options.

    Args:
        path: a YAML file of fields of `Recipe`; ``learning_rate`` may be a list, for several trials.
    Raises:
        InputError: it cannot be read, or has a key that is no field.
    """
    from slowllm.tuning.recipe import Recipe

    known = [one.name for one in fields(Recipe)]
    table = read_yaml(path)
    for name in table:
        if name not in known:
            raise InputError(
                f"{path}: {name!r} is no field of a recipe; the nearest is {nearest(name, known)}"
            )
    # What stands at its default in Python stands there as null.
    return {_OPTIONS.get(name, name): value for name, value in table.items() if value is not None}


def _choose_recipe(context: typer.Context, path: Path | None) -> Path | None:
    if path is None or context.resilient_parsing:
        return path
    table = read_recipe(path.expanduser())
    values = values_for(str(path), table, context.find_root().command, list(words_of(context)))
    given = given_of(context)
    if {"steps", "epochs"} & set(table):
        # Whatever another file says of the length, the recipe's counts.
        for name in ("steps", "epochs"):
            given.values.pop(name, None)
    given.lay(GIVEN_FILE, str(path), values)
    return path


RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="YAML file of the fields of slowllm.Recipe, such as kind, num_tokens, learning_rate and num_steps; the command "
        "line's options win.",
        metavar="FILE", is_eager=True, callback=_choose_recipe, show_default=False,
    ),
]  # fmt: skip
