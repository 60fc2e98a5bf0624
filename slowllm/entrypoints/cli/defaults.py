"""What an option gets where the command line does not say it, and from where.

The order is: command line, environment, what is given in a file (`--recipe`, `--config` of serve), `--preset`, the user's file,
default. The environment is click's (`envvar`): ``SLOWLLM_FORWARD_RAM`` for one verb, ``SLOWLLM_RAM`` for all that have the option.
All that comes from files is laid into click's ``default_map``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typer.core import TyperGroup, TyperOption

from slowllm.entrypoints.settings.presets import Preset
from slowllm.entrypoints.settings.user_file import user_file
from slowllm.entrypoints.settings.yaml_files import nearest, read_yaml
from slowllm.errors import InputError

PREFIX = "SLOWLLM"
# Later ones replace what earlier ones say.
USER_FILE, PRESET, GIVEN_FILE = range(3)
META = "slowllm.given"
# Of the command line itself, and of single calls.
_NEVER = frozenset({"help", "version", "install_completion", "show_completion"})


@dataclass
class Given:
    """What files say of one verb's options. It changes while the options that name files are read.

    Attributes:
        values: by the parameters' names; this is the context's ``default_map``.
        sources: from which file each value comes.
        ranks: of these files.
        preset: that was chosen.
    """

    values: MutableMapping[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    preset: Preset | None = None

    def lay(self, rank: int, source: str, values: Mapping[str, Any]) -> None:
        """Lay what a file says over what those of lower rank say.

        Args:
            rank: of the file.
            source: what a message calls it.
            values: by the parameters' names.
        """
        for name, value in values.items():
            if rank >= self.ranks.get(name, rank):
                self.values[name], self.sources[name], self.ranks[name] = value, source, rank


def given_of(context: Any) -> Given:
    """Return what files say of the options of the verb whose context this is."""
    given: Given = context.meta.setdefault(META, Given())
    if context.default_map is not given.values:
        given.values.update(context.default_map or {})
        context.default_map = given.values
    return given


def word_of(option: TyperOption) -> str:
    """Return what an option is called in files and in the environment: its long name, with underscores."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


def options_of(command: Any) -> dict[str, TyperOption]:
    """Return a verb's options by their words."""
    return {
        word_of(option): option
        for option in command.params
        if isinstance(option, TyperOption) and word_of(option) not in _NEVER
    }


def verbs_of(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the verbs below a command with the words that call them."""
    if not isinstance(command, TyperGroup):
        yield words, command
        return
    for name, inner in command.commands.items():
        yield from verbs_of(inner, (*words, name))


def words_of(context: Any) -> tuple[str, ...]:
    """Return the words that call the verb whose context this is, without the program's name."""
    words: list[str] = []
    while context.parent is not None:
        words.insert(0, context.info_name)
        context = context.parent
    return tuple(words)


def name_variables(command: Any, words: Sequence[str]) -> None:
    """Let click read each option of a verb from the environment."""
    for word, option in options_of(command).items():
        option.envvar = [f"{PREFIX}_{'_'.join((*words, word))}".upper(), f"{PREFIX}_{word}".upper()]
        option.show_envvar = False  # the rule is the same for all, and would double the length of every help


def in_user_file(root: Any, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the name of the user's file, and what it says of a verb's options; nothing where there is no file.

    Raises:
        InputError: it cannot be read, or says what no verb has.
    """
    path = user_file()
    return str(path), values_for(str(path), read_yaml(path), root, words) if path.is_file() else {}


def values_for(source: str, table: Mapping[str, Any], root: Any, words: Sequence[str]) -> dict[str, Any]:
    """Return what a table of options says of one verb, by the parameters' names.

    Options stand in the table by their names, for all verbs that have them; in a section with a verb's name, for that verb
    only. The whole table is looked at, so that a slip is noticed by whatever verb reads it first.

    Args:
        source: of the table, for messages.
        table: of options.
        root: the command that has all verbs.
        words: that call the verb.
    Raises:
        InputError: a key is no option and no verb, or a value is of another kind than the option takes.
    """
    return _values_for(source, table, root, list(words), ())


def _values_for(
    source: str, table: Mapping[str, Any], command: Any, words: list[str] | None, within: tuple[str, ...]
) -> dict[str, Any]:
    """Return the values for the verb that `words` call below a command; with None only look at the table."""
    known: dict[str, list[TyperOption]] = {}
    for _, verb in verbs_of(command):
        for word, option in options_of(verb).items():
            known.setdefault(word, []).append(option)
    inner = dict(command.commands) if isinstance(command, TyperGroup) else {}
    target = command
    for word in words or ():
        target = target.commands[word]
    own = {} if words is None else options_of(target)
    values: dict[str, Any] = {}
    sections: list[tuple[str, Mapping[str, Any]]] = []
    for key, value in table.items():
        place, word = ".".join((*within, key)), key.replace("-", "_")
        if key in inner and (isinstance(value, Mapping) or word not in known):
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{source}: {place} is a verb, and takes a mapping of its options, not {value!r}"
                )
            sections.append((key, value))
        elif word not in known:
            of = f" of {' '.join(within)}" if within else ""
            raise InputError(
                f"{source}: {place!r} is no option{of}; the nearest is {nearest(word, {*known, *inner})}"
            )
        else:
            if word != key and word in table:
                raise InputError(f"{source}: {place} and {word} are the same option; keep one of them")
            for option in [own[word]] if word in own else known[word][:1]:
                _check_value(source, place, value, option)
            if word in own:
                is_list = own[word].multiple and not isinstance(value, list)
                values[str(own[word].name)] = [value] if is_list else value
    for key, section in sections:
        is_ours = bool(words) and words is not None and words[0] == key
        # A section is nearer to the verb than what stands beside it.
        found = _values_for(
            source, section, inner[key], words[1:] if is_ours and words else None, (*within, key)
        )
        values |= found if is_ours else {}
    return values


def _check_value(source: str, place: str, value: Any, option: TyperOption) -> None:
    """Refuse a value of another kind than an option takes; its range is checked as on the command line."""
    if isinstance(value, list):
        if option.multiple and all(isinstance(one, str | int | float) for one in value):
            return
        takes = "a list of plain values" if option.multiple else "one value"
    elif option.is_flag:
        if isinstance(value, bool):
            return
        takes = "true or false"
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        return
    else:
        takes = "a plain value"
    raise InputError(f"{source}: {place} takes {takes}, not {value!r}")


def unknown_variables(root: Any, environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable of the environment that looks like an option's and is none.

    Args:
        root: the command that has all verbs.
        environment: the variables. Those that look like no option's are somebody else's.
    """
    known = {
        f"{PREFIX}_{'_'.join((*before, word))}".upper()
        for words, verb in verbs_of(root)
        for word in options_of(verb)
        for before in ((), words)
    }
    sentences = []
    for name in sorted(environment):
        if name.startswith(f"{PREFIX}_") and name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
            sentences += [f"{name} is no option's variable, and is not used; {close[0]} is"] if close else []
    return sentences
