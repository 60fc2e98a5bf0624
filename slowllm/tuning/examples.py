"""Training data of a soft prompt: texts, prompts with answers, and prompts with labels.

Knows token ids, tokenizers and files; knows no model's weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from slowllm.errors import InputError
from slowllm.files import parse_object, read_raw_lines
from slowllm.inference.text import TextSide, encode_pair, leading_ids, max_line_tokens, plain_ids, prefix_id
from slowllm.tables import kind_of, read_table

RawExample = str | Mapping[str, Any]
COLUMNS = ("prompt", "answer", "label", "text")


@dataclass(frozen=True)
class Example:
    """A text of which a part is learned.

    Attributes:
        name: file and line, or the like, for messages.
        context: token ids without a loss, at least one.
        answer: token ids that are learned, at least one.
        label: index of the right label, if the task has labels.
    """

    name: str
    context: tuple[int, ...]
    answer: tuple[int, ...]
    label: int | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the model's input: all but the last."""
        return (self.context + self.answer)[:-1]


@dataclass(frozen=True)
class Task:
    """Examples that one prompt is tuned on.

    Attributes:
        name: for messages and folders.
        train: examples that are learned.
        validation: examples that the prompt is validated on, if any.
        labels: words of which one follows each example; empty for other tasks.
        label_ids: the tokens of each label.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    labels: tuple[str, ...] = ()
    label_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def compares(self) -> bool:
        """Whether each label is one token, so that labels are compared with each other and nothing else."""
        return bool(self.labels) and all(len(ids) == 1 for ids in self.label_ids)

    def digest(self) -> str:
        """Return a hash of all examples and labels."""
        rows = [[(e.context, e.answer, e.label) for e in part] for part in (self.train, self.validation)]
        return sha256(json.dumps([rows, self.label_ids]).encode()).hexdigest()


def make_task(
    side: TextSide,
    name: str,
    train: Iterable[RawExample],
    validation: Iterable[RawExample] = (),
    *,
    labels: Sequence[str] = (),
    num_tokens: int = 0,
) -> Task:
    """Turn texts into a task.

    An example is a text, or has the key ``text``: all of its tokens are learned after BOS (or EOS if there is none). Or
    it has the keys ``prompt`` and ``answer``, of which the answer is learned; or ``prompt`` and ``label``. Answers and
    labels follow their prompt as they are written, with the blank that they begin with.

    Args:
        side: the model, or its description, with tokenizer and vocabulary.
        name: of the task.
        train: examples that are learned.
        validation: examples that the prompt is validated on.
        labels: words, if every example has one of them; a ``label`` is a word as it is written here, or its number.
        num_tokens: of the soft prompt, which takes positions from the examples.
    Raises:
        InputError: an example is empty, too long, without an answer or with another label; the message names it.
    """
    if isinstance(labels, str):
        raise InputError(f"labels must be a list of words, not the word {labels!r}")
    labels = tuple(labels)
    for label in labels:
        check_text("a label", label)
    if labels and (len(labels) < 2 or len({label.strip() for label in labels}) < len(labels)):
        raise InputError(f"labels must be two different words or more, not {', '.join(map(repr, labels))}")
    limit = max_line_tokens(side) - num_tokens
    if limit < 1:
        raise InputError(
            f"{num_tokens} virtual tokens are more than the {limit + num_tokens} that the model takes"
        )
    parts = [
        tuple(_encoded(side, f"{name}{what}", part, labels, limit))
        for what, part in (("", train), (", validation", validation))
    ]
    if not parts[0]:
        raise InputError(f"{name}: has no examples")
    return Task(name, parts[0], parts[1], labels, _label_ids(side, parts, labels))


def _label_ids(
    side: TextSide, parts: Sequence[Sequence[Example]], labels: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each label, as they are in the examples that have it."""
    by_label: dict[int, tuple[int, ...]] = {}
    for example in (example for part in parts for example in part):
        if example.label is not None and by_label.setdefault(example.label, example.answer) != example.answer:
            raise InputError(
                f"{example.name}: the tokenizer makes other tokens of the label {labels[example.label]!r} here than "
                "elsewhere; begin labels with a blank, or end every prompt alike"
            )
    return tuple(
        by_label[n] if n in by_label else plain_ids(side.tokenizer, label) for n, label in enumerate(labels)
    )


def _encoded(
    side: TextSide, name: str, rows: Iterable[RawExample], labels: tuple[str, ...], limit: int
) -> Iterator[Example]:
    leading = leading_ids(side.tokenizer)
    vocabulary = side.config.get_text_config().vocab_size
    for number, row in enumerate(rows, 1):
        where = f"{name}: example {number}"
        if isinstance(row, Mapping) and "line" in row:
            where = f"{name}: line {row['line']}"
        prompt, answer, label = _parts(where, row, labels)
        if not answer.strip():
            raise InputError(f"{where}: {'is empty' if prompt is None else 'has an empty answer'}")
        try:
            if prompt is None:
                ids = plain_ids(side.tokenizer, answer)
                before: tuple[int, ...] = (prefix_id(side.tokenizer, vocabulary),)
                example = Example(where, before, ids)
                if not ids or max(ids) >= vocabulary:
                    raise InputError("the tokenizer makes no tokens of it that the model knows")
            else:
                query = encode_pair(side, prompt, answer, leading=leading)
                example = Example(where, query.context, query.continuation, label)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if len(example.ids) > limit:
            raise InputError(
                f"{where}: has {len(example.ids)} tokens, but beside the soft prompt the model takes {limit}"
            )
        yield example


