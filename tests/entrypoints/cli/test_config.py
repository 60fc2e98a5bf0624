"""Options from the environment, from presets and from a user's file: which one counts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slowllm.entrypoints.settings.presets import preset_names
from tests.support.command_line import refused, run
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a user's file, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "slowllm").mkdir(parents=True)
    return tmp_path / "xdg" / "slowllm" / "config.yaml"


def setting(option: str, arguments: list[Any], monkeypatch: Any, capsys: Any) -> tuple[Any, str]:
    """Return the value of an option of a verb with these arguments, and where it comes from."""
    assert run(["config", *arguments, "--json"], monkeypatch) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    (found,) = [one for one in settings if one["option"] == option]
    return found["value"], found["source"]


def test_the_nearest_source_counts(user_file: Path, monkeypatch: Any, capsys: Any) -> None:
    def ram(*arguments: str) -> tuple[Any, str]:
        return setting("ram", ["forward", *arguments], monkeypatch, capsys)

    assert ram() == ("auto", "default")
    user_file.write_text("ram: 1GiB\n")
    assert ram() == ("1GiB", str(user_file))
    user_file.write_text("ram: 1GiB\nforward: {ram: 2GiB}\nserve: {ram: 9GiB}\n")
    assert ram() == ("2GiB", str(user_file))
    assert ram("--preset", "bloom-176b-16gb") == ("12GiB", "preset bloom-176b-16gb")
    monkeypatch.setenv("SLOWLLM_RAM", "3GiB")
    assert ram("--preset", "bloom-176b-16gb") == ("3GiB", "environment: SLOWLLM_RAM")
    monkeypatch.setenv("SLOWLLM_FORWARD_RAM", "4GiB")
    assert ram("--preset", "bloom-176b-16gb") == ("4GiB", "environment: SLOWLLM_FORWARD_RAM")
    assert ram("--preset", "bloom-176b-16gb", "--ram", "5GiB") == ("5GiB", "command line")
    assert setting("ram", ["eval", "boolq"], monkeypatch, capsys) == ("3GiB", "environment: SLOWLLM_RAM")


def test_a_verb_obeys_what_config_shows(user_file: Path, processes: Processes) -> None:
    # In processes of their own: that of the tests may be too large for the preset's budget.
    user_file.write_text("ram: 1MiB\n")
    text = ["-m", "slowllm", "forward", "--text", "The value is returned."]
    ended = processes.run(*text)
    assert (ended.returncode, "a budget of 1MiB is too small" in ended.stderr) == (2, True)
    ended = processes.run(*text, "--preset", "tiny-bloom")
    assert (ended.returncode, "0 of 11 stops stay in memory" in ended.stderr) == (0, True)
    ended = processes.run(*text, "--preset", "tiny-bloom", "--resident", "--ram", "3GiB")
    assert (ended.returncode, "all of it fits in memory" in ended.stderr) == (0, True)
    ended = processes.run(*text, env={"SLOWLLM_PRESET": "tiny-bloom", "SLOWLLM_JSON": "1"})
    assert (ended.returncode, json.loads(ended.stdout)["line"]) == (0, 1)


def test_lists_and_switches_come_from_files_and_variables(
    user_file: Path, monkeypatch: Any, capsys: Any
) -> None:
    user_file.write_text("tune:\n  lr: [0.1, 0.3]\n  label: ' yes'\nresident: false\n")
    assert setting("lr", ["tune"], monkeypatch, capsys) == ([0.1, 0.3], str(user_file))
    assert setting("label", ["tune"], monkeypatch, capsys) == ([" yes"], str(user_file))
    assert setting("resident", ["forward"], monkeypatch, capsys) == (False, str(user_file))
    monkeypatch.setenv("SLOWLLM_RESIDENT", "yes")
    monkeypatch.setenv("SLOWLLM_TUNE_LR", "0.5 0.7")
    assert setting("resident", ["forward"], monkeypatch, capsys)[0] is True
    assert setting("lr", ["tune"], monkeypatch, capsys)[0] == [0.5, 0.7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rma: 3GiB", "'rma' is no option; the nearest is ram"),
        ("froward: {ram: 3GiB}", "'froward' is no option; the nearest is forward"),
        ("forward: {rma: 3GiB}", "'forward.rma' is no option of forward; the nearest is ram"),
        ("chat: {lr: 1}", "'chat.lr' is no option of chat"),
        ("forward: 5", "forward is a verb, and takes a mapping of its options, not 5"),
        ("ram: [1GiB]", "ram takes one value, not ['1GiB']"),
        ("ram: true", "ram takes a plain value, not True"),
        ("swarm: [[a]]", "swarm takes a list of plain values"),
        ("resident: maybe", "resident takes true or false, not 'maybe'"),
        ("max_tokens: many", "max_tokens: Input should be a valid integer"),
        ("max_tokens: 0", "max_tokens: "),
        ("ram: 1GiB\nram: 2GiB", "the key 'ram' stands in it twice"),
        ("max-tokens: 1\nmax_tokens: 2", "max-tokens and max_tokens are the same option; keep one of them"),
        ("1: 2", "the key 1 is no text"),
        ("- ram", "holds a list; write a mapping"),
        ("ram: {", "cannot be read as YAML"),
        ("ram: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_a_file_with_what_no_verb_takes_is_refused(
    text: str, words: str, user_file: Path, monkeypatch: Any, capsys: Any
) -> None:
    user_file.write_text(text)
    said = refused(["forward", "--text", "x"], monkeypatch, capsys)
    assert str(user_file) in said
    assert words in said


def test_an_empty_file_says_nothing(user_file: Path, monkeypatch: Any, capsys: Any) -> None:
    user_file.write_text("# nothing\n")
    assert run(["config"], monkeypatch) == 0
    assert "every option of every verb has its default" in capsys.readouterr().out


def test_a_variable_with_a_wrong_value_is_named(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("SLOWLLM_MAX_TOKENS", "many")
    said = refused(["forward", "--text", "x"], monkeypatch, capsys)
    assert "SLOWLLM_MAX_TOKENS: Input should be a valid integer" in said


def test_config_names_a_misspelt_variable_and_no_strange_one(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("SLOWLLM_RAMM", "3GiB")
    monkeypatch.setenv("SLOWLLM_SERVICE_ACCOUNT_OF_SOMEBODY", "x")
    assert run(["config"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert "slowllm: SLOWLLM_RAMM is no option's variable, and is not used; SLOWLLM_RAM is" in captured.err
    assert "SOMEBODY" not in captured.err
    assert "SLOWLLM_RAMM" not in captured.out


def test_options_that_need_another_one_wait_for_it(user_file: Path, monkeypatch: Any, capsys: Any) -> None:
    user_file.write_text("timeout: 60\nvram: 8GiB\n")
    assert run(["forward", "--text", "The value is returned."], monkeypatch) == 0
    capsys.readouterr()
    said = refused(["forward", "--text", "x", "--timeout", "60"], monkeypatch, capsys)
    assert "--timeout is for a swarm" in said


def test_a_preset_of_another_model_is_refused_with_every_mismatch(monkeypatch: Any, capsys: Any) -> None:
    command = ["forward", "--text", "x", "--preset", "llama-3.1-8b-8gb", "--model", TINY_BLOOM]
    said = refused(command, monkeypatch, capsys)
    for words in (
        'model_type is "bloom" and not "llama"', "n_layer is 10 and not 32", "hidden_size is 160 and not 4096",
        "n_head is 8 and not 32", "vocab_size is 4096 and not 128256", "leave out --preset, or name its model",
    ):  # fmt: skip
        assert words in said


def test_a_preset_gives_the_model_where_it_is_an_argument(processes: Processes) -> None:
    # In a process of its own: that of the tests may be too large for the preset's budget.
    ended = processes.run("-m", "slowllm", "plan", "--preset", "tiny-bloom", "--json")
    assert ended.returncode == 0
    plan = json.loads(ended.stdout)
    assert plan["model"] == "tiny-bloom"
    assert plan["ram_bytes"] == 2 << 30


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: x", "'modle' is no key of a preset; the nearest is model"),
        ("options: 5", "options takes a mapping, not 5"),
        ("model: [x]", "model takes a text, not ['x']"),
        (
            "about: &a [x, x]\nconfig: {a: *a}",
            "the reference *a is not followed; write the value where it belongs",
        ),
        ("options: {rma: 3GiB}", "'rma' is no option; the nearest is ram"),
    ],
)
def test_a_damaged_preset_is_refused(
    text: str, words: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    said = refused(["forward", "--text", "x", "--preset", str(tmp_path / "mine.yaml")], monkeypatch, capsys)
    assert "mine.yaml" in said
    assert words in said


def test_an_unknown_preset_is_refused_with_the_nearest(monkeypatch: Any, capsys: Any) -> None:
    said = refused(["forward", "--text", "x", "--preset", "bloom-176b"], monkeypatch, capsys)
    assert "--preset 'bloom-176b' is unknown; the nearest is bloom-176b-16gb" in said


def test_an_unknown_verb_is_refused_with_the_nearest(monkeypatch: Any, capsys: Any) -> None:
    assert "'froward' is no verb; the nearest is forward" in refused(
        ["config", "froward"], monkeypatch, capsys
    )


def test_presets_are_listed(monkeypatch: Any, capsys: Any) -> None:
    assert run(["config", "presets"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in preset_names())
    assert "model bigscience/bloom, ram 12GiB, chat context 512" in shown
    assert run(["config", "presets", "--json"], monkeypatch) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["presets"]] == preset_names()


def test_what_is_set_for_any_verb_is_shown(user_file: Path, monkeypatch: Any, capsys: Any) -> None:
    user_file.write_text("chat: {context: 300}\n")
    assert run(["config"], monkeypatch) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["chat", "context", "300", str(user_file)] in rows


DATA = '{"prompt": "Is the value returned?", "answer": " yes"}\n'


def test_a_recipe_gives_options_and_the_command_line_wins(
    user_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    user_file.write_text("tune: {steps: 7, tokens: 9}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_tokens: 3\nnum_epochs: 2\nlearning_rate: [0.1, 0.2]\ntop: null\nkind: deep\n")
    (tmp_path / "data.jsonl").write_text(DATA)
    command = [
        "tune", tmp_path / "data.jsonl", "--out", tmp_path / "out", "--recipe", recipe, "--tokens", 2, "--json",
    ]  # fmt: skip
    assert run(command, monkeypatch) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Two epochs of one example, for two rates: two steps each.
    assert [record["step"] for record in records] == [1, 1, 2, 2]
    kept = [
        json.loads((tmp_path / "out" / name / "slowllm.json").read_text()) for name in ("lr-0.1", "lr-0.2")
    ]
    assert [(one["num_tokens"], one["kind"]) for one in kept] == [(2, "deep")] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", "'learning_rat' is no field of a recipe; the nearest is learning_rate"),
        ("num_tokens: some", "tokens: Input should be a valid integer"),
        ("kind: 5", "kind '5' is unknown"),
    ],
)
def test_a_damaged_recipe_is_refused(
    text: str, words: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "data.jsonl").write_text(DATA)
    command = [
        "tune",
        tmp_path / "data.jsonl",
        "--out",
        tmp_path / "out",
        "--recipe",
        tmp_path / "recipe.yaml",
    ]
    assert words in refused(command, monkeypatch, capsys)
