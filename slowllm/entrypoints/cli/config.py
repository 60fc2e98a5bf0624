"""`slowllm config`: show which value every option has, and where it comes from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from slowllm.entrypoints.cli.defaults import (
    META,
    USER_FILE,
    Given,
    in_user_file,
    name_variables,
    options_of,
    unknown_variables,
    verbs_of,
)
from slowllm.entrypoints.cli.verb import use_preset, variable_of
from slowllm.entrypoints.settings.presets import preset_names, read_preset
from slowllm.entrypoints.settings.user_file import user_file
from slowllm.entrypoints.settings.yaml_files import nearest
from slowllm.errors import InputError

PRESETS = "presets"
DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """The value of one option of a verb.

    Attributes:
        verb: by its words.
        option: its long name.
        value: None where the verb decides.
        source: where it comes from.
    """

    verb: str
    option: str
    value: Any
    source: str


def config(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="A verb, such as forward or `eval boolq`, and any of its options; or `presets`; or nothing, for what is set "
            "for any verb.",
            metavar="[VERB [OPTIONS]... | presets]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:  # fmt: skip
    """Show the value of every option, and where it comes from.

    An option gets its value from the command line; else from the environment, as SLOWLLM_FORWARD_RAM for one verb or SLOWLLM_RAM
    for all that have it; else from --preset; else from the user's file, ~/.config/slowllm/config.yaml; else it has its default.
    Keys of the file are options without their dashes, or verbs with their own options below them:

    ram: 12GiB, or forward: {max_tokens: 512}

    With a verb, all of its options are shown; without one, those of any verb that are not left at their defaults.
    `slowllm config presets` lists the presets.
    """
    words = list(words or ())
    if words == [PRESETS]:
        _print_presets(as_json)
        return
    root = context.find_root().command
    verbs = dict(verbs_of(root))
    for name in sorted(unknown_variables(root, os.environ)):
        print(f"slowllm: {name}", file=sys.stderr)
    settings: list[Setting] = []
    if words:
        verb = _verb_of(words, list(verbs))
        settings = _settings(context, verb, verbs[verb], words[len(verb) :])
    else:
        for verb, command in verbs.items():
            settings += [one for one in _settings(context, verb, command, ()) if one.source != DEFAULT]
    path = user_file()
    if as_json:
        rows = [
            {"verb": one.verb, "option": one.option, "value": one.value, "source": one.source} for one in settings
        ]  # fmt: skip
        document = {"user_file": str(path), "user_file_is_there": path.is_file(), "settings": rows}
        print(json.dumps(document, default=str))
        return
    there = "" if path.is_file() else ", which is not there"
    print(f"user's file: {path}{there}")
    if not settings:
        print("every option of every verb has its default; `slowllm config VERB` lists those of a verb")
        return
    lines = [("verb", "option", "value", "from")]
    lines += [(one.verb, one.option, _shown(one.value), one.source) for one in settings]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for *cells, where in lines:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), where]))


def _verb_of(words: Sequence[str], verbs: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the words of a command line that call a verb."""
    for verb in sorted(verbs, key=len, reverse=True):
        if tuple(words[: len(verb)]) == verb:
            return verb
    known = [" ".join(verb) for verb in verbs] + [PRESETS]
    raise InputError(f"{words[0]!r} is no verb; the nearest is {nearest(' '.join(words[:2]), known)}")


def _settings(context: Any, verb: tuple[str, ...], command: Any, arguments: Sequence[str]) -> list[Setting]:
    """Return the values of a verb's options with these arguments, as the verb would see them.

    Raises:
        InputError: a file or a variable says what the verb cannot use.
    """
    parent = context.find_root()
    for name in verb[:-1]:
        parent = parent.command.commands[name].context_class(
            parent.command.commands[name], info_name=name, parent=parent
        )
    name_variables(command, verb)
    given = Given()
    source, values = in_user_file(context.find_root().command, verb)
    given.lay(USER_FILE, source, values)
    inner = command.context_class(
        command, info_name=verb[-1], parent=parent, default_map=given.values,
        allow_extra_args=True, ignore_unknown_options=False,
    )  # fmt: skip
    inner.meta[META] = given
    found, _, _ = command.make_parser(inner).parse_args(list(arguments))
    options = options_of(command)
    if (option := options.get("preset")) is not None:
        preset, _ = option.consume_value(inner, found)
        if preset is not None:
            use_preset(inner, str(preset))
    settings = []
    for word, option in options.items():
        value, taken_from = option.consume_value(inner, found)
        if not (isinstance(value, bool) or value is None):
            value = option.get_runtime_param().coerce(value, param=option, ctx=inner)
        names = {
            "COMMANDLINE": "command line", "ENVIRONMENT": f"environment: {variable_of(option)}",
            "DEFAULT_MAP": given.sources.get(str(option.name), "defaults"),
        }  # fmt: skip
        settings.append(
            Setting(" ".join(verb), word.replace("_", "-"), value, names.get(taken_from.name, DEFAULT))
        )
    return settings


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _print_presets(as_json: bool) -> None:
    presets = [read_preset(name) for name in preset_names()]
    if as_json:
        rows = [
            {"name": one.name, "about": one.about, "model": one.model, "config": dict(one.config), "options": dict(one.options)}
            for one in presets
        ]  # fmt: skip
        print(json.dumps({"presets": rows}))
        return
    for one in presets:
        print(f"{one.name}: {one.about}")
        chosen = ", ".join(f"{name} {_shown(value)}" for name, value in _flat(one.options))
        print(f"    model {one.model}, {chosen}")


def _flat(options: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of a preset, those of one verb with its name before them."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield f"{before}{name}", value
