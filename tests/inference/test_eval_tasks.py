"""Evaluation tasks up to the model: templates in promptsource's format, datasets' own readers, counts."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import InputError
from slowllm.inference import eval_tasks
from slowllm.inference.prompt_templates import (
    Question,
    Renderer,
    Template,
    boolq_templates,
    make_questions,
    most_frequent,
    read_templates,
    select_templates,
)

ROWS = [
    {"question": "is water wet", "passage": "Water | wets ||| things.", "answer": True},
    {"question": "is fire cold", "passage": "Fire burns.", "answer": False},
    {"question": "do birds fly", "passage": "Many birds do.", "answer": True},
]


def template(
    jinja: str = "{{ question }} ||| {{ answer_choices[label] }}", choices: str | None = "No ||| Yes"
) -> Template:
    return Template("t", jinja, choices)


def rendered(jinja: str, choices: str = "No ||| Yes", **example: Any) -> Question:
    found = Renderer(template(jinja, choices)).render(1, {"question": "q", "label": 1, **example})
    assert found is not None
    return found


def save_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Templates


def test_own_templates_ask_every_question_of_boolq() -> None:
    templates, source = boolq_templates()
    assert source == "slowllm's own"
    examples = eval_tasks.boolq_examples("x", enumerate(ROWS, 1))
    questions = make_questions(select_templates(templates, "all"), examples)
    assert len(questions) == len(templates) * len(ROWS)
    for question in questions:
        row = ROWS[question.example - 1]
        assert row["question"] in question.prompt
        assert row["passage"] in question.prompt
        assert question.choices[question.gold].lower() in ("yes", "true" if row["answer"] else "false", "no")
        assert (question.gold == 1) == row["answer"]
        assert question.prompt == question.prompt.strip()
    # Those of one example stand together, so that they share sweeps.
    assert [question.example for question in questions] == sorted(q.example for q in questions)


def test_a_separator_in_the_data_splits_nothing() -> None:
    found = rendered("{{ text }} ||| {{ answer_choices[1] }}", "{{ text }} ||| b", text="a ||| c")
    assert found == Question("t", 1, "a ||| c", ("a ||| c", "b"), 1)


def test_choices_are_a_template_of_their_own() -> None:
    found = rendered(
        "pick: ||| {{ answer_choices[0] }}", '{{ options | join("|||") }}', options=["red", "blue"]
    )
    assert found.choices == ("red", "blue")
    assert found.continuations == (" red", " blue")


def test_what_promptsource_offers_templates_is_there() -> None:
    found = rendered(
        "{{ [3, 1, 3, 1, 2] | most_frequent }} {% for a, b in zip('ab', 'cd') %}{{ a }}{{ b }}{% endfor %} ||| No"
    )
    assert found.prompt == "[3, 1] acbd"
    assert most_frequent([]) == []


def test_draws_are_the_same_each_time_and_differ_between_examples() -> None:
    def draw(number: int) -> str:
        found = Renderer(template("{{ range(1000) | choice }} {{ range(1000) | random }} ||| Yes")).render(
            number, {}
        )
        assert found is not None
        return found.prompt

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_template_that_renders_to_nothing_does_not_apply() -> None:
    one = template("{% if label %}{{ question }} ||| Yes{% endif %}")
    questions = make_questions(
        [one], [(1, {"question": "a", "label": 0}), (2, {"question": "b", "label": 1})]
    )
    assert [question.example for question in questions] == [2]
    with pytest.raises(InputError, match="no example to which a template applies"):
        make_questions([one], [(1, {"question": "a", "label": 0})])


@pytest.mark.parametrize(
    ("jinja", "choices", "match"),
    [
        ("{{ question ||| Yes", "No ||| Yes", "template 't' is not jinja"),
        ("{{ nothing }} ||| Yes", "No ||| Yes", "example 1, template 't': it does not render .'nothing' is undefined"),
        ("{{ 1 / 0 }} ||| Yes", "No ||| Yes", "does not render .division by zero"),
        ("{{ ().__class__.__mro__ }} ||| Yes", "No ||| Yes", "does not render"),
        ("{{ question }}", "No ||| Yes", r"need one \|\|\| between them, not 0"),
        ("a ||| b ||| c", "No ||| Yes", r"need one \|\|\| between them, not 2"),
        ("{{ question }} ||| Maybe", "No ||| Yes", "its target 'Maybe' is none of its choices"),
        ("{{ question }} ||| ", "No ||| Yes", "does this split have answers"),
        ("{{ question }} ||| No", "No", "two or more are needed"),
        ("{{ question }} ||| No", "No ||| ", "none empty"),
        ("{{ question }} ||| No", "No ||| No", "are not all different"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused(jinja: str, choices: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Renderer(template(jinja, choices)).render(1, {"question": "q", "label": 1})


def test_names_that_are_taken_are_refused() -> None:
    with pytest.raises(InputError, match="a column answer_choices"):
        Renderer(template()).render(1, {"question": "q", "label": 1, "answer_choices": []})


def test_templates_without_choices_are_refused_or_left_out(caplog: Any) -> None:
    closed, opened = template(), Template("open", "{{ question }} ||| {{ passage }}", None)
    assert select_templates([closed, opened], "all") == [closed]
    assert "'open' is left out" in caplog.text
    with pytest.raises(InputError, match="template 'open' has no fixed choices"):
        select_templates([closed, opened], "open")
    with pytest.raises(InputError, match="none of the templates has fixed choices"):
        select_templates([opened], "all")
    with pytest.raises(InputError, match="template 'open' has no fixed choices"):
        Renderer(opened)
    with pytest.raises(InputError, match="no template is called 'x'; there are 't', 'open'"):
        select_templates([closed, opened], "x")


BAD_FILES = {
    "not there": (None, "No such file"),
    "not YAML": ("templates: [", "is no templates file"),
    "another tag": ("templates: !!python/object:os.system {}", "is no templates file"),
    "bytes": (b"\xff\xfe\x00", "is no templates file"),
    "no templates": ("dataset: x", "has no templates"),
    "a list": ("- a", "has no templates"),
    "no name": ("templates: {a: !Template {jinja: x}}", "needs texts as name, jinja and answer_choices"),
    "choices a list": ("templates: {a: !Template {name: n, jinja: x, answer_choices: [a]}}", "template 'n' needs texts"),
    "a name twice": ("templates: {a: !Template {name: n, jinja: x}, b: !Template {name: n, jinja: y}}", "has 2 templates of the name 'n'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_templates_file_is_refused(case: str, tmp_path: Path) -> None:
    content, match = BAD_FILES[case]
    file = tmp_path / "templates.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=match):
        read_templates(file)


def test_installed_promptsource_is_used(tmp_path: Path, monkeypatch: Any) -> None:
    # A stand-in with promptsource's names: it does not install beside current packages.
    (tmp_path / "promptsource").mkdir()
    (tmp_path / "promptsource" / "__init__.py").write_text("")
    code = (
        "class One:\n    name, jinja, answer_choices = 'one', 'a ||| b', 'b ||| c'\n"
        "class DatasetTemplates:\n"
        "    def __init__(self, dataset, subset=None):\n"
        "        self.templates = {'id': One()} if (dataset, subset) == ('super_glue', 'boolq') else {}\n"
    )
    (tmp_path / "promptsource" / "templates.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert boolq_templates() == ([Template("one", "a ||| b", "b ||| c")], "promptsource's")
        monkeypatch.setattr(sys.modules["promptsource.templates"].One, "jinja", None)
        with pytest.raises(InputError, match="promptsource: template 'one' needs texts"):
            boolq_templates()
        monkeypatch.setattr(
            sys.modules["promptsource.templates"],
            "DatasetTemplates",
            lambda *names: SimpleNamespace(templates={}),
        )
        with pytest.raises(InputError, match="has no templates for super_glue/boolq"):
            boolq_templates()
        del sys.modules["promptsource.templates"]
        (tmp_path / "promptsource" / "templates.py").write_text("import pkg_resources_of_old")
        with pytest.raises(
            InputError, match=r"promptsource is installed, but pkg_resources_of_old is not installed"
        ):
            boolq_templates()
    finally:
        for name in ("promptsource", "promptsource.templates"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("yaml", boolq_templates),
        ("jinja2", lambda: Renderer(template())),
        ("datasets", lambda: next(eval_tasks.read_examples("x.json"))),
    ],
)
def test_a_package_that_is_not_there_is_named(package: str, call: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"is not installed .*; pip install datasets lm-eval jinja2 pyyaml"):
        call()


# Data


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_files_are_read_by_datasets(suffix: str, tmp_path: Path) -> None:
    import datasets

    file = tmp_path / f"data{suffix}"
    rows = datasets.Dataset.from_list(ROWS)
    if suffix == ".parquet":
        rows.to_parquet(str(file))
    elif suffix == ".csv":
        rows.to_csv(str(file))
    elif suffix == ".json":
        file.write_text(json.dumps(ROWS))
    else:
        save_jsonl(file, ROWS)
    assert list(eval_tasks.read_examples(str(file))) == list(enumerate(ROWS, 1))
    assert list(eval_tasks.read_examples(str(file), limit=2)) == list(enumerate(ROWS[:2], 1))


def test_json_lines_need_no_datasets_and_have_the_numbers_of_their_lines(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    assert list(eval_tasks.read_examples(str(file))) == list(zip((1, 3, 5), ROWS, strict=True))
    assert list(eval_tasks.read_examples(str(file), limit=2)) == list(zip((1, 3), ROWS, strict=False))


@pytest.mark.parametrize(
    ("value", "truth"),
    [(True, True), (0, False), (1, True), ("Yes", True), ("no", False), (" TRUE", True), ("false", False)],
)
def test_answers_may_be_words(value: Any, truth: bool) -> None:
    for name in ("answer", "label"):
        ((_, row),) = eval_tasks.boolq_examples("x", [(1, {"question": "q", "passage": "p", name: value})])
        assert (row["answer"], row["label"]) == (truth, int(truth))


def test_a_folder_has_splits(tmp_path: Path) -> None:
    save_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    save_jsonl(tmp_path / "validation.jsonl", ROWS)
    assert len(list(eval_tasks.read_examples(str(tmp_path)))) == 3
    assert len(list(eval_tasks.read_examples(str(tmp_path), split="train"))) == 1
    with pytest.raises(InputError, match=r"cannot be read .*test"):
        list(eval_tasks.read_examples(str(tmp_path), split="test"))


def test_the_cache_of_datasets_is_read_without_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    import datasets
    from datasets.packaged_modules.json.json import Json

    file = save_jsonl(tmp_path / "x.jsonl", ROWS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    options: dict[str, Any] = {"dataset_name": "boolq", "config_name": "default", "hash": "abc"}
    Json(cache_dir=str(tmp_path), data_files={"validation": [str(file)]}, **options).download_and_prepare()
    # A dataset of the hub has its files in its config, and no part of its folder's name is made of them.
    (folder,) = tmp_path.glob("boolq/default-*")
    folder.rename(tmp_path / "boolq" / "default")
    assert list(eval_tasks.read_examples("boolq", limit=2)) == list(enumerate(ROWS[:2], 1))
    with pytest.raises(InputError, match="has no split 'test'; there are validation"):
        next(eval_tasks.read_examples("boolq", split="test"))
    with pytest.raises(InputError, match=r"not in the cache of datasets.*load_dataset\('boolq', 'other'\)"):
        next(eval_tasks.read_examples("boolq", subset="other"))
    assert not asked


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.jsonl", '{"question": "q", "label": 1}\n\n{"a": ', r"x\.jsonl: line 3 is not JSON"),
        ("x.jsonl", "", "has no non-empty line"),
        ("x.parquet", "no parquet", "cannot be read"),
        ("x.txt", "a", "is none of .jsonl, .json, .parquet, .csv"),
        (None, "", "no such file or folder"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    name: str | None, content: str, match: str, tmp_path: Path
) -> None:
    file = tmp_path / (name or "nowhere.jsonl")
    if name is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=match):
        make_questions([template()], eval_tasks.read_examples(str(file)))


def test_a_hub_id_that_is_not_cached_is_refused() -> None:
    with pytest.raises(InputError, match="nobody/nothing: no such file, and not in the cache of datasets"):
        list(eval_tasks.read_examples("nobody/nothing"))


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a file has no splits"):
        list(eval_tasks.read_examples(str(save_jsonl(tmp_path / "x.jsonl", ROWS)), split="test"))


def test_both_columns_of_answers_become_both() -> None:
    rows = [{"question": "q", "passage": "p", "label": 0}, {"question": "q", "passage": "p", "answer": True}]
    found = [row for _, row in eval_tasks.boolq_examples("x", enumerate(rows, 1))]
    assert [(row["answer"], row["label"]) for row in found] == [(False, 0), (True, 1)]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"passage": "p", "answer": True}, "x: example 1 has no 'question', only passage, answer"),
        ({"question": "q", "answer": True}, "has no 'passage'"),
        ({"question": "q", "passage": None, "answer": True}, "example 1: passage is null, no text"),
        ({"question": "q", "passage": "p"}, "has neither answer"),
        ({"question": "q", "passage": "p", "answer": "ja"}, 'answer is "ja", none of true, false, 1, 0, yes and no'),
        ({"question": "q", "passage": "p", "label": -1}, "label is -1, none of"),
        ({"question": "q", "passage": "p", "label": 1.5}, "label is 1.5, none of"),
        ({"question": "q", "passage": "p", "label": 0, "answer": True}, "answer is true but label is 0"),
    ],
)  # fmt: skip
def test_examples_that_are_not_boolqs_are_refused(row: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        list(eval_tasks.boolq_examples("x", [(1, row)]))


# Counts


def test_wilson_is_as_tabulated() -> None:
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I.
    assert eval_tasks.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert eval_tasks.wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert eval_tasks.wilson(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert eval_tasks.wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert eval_tasks.wilson(0.0, 0) == (0.0, 1.0)


@given(right=st.integers(0, 1000), wrong=st.integers(0, 1000))
def test_an_interval_holds_its_share(right: int, wrong: int) -> None:
    count = right + wrong
    share = right / count if count else 0.0
    low, high = eval_tasks.wilson(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def test_a_tally_counts_templates_and_all() -> None:
    tally = eval_tasks.Tally()
    for example in (1, 2):
        for name in ("a", "b"):
            tally.add(Question(name, example, "", ("x", "y"), 0), 0 if name == "a" or example == 1 else 1)
    a, b, both = tally.rows()
    assert (a["template"], a["num_correct"], a["accuracy"]) == ("a", 2, 1.0)
    assert (b["template"], b["num_correct"], b["accuracy"]) == ("b", 1, 0.5)
    assert (both["template"], both["num_questions"], both["accuracy"]) == (None, 4, 0.75)
    assert (both["low"], both["high"]) == eval_tasks.wilson(0.75, 2)  # two examples, not four
    assert tally.accuracy == 0.75
