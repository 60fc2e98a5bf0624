"""What all verbs have in common: where their options come from, how they write on stderr, and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from slowllm.entrypoints.cli.defaults import (
    META,
    PRESET,
    USER_FILE,
    Given,
    given_of,
    in_user_file,
    name_variables,
    values_for,
    word_of,
    words_of,
)
from slowllm.entrypoints.cli.interrupts import second_interrupt_ends_at_once
from slowllm.entrypoints.cli.log_format import Stderr, choose_early, logging_options
from slowllm.entrypoints.settings.presets import check_preset, preset_names, read_preset
from slowllm.errors import CheckpointError, InputError
from slowllm.runtime.model_folder import find_folder

# An answer is stopped by Ctrl-C, and the next one by the next.
_OWN_INTERRUPTS = {"chat"}
# Of no use without another option. In a file or in the environment they wait until that is given.
_NEED_SWARM = (
    "allowed_peers",
    "blocked_peers",
    "timeout",
    "step_timeout",
    "replay",
    "token_file",
    "identity",
    "weights",
    "spot_check",
)


def example(command: str) -> str:
    """Return the end of a verb's help: how it is called."""
    return f"Example: {command}"


class Verb(TyperCommand):
    """A verb of the command line. Its options may also come from the environment, a preset or the user's file."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if any(option.name == "ram" for option in self.params):
            self.params += _copies(_preset)
        self.params += _copies(logging_options)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments; what they leave open is taken from the environment and from files.

        Raises:
            InputError: a file or a variable says what the verb cannot use.
        """
        words = (*(() if parent is None else words_of(parent)), str(info_name))
        name_variables(self, words)
        given = Given()
        if parent is not None:
            choose_early(parent.obj, args)
            parent.meta[META] = given
            if not extra.get("resilient_parsing"):  # for the completion of a shell, which shows no errors
                source, values = in_user_file(parent.find_root().command, words)
                given.lay(USER_FILE, source, values)
        try:
            context = super().make_context(info_name, args, parent, default_map=given.values, **extra)
        except typer.BadParameter as error:
            raise _named(error, given) or error from error
        return context

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        given = given_of(ctx)
        _leave_out(ctx)
        if ctx.params.get("verbose") and isinstance(ctx.obj, Stderr) and ctx.obj.is_quiet:
            raise InputError("--quiet and --verbose contradict each other; give one of them")
        if given.preset is not None and ctx.params.get("model"):
            with contextlib.suppress(CheckpointError):  # the verb says it, or plans without the weights
                check_preset(given.preset, find_folder(ctx.params["model"]))
        with contextlib.ExitStack() as stack:
            if self.name not in _OWN_INTERRUPTS:
                stack.enter_context(second_interrupt_ends_at_once())
            return super().invoke(ctx)


def _named(error: typer.BadParameter, given: Given) -> InputError | None:
    """Return what is wrong with a value that was not given on the command line, with the place that it comes from."""
    option, context = error.param, error.ctx
    if option is None or context is None:
        return None
    source = context.get_parameter_source(str(option.name))
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return None
    if source.name == "ENVIRONMENT":
        return InputError(f"{variable_of(option)}: {error.message}")
    word = word_of(option) if isinstance(option, TyperOption) else str(option.name)
    return InputError(f"{given.sources.get(str(option.name), 'defaults')}: {word}: {error.message}")


def variable_of(option: Any) -> str:
    """Return the variable of the environment that an option was read from."""
    return next((name for name in option.envvar or () if os.environ.get(name)), "the environment")


def _leave_out(context: Any) -> None:
    """Leave out what is of no use without another option, unless the command line has it."""
    params = context.params
    idle = [] if params.get("swarm") or "swarm" not in params else list(_NEED_SWARM)
    if str(params.get("device", "")) == "cpu":
        idle.append("vram")
    for name in idle:
        source = context.get_parameter_source(name)
        if name in params and source is not None and source.name in ("ENVIRONMENT", "DEFAULT_MAP"):
            params[name] = None


def use_preset(context: Any, name: str) -> None:
    """Let a preset say what the command line and the environment leave open.

    Raises:
        InputError: there is no such preset, or it is damaged.
    """
    preset = read_preset(name)
    values = values_for(preset.source, preset.options, context.find_root().command, list(words_of(context)))
    if preset.model and any(parameter.name == "model" for parameter in context.command.params):
        values["model"] = preset.model
    given = given_of(context)
    given.lay(PRESET, preset.source, values)
    given.preset = preset


def _choose_preset(context: typer.Context, name: str | None) -> None:
    if name is not None and not context.resilient_parsing:
        use_preset(context, name)


def _complete_preset(incomplete: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(incomplete)]


PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Options for a known model and machine, by a name that `slowllm config presets` lists, or from a YAML file; the "
        "command line's and the environment's win.",
        metavar="NAME", is_eager=True, expose_value=False, callback=_choose_preset, autocompletion=_complete_preset,
    ),
]  # fmt: skip


def _preset(preset: PresetOption = None) -> None:
    """Have the option of a preset."""


# Every start of the program makes all verbs: what they share is made once, and copied.
@functools.cache
def _options_of(function: Callable[..., None]) -> tuple[Any, ...]:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    return tuple(typer.main.get_command(app).params)


def _copies(function: Callable[..., None]) -> list[Any]:
    """Return the options that a function has, for another verb."""
    return [copy.copy(option) for option in _options_of(function)]


def add_verb(app: typer.Typer, verb: Callable[..., Any], command: str, **settings: Any) -> None:
    """Make a function a verb of the command line.

    Args:
        app: that gets the verb.
        verb: the function, whose parameters are the options.
        command: an example of its use.
        settings: as for typer's ``command``.
    """
    app.command(cls=Verb, epilog=example(command), **settings)(verb)
