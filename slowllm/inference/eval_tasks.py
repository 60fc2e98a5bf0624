"""Evaluation tasks: examples of a dataset, prompts that templates make of them, accuracy with its interval.

Knows `datasets`, jinja2, YAML and promptsource's format of templates; knows a model only through `scoring`. All
prompts are made, and all answers checked, before a model is asked.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slowllm.errors import InputError
from slowllm.modeling.skeleton import first_line

log = logging.getLogger(__name__)

# Stands for ||| while a template renders, so that one in an example's own text splits nothing.
_SEPARATOR = "\ue0a5\ue0c3\ue0a5"
# Two-sided, 95 %.
_Z = 1.959963984540054
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


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
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise _missing("PyYAML", error) from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Plain data, and promptsource's two tags as mappings."""

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
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
            raise _missing(f"promptsource is installed, but {error.name}", error) from error
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
            raise _missing("jinja2", error) from error
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

    def render(self, number: int, example: Mapping[str, Any]) -> Question | None:
        """Return the question that an example makes; None where the template renders to nothing for it.

        Raises:
            InputError: it does not render, or its target is none of its choices.
        """
        where = f"example {number}, template {self.name!r}"
        if "answer_choices" in example:
            raise InputError(
                f"example {number} has a column answer_choices, a name that templates need for themselves"
            )
        self._random.seed(f"{number} {self.name}")
        try:
            choices = _parts(self._choices.render(example))
            parts = _parts(self._prompt.render({**example, "answer_choices": list(choices)}))
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
    templates: Sequence[Template], examples: Iterable[tuple[int, Mapping[str, Any]]]
) -> list[Question]:
    """Return every example through every template, those of one example together: they share their passage.

    Raises:
        InputError: a template does not render, or there are no questions.
    """
    renderers = [Renderer(template) for template in templates]
    rendered = (renderer.render(number, example) for number, example in examples for renderer in renderers)
    questions = [question for question in rendered if question is not None]
    if not questions:
        raise InputError("the data has no example to which a template applies")
    return questions


