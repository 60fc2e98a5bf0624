"""Prompt templates in promptsource's format, rendered in jinja2's sandbox."""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slowllm.errors import InputError, first_line
from slowllm.files import read_description
from slowllm.inference.bounded_calls import BoundedCalls

log = logging.getLogger(__name__)

# Stands for ||| while a template renders, so that one in an example's own text splits nothing.
_SEPARATOR = "\ue0a5\ue0c3\ue0a5"


@dataclass(frozen=True)
class Template:
    """One prompt template, as promptsource has it.

    Attributes:
        name: unique in its file.
        jinja: what makes prompt and target of an example, ``|||`` between them.
        answer_choices: what makes the choices, ``|||`` between them; None where answers are open.
    """

    name: str
    jinja: str
    answer_choices: str | None


@dataclass(frozen=True)
class Question:
    """One example through one template.

    Attributes:
        template: its name.
        example: number in the data, from 1.
        prompt: before the answer.
        choices: possible answers.
        gold: index of the right one.
    """

    template: str
    example: int
    prompt: str
    choices: tuple[str, ...]
    gold: int

    @property
    def continuations(self) -> tuple[str, ...]:
        """The choices as they follow the prompt: after a blank, unless the prompt is empty."""
        return tuple(f" {choice}" if self.prompt else choice for choice in self.choices)


