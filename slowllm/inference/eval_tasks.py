"""Evaluation tasks: examples of a dataset, prompts that templates make of them, accuracy with its interval.

Knows `datasets`, jinja2, YAML and promptsource's format of templates; knows a model only through `scoring`. All
prompts are made, and all answers checked, before a model is asked.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slowllm.errors import InputError, first_line
from slowllm.files import parse_object, read_raw_lines, shown
from slowllm.inference.prompt_templates import Question, missing_package

log = logging.getLogger(__name__)

# Two-sided, 95 %.
_Z = 1.959963984540054
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read_examples(
    data: str, *, subset: str | None = None, split: str | None = None, limit: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the examples of a dataset with their numbers, from 1. Nothing is downloaded.

    JSON Lines are read here, and their examples numbered by their lines; everything else is read by `datasets`.

    Args:
        data: a JSON Lines, JSON, Parquet or CSV file; a folder that `datasets` can load; or the hub id of a dataset
            in its cache.
        subset: config of a folder's or the hub's dataset.
        split: of it; ``validation`` by default. A file has none.
        limit: most examples.
    Raises:
        InputError: there is no such dataset, or it cannot be read.
    """
    path = Path(data).expanduser()
    is_file = _is_file(path)
    if is_file and (split is not None or subset is not None):
        raise InputError(f"{data}: a file has no splits and no subsets; leave --split and --subset out")
    if is_file and path.suffix == ".jsonl":
        yield from itertools.islice(_json_lines(data, path), limit)
        return
    try:
        import datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing_package("datasets", error) from error
    try:
        if is_file:
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
        raise InputError(f"{data}: cannot be read ({first_line(error)})") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def _json_lines(data: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, raw in read_raw_lines(path):
        try:
            yield number, parse_object(raw, "is JSON, but no object with columns")
        except InputError as error:
            raise InputError(f"{data}: line {number} {error}") from error


def place_of(data: str, number: int) -> str:
    """Return in words where an example stands: its line in a file of JSON Lines, otherwise its number."""
    return f"{data}: {'line' if data.endswith('.jsonl') else 'example'} {number}"


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
        InputError: a column is missing, or an answer means neither true nor false.
    """
    for number, example in examples:
        where = place_of(data, number)
        for column in ("question", "passage"):
            if column not in example:
                raise InputError(
                    f"{where} has no {column!r}, only {', '.join(example)}; BoolQ has question, passage and answer (or "
                    "label)"
                )
            if not isinstance(example[column], str):
                raise InputError(f"{where}: {column} is {shown(example[column])}, no text")
        answers = {
            name: _truth(where, name, example[name])
            for name in ("answer", "label")
            if example.get(name) is not None
        }
        if not answers:
            raise InputError(f"{where} has neither answer nor label, which are true or false")
        if len(set(answers.values())) > 1:
            raise InputError(
                f"{where}: answer is {shown(example['answer'])} but label is {shown(example['label'])}"
            )
        truth = next(iter(answers.values()))
        yield number, {**example, "answer": truth, "label": int(truth)}


_WORDS = {"yes": True, "true": True, "no": False, "false": False}


def _truth(where: str, name: str, value: Any) -> bool:
    """Return what an answer means: a boolean, 0 or 1, or one of the words yes, no, true and false."""
    if isinstance(value, str) and (word := value.strip().lower()) in _WORDS:
        return _WORDS[word]
    if isinstance(value, bool | int) and value in (0, 1):
        return bool(value)
    raise InputError(f"{where}: {name} is {shown(value)}, none of true, false, 1, 0, yes and no")


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