def read_examples(
    data: str, *, subset: str | None = None, split: str | None = None, limit: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the examples of a dataset with their numbers, from 1. Nothing is downloaded.

    Args:
        data: a JSON Lines, JSON, Parquet or CSV file; a folder that `datasets` can load; or the hub id of a dataset
            in its cache.
        subset: config of a folder's or the hub's dataset.
        split: of it; ``validation`` by default. A file has none.
        limit: most examples.
    Raises:
        InputError: there is no such dataset, or it cannot be read.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise _missing("datasets", error) from error
    path = Path(data).expanduser()
    try:
        if path.is_file():
            if split is not None or subset is not None:
                raise InputError(
                    f"{data}: a file has no splits and no subsets; leave --split and --subset out"
                )
            if path.suffix not in _READERS:
                raise InputError(f"{data}: is none of {', '.join(_READERS)}, by its name")
            # Streamed: without it `datasets` would write a second copy into its cache.
            rows = datasets.load_dataset(
                _READERS[path.suffix], data_files=str(path), split="train", streaming=True
            )
        elif path.is_dir():
            rows = datasets.load_dataset(str(path), subset, split=split or "validation", streaming=True)
        else:
            rows = _cached_dataset(data, subset, split or "validation")
        for number, row in enumerate(rows, 1):
            if limit is not None and number > limit:
                break
            yield number, dict(row)
    except InputError:
        raise
    except Exception as error:  # of pyarrow, pandas, fsspec or datasets, as the file may be wrong
        raise InputError(f"{data}: cannot be read ({_bad_line(path) or first_line(error)})") from error


def _bad_line(path: Path) -> str | None:
    """Name the first line of a JSON Lines file that is none; the libraries that read it do not."""
    if path.suffix != ".jsonl":
        return None
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    json.loads(line or "null")
                except ValueError as error:
                    if line.strip():
                        return f"line {number} is not JSON: {error}"
    except (OSError, ValueError):
        pass
    return None


def _cached_dataset(name: str, subset: str | None, split: str) -> Any:
    """Open a dataset of the hub that `datasets` has in its cache; load_dataset would ask the hub first."""
    from datasets.packaged_modules.cache.cache import Cache  # type: ignore[import-untyped]

    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in _READERS:
        raise InputError(f"{name}: no such file or folder")
    try:
        builder = Cache(
            dataset_name=name.rsplit("/", maxsplit=1)[-1],
            repo_id=name,
            config_name=subset,
            version="auto",
            hash="auto",
        )
    except ValueError as error:
        again = ", ".join(f"{part!r}" for part in (name, subset) if part)
        raise InputError(
            f"{name}: no such file, and not in the cache of datasets ({' '.join(str(error).split())}); fetch it with "
            f'python -c "import datasets; datasets.load_dataset({again})", or name a file'
        ) from error
    if split not in builder.info.splits:
        raise InputError(f"{name}: has no split {split!r}; there are {', '.join(builder.info.splits)}")
    return builder.as_dataset(split=split)


def boolq_examples(
    data: str, examples: Iterable[tuple[int, Mapping[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield examples of BoolQ with both `answer` (bool), as BoolQ has it, and `label` (0 or 1), as super_glue has it.

    Args:
        data: their name, for errors.
        examples: from `read_examples`.
    Raises:
        InputError: a column is missing, or an answer is neither true nor false.
    """
    for number, example in examples:
        for column in ("question", "passage"):
            if column not in example:
                raise InputError(
                    f"{data}: has no column {column!r}, only {', '.join(example)}; BoolQ has question, passage and "
                    "answer (or label)"
                )
            if not isinstance(example[column], str):
                raise InputError(f"{data}: example {number}: {column} is {example[column]!r}, no text")
        answer, label = example.get("answer"), example.get("label")
        if answer is None and label is None:
            raise InputError(
                f"{data}: example {number} has neither answer (true or false) nor label (1 or 0)"
            )
        if answer is not None and type(answer) is not bool:
            raise InputError(f"{data}: example {number}: answer is {answer!r}, neither true nor false")
        if label is not None and (type(label) is not int or label not in (0, 1)):
            raise InputError(f"{data}: example {number}: label is {label!r}, neither 0 nor 1")
        if answer is not None and label is not None and answer != bool(label):
            raise InputError(f"{data}: example {number}: answer is {answer!r} but label is {label!r}")
        truth = bool(label if answer is None else answer)
        yield number, {**example, "answer": truth, "label": int(truth)}


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of so many trials (E. B. Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    middle = share + _Z * _Z / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z * _Z / (4 * count * count))
    scale = 1 + _Z * _Z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


class Tally:
    """Counts answers, by template and in all."""

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._examples: set[int] = set()

    def add(self, question: Question, best: int) -> None:
        """Count the answer to one question."""
        self._asked[question.template] += 1
        self._right[question.template] += best == question.gold
        self._examples.add(question.example)

    @property
    def num_asked(self) -> int:
        """Questions answered."""
        return self._asked.total()

    @property
    def accuracy(self) -> float:
        """Share of right answers, of all."""
        return self._right.total() / max(1, self.num_asked)

    def rows(self) -> list[dict[str, Any]]:
        """Return the accuracy of each template, and in the last row, whose template is None, of all.

        The interval of all counts each example once, however many templates it went through: answers to one example
        are not independent.
        """
        rows = [
            _row(name, self._right[name], asked, wilson(self._right[name] / asked, asked))
            for name, asked in self._asked.items()
        ]
        interval = wilson(self.accuracy, len(self._examples))
        return [*rows, _row(None, self._right.total(), self.num_asked, interval)]


def _row(
    template: str | None, num_right: int, num_asked: int, interval: tuple[float, float]
) -> dict[str, Any]:
    return {
        "template": template,
        "num_questions": num_asked,
        "num_correct": num_right,
        "accuracy": num_right / max(1, num_asked),
        "low": interval[0],
        "high": interval[1],
    }


def _missing(package: str, error: ModuleNotFoundError) -> InputError:
    return InputError(f"{package} is not installed ({error}); pip install 'slowllm[eval]'")