def read_templates(path: Path) -> list[Template]:
    """Return the templates of a file in promptsource's format.

    Raises:
        InputError: it cannot be read, or is in another format.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise missing_package("PyYAML", error) from error

    class Loader(yaml.SafeLoader):
        """Plain data, and promptsource's two tags as mappings."""

    def mapping(loader: yaml.SafeLoader, node: Any) -> dict[Any, Any]:
        return loader.construct_mapping(node, deep=True)

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, mapping)
    try:
        document = yaml.load(read_description(path, InputError).decode("utf-8"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: is no templates file of promptsource ({reason[:200]})") from error
    found = document.get("templates") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: has no templates; promptsource's files have a mapping of that name")
    return _checked(str(path), found.values())


def _checked(source: str, found: Iterable[Any]) -> list[Template]:
    templates = []
    for entry in found:
        fields = entry if isinstance(entry, dict) else {}
        name, jinja, choices = fields.get("name"), fields.get("jinja"), fields.get("answer_choices")
        if not (isinstance(name, str) and isinstance(jinja, str) and isinstance(choices, str | None)):
            raise InputError(
                f"{source}: template {name!r} needs texts as name, jinja and answer_choices, not "
                f"{type(name).__name__}, {type(jinja).__name__} and {type(choices).__name__} (put quotes around Yes and No)"
            )
        templates.append(Template(name, jinja, choices))
    for name, count in Counter(template.name for template in templates).items():
        if count > 1:
            raise InputError(f"{source}: has {count} templates of the name {name!r}")
    return templates


def boolq_templates() -> tuple[list[Template], str]:
    """Return promptsource's templates of BoolQ where it is installed, else slowllm's own, and where they are from."""
    try:
        from promptsource.templates import DatasetTemplates  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        if error.name != "promptsource":
            raise missing_package(f"promptsource is installed, but {error.name}", error) from error
        return read_templates(Path(__file__).parent / "templates" / "boolq.yaml"), "slowllm's own"
    found = DatasetTemplates("super_glue", "boolq").templates.values()
    fields = [{key: getattr(one, key, None) for key in ("name", "jinja", "answer_choices")} for one in found]
    if not fields:
        raise InputError("promptsource is installed, but has no templates for super_glue/boolq")
    return _checked("promptsource", fields), "promptsource's"


def select_templates(templates: Sequence[Template], name: str) -> list[Template]:
    """Return the template of a name; or with ``all``, every one that has fixed choices.

    Raises:
        InputError: there is none; or it has no fixed choices.
    """
    if name != "all":
        found = [template for template in templates if template.name == name]
        if not found:
            names = ", ".join(repr(template.name) for template in templates)
            raise InputError(f"no template is called {name!r}; there are {names}")
        if found[0].answer_choices is None:
            raise InputError(f"template {name!r} has no fixed choices (answer_choices) to compare")
        return found
    closed = [template for template in templates if template.answer_choices is not None]
    if not closed:
        raise InputError("none of the templates has fixed choices (answer_choices) to compare")
    for template in templates:
        if template.answer_choices is None:
            log.warning("template %r is left out: it has no fixed choices (answer_choices)", template.name)
    return closed


def most_frequent(items: Iterable[Any]) -> list[Any]:
    """Return the items that occur most often, each once, in the order of their first occurrence."""
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most]


class Renderer:
    """Makes questions of examples by one template, in a sandbox.

    Filters that draw (`choice`, jinja's `random`) draw the same for an example each time.

    Raises:
        InputError: the template is not jinja, or has no choices.
    """

    def __init__(self, template: Template) -> None:
        try:
            from jinja2 import StrictUndefined, TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ModuleNotFoundError as error:
            raise missing_package("jinja2", error) from error
        self.name = template.name
        if template.answer_choices is None:
            raise InputError(f"template {template.name!r} has no fixed choices (answer_choices) to compare")
        self._random = random.Random()
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        environment.globals["zip"] = zip
        for name in ("choice", "random"):
            environment.filters[name] = lambda items: self._random.choice(list(items))
        environment.filters["most_frequent"] = most_frequent
        try:
            self._prompt, self._choices = (
                environment.from_string(text.replace("|||", _SEPARATOR))
                for text in (template.jinja, template.answer_choices)
            )
        except TemplateError as error:
            raise InputError(f"template {template.name!r} is not jinja: {first_line(error)}") from error

    def render(self, number: int, example: Mapping[str, Any], place: str | None = None) -> Question | None:
        """Return the question that an example makes; None where the template renders to nothing for it.

        Raises:
            InputError: it does not render, or its target is none of its choices.
        """
        place = f"example {number}" if place is None else place
        where = f"{place}, template {self.name!r}"
        if "answer_choices" in example:
            raise InputError(
                f"{place} has a column answer_choices, a name that templates need for themselves"
            )
        self._random.seed(f"{number} {self.name}")
        try:
            choices = _parts(self._choices.render(example))
            parts = _parts(self._prompt.render({**example, "answer_choices": list(choices)}))
        except MemoryError as error:
            raise InputError(f"{where}: it takes too much memory") from error
        except Exception as error:  # TemplateError, and whatever its expressions raise
            raise InputError(f"{where}: it does not render ({first_line(error)})") from error
        if parts == ("",):
            return None
        if len(parts) != 2:
            raise InputError(f"{where}: prompt and target need one ||| between them, not {len(parts) - 1}")
        prompt, target = parts
        if len(choices) < 2 or "" in choices:
            raise InputError(f"{where}: its choices are {list(choices)}; two or more are needed, none empty")
        if len(set(choices)) < len(choices):
            raise InputError(f"{where}: its choices {list(choices)} are not all different")
        if target not in choices:
            raise InputError(
                f"{where}: its target {target!r} is none of its choices {list(choices)}"
                + ("; does this split have answers?" if not target else "")
            )
        return Question(self.name, number, prompt, choices, choices.index(target))


def _parts(rendered: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in rendered.split(_SEPARATOR))


def make_questions(
    templates: Sequence[Template],
    examples: Iterable[tuple[int, Mapping[str, Any]]],
    place_of: Callable[[int], str] = "example {}".format,
) -> list[Question]:
    """Return every example through every template, those of one example together: they share their passage.

    Args:
        templates: that are applied.
        examples: with their numbers.
        place_of: says in words where an example stands, for errors.
    Raises:
        InputError: a template does not render within limits of time and memory, or there are no questions.
    """
    renderers: dict[int, Renderer] = {}

    def render(asked: tuple[int, int, Mapping[str, Any]]) -> Question | None:
        which, number, example = asked
        if which not in renderers:  # made in the child: jinja computes constants when it compiles
            renderers[which] = Renderer(templates[which])
        return renderers[which].render(number, example, place_of(number))

    with contextlib.closing(BoundedCalls(render)) as bounded:
        rendered = [
            bounded((which, number, example), f"{place_of(number)}, template {template.name!r}")
            for number, example in examples
            for which, template in enumerate(templates)
        ]
    questions = [question for question in rendered if question is not None]
    if not questions:
        raise InputError("the data has no example to which a template applies")
    return questions


def missing_package(package: str, error: ModuleNotFoundError) -> InputError:
    """Return the error that says which package to install."""
    return InputError(f"{package} is not installed ({error}); pip install datasets lm-eval jinja2 pyyaml")