def _parts(where: str, row: RawExample, labels: tuple[str, ...]) -> tuple[str | None, str, int | None]:
    """Return the prompt (None for a text), the answer and the label's index of an example."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where}: is no text and no object with prompt and answer, but {type(row).__name__}"
        )
    if labels:
        return _text(where, row, "prompt"), *_label(where, row, labels)
    if "label" in row and "answer" not in row:
        raise InputError(f"{where}: has a label, but no labels are given; name them with --label, or labels=")
    if "text" in row and "prompt" not in row and "answer" not in row:
        return None, _text(where, row, "text"), None
    if "answer" not in row and "prompt" in row:
        raise InputError(f"{where}: has no answer")
    return _text(where, row, "prompt"), _text(where, row, "answer"), None


def _label(where: str, row: Mapping[str, Any], labels: tuple[str, ...]) -> tuple[str, int]:
    label = row.get("label", row.get("answer"))
    if label is None:
        raise InputError(f"{where}: has no label")
    # Words are tried before numbers, or the label 0 of " 1" and " 0" would be the first of them. And true is no 1.
    for number, word in enumerate(labels):
        if label == word or (type(label) is int and str(label) == word.strip()):
            return word, number
    if type(label) is int and 0 <= label < len(labels):
        return labels[label], label
    is_near = isinstance(label, str) and label.strip() in [word.strip() for word in labels]
    hint = "; words are compared as they are written, blanks included" if is_near else ""
    raise InputError(f"{where}: label {label!r} is none of {', '.join(map(repr, labels))}{hint}")


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise InputError(f"{where}: has no {key}" if text is None else f"{where}: its {key} is no text")
    _refuse_surrogates(f"{where}: its {key}", text)
    return text


def check_text(what: str, text: object) -> None:
    """Refuse a setting that is no text for a tokenizer, or empty.

    Raises:
        InputError: it is.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} must be a text, not {text!r}")
    if not text.strip():
        raise InputError(f"{what} is empty: {text!r}")
    _refuse_surrogates(what, text)


def _refuse_surrogates(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} cannot be encoded as UTF-8 ({error.reason})") from error


def read_rows(path: str | os.PathLike[str]) -> list[RawExample]:
    """Return the examples of a file: JSON Lines, CSV or Parquet by the end of its name, else one text a line.

    Raises:
        InputError: it cannot be read, a line is not JSON, or a table has none of the columns of an example.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind in ("csv", "parquet"):
        return [{**_with_number(row), "line": number} for number, row in read_table(path, COLUMNS)]
    rows: list[RawExample] = []
    for number, raw in read_raw_lines(path, missing="has no examples"):
        try:
            if kind == "json":
                row = parse_object(raw, "is JSON, but no object with prompt and answer")
            else:
                row = {"text": raw.decode("utf-8").strip()}
        except (InputError, ValueError) as error:
            reason = str(error) if str(error).startswith("is JSON") else f"cannot be read ({error})"
            raise InputError(f"{path}: line {number} {reason}") from error
        if not rows and kind == "text" and _is_example(row["text"]):
            raise InputError(
                f"{path}: line {number} is JSON, but only files named .jsonl are read as such; rename the file"
            )
        rows.append({**row, "line": number})
    return rows


def _with_number(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table whose label is a number where it is written as one: CSV has only texts."""
    label = row.get("label")
    if isinstance(label, str) and label.isascii() and label.isdecimal():
        return {**row, "label": int(label)}
    return row


def _is_example(line: str) -> bool:
    """Return whether a line of text is an example in JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value.keys() & set(COLUMNS))


def make_tasks(
    side: TextSide, data: Any, validation: Any, labels: Sequence[str], num_tokens: int
) -> list[Task]:
    """Turn files or examples, one or several by name, into tasks; see `make_task`.

    Raises:
        InputError: there are none, or a name cannot be a folder's.
    """
    train = data if isinstance(data, Mapping) else {_name_of(data): data}
    judged = validation if isinstance(validation, Mapping) else dict.fromkeys(train, validation)
    if not train:
        raise InputError("there are no examples")
    for name in train:
        if not isinstance(name, str) or not name or name.startswith(".") or "/" in name or os.sep in name:
            raise InputError(f"a task cannot be called {name!r}; its name becomes a folder's")
    if other := sorted(set(judged) - set(train)):
        raise InputError(f"validation is given for {other[0]}, which is none of the tasks {', '.join(train)}")
    return [
        make_task(side, name, _rows(rows), _rows(judged.get(name, ())), labels=labels, num_tokens=num_tokens)
        for name, rows in train.items()
    ]


def _name_of(data: Any) -> str:
    return Path(data).stem if isinstance(data, str | os.PathLike) else "data"


def _rows(data: Any) -> Sequence[RawExample]:
    if isinstance(data, str | os.PathLike):
        return read_rows(data)
    if not isinstance(data, Sequence):
        raise InputError(f"examples must be a file or a list, not {type(data).__name__}")
    return data
