"""What is done stays done: a job that was interrupted or killed goes on, gives the same bytes, and takes nobody else's."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slowllm.files import state_of
from slowllm.planning import host_plan
from slowllm.runtime.state import State
from tests.support.command_line import refused, run
from tests.support.likelihoods import BOOLQ, TEMPLATES, save
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes

HEADER = "The value is returned to the caller of the function. " * 6
SMALL = ["--dtype", "fp32", "--ram", "3GiB"]
# Of every verb several micro-batches and several sweeps are made.
COMMANDS = {
    "score": ["score", "{file}", "--per-token"],
    "yesno": ["yesno", "{file}", "--no", "not at all"],
    "generate": [
        "generate", "--prompts", "{file}", "--sample", "--seed", "7", "--log-probs", "2", "--max-new-tokens", "3",
    ],
    "eval": ["eval", "boolq", "--data", "{file}", "--template-file", "{templates}"],
    "forward": ["forward", "{file}"],
}  # fmt: skip
CODES = {"score": 1}  # for the line that is no JSON


def read_by(verb: str, num_texts: int) -> str:
    """Return what a verb reads."""
    # Half of the rows share a header, and so keys and values. The first are the longest, so that they are done first.
    texts = [
        f"{HEADER if n % 2 else ''}Is the value {n}{' and again' * (6 - n // 2)} returned"
        for n in range(num_texts)
    ]
    if verb == "score":
        choices = [" to the caller", " on the heap", " by"]
        pairs = [({"context": text, "choices": choices}, {"text": text[-40:]}) for text in texts]
        return "".join(json.dumps(row) + "\n" for pair in pairs for row in pair) + "no JSON\n"
    if verb == "eval":
        return "".join(json.dumps({**BOOLQ[n % 3], "passage": text}) + "\n" for n, text in enumerate(texts))
    return "\n".join(texts)


def command_of(verb: str, folder: Path, *options: Any, num_texts: int = 12) -> list[Any]:
    """Write what the verb reads into a folder, and return the command."""
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text(read_by(verb, num_texts))
    (folder / "t.yaml").write_text(TEMPLATES)
    names = {"file": folder / "in.jsonl", "templates": folder / "t.yaml"}
    return [*(word.format(**names) for word in COMMANDS[verb]), *SMALL, *options]


def long_but(*short: str) -> list[Any]:
    """Return all verbs as parameters; only those that are named are not marked as long."""
    return [verb if verb in short else pytest.param(verb, marks=pytest.mark.long) for verb in COMMANDS]


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches and sweeps of few tokens."""
    monkeypatch.setattr(host_plan, "MAX_RIDER_TOKENS", 64)
    monkeypatch.setattr(host_plan, "MAX_SWEEP_TOKENS", 192)


# Killed


@pytest.mark.parametrize(
    ("verb", "moment", "num_kills"),
    [
        ("score", "stops", 2),
        *(
            pytest.param(verb, moment, 20, marks=pytest.mark.long)
            for verb in COMMANDS
            for moment in ("stops", "writes")
        ),
    ],
)
def test_killed_at_many_moments_it_gives_the_same_bytes(
    verb: str, moment: str, num_kills: int, few_tokens: None, tmp_path: Path, processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = command_of(verb, tmp_path, num_texts=4 * num_kills + 16)
    killed = [*command, "--out", out, "--state", tmp_path / "state"]
    done = processes.run("-m", "tests.support.killed", moment, num_kills, 5, *killed)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])["codes"]
    assert codes == [-signal.SIGKILL] * num_kills + [CODES.get(verb, 0)], done.stderr
    assert run([*command, "--out", whole], monkeypatch) == CODES.get(verb, 0)
    assert out.read_bytes() == whole.read_bytes()


# Interrupted, without --state


def interrupted(command: list[Any], num_finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that gets Ctrl-C when it has saved so many micro-batches."""
    finish, num_left = State.finish, num_finished

    def finish_or_end(state: State, *result: Any) -> None:
        nonlocal num_left
        if not num_left:
            raise KeyboardInterrupt
        num_left -= 1
        finish(state, *result)

    with monkeypatch.context() as patch:
        patch.setattr(State, "finish", finish_or_end)
        assert run(command, monkeypatch) == 130


@pytest.mark.parametrize("verb", long_but("score"))
def test_an_interrupted_job_goes_on_from_its_partial_file(
    verb: str, few_tokens: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = command_of(verb, tmp_path)
    assert run([*command, "--out", whole], monkeypatch) == CODES.get(verb, 0)
    before = set(tmp_path.iterdir())
    capsys.readouterr()
    interrupted([*command, "--out", out], 6, monkeypatch)
    said = capsys.readouterr().err
    partial = tmp_path / "out.jsonl.part"
    assert f"the lines done so far are in {partial}, and the same command goes on from there" in said
    assert set(tmp_path.iterdir()) == {*before, partial, state_of(out)}
    lines = partial.read_bytes().splitlines(keepends=True)
    assert lines
    assert whole.read_bytes().startswith(b"".join(lines))
    with open(partial, "ab") as file:
        file.write(b'{"torn')
    assert run([*command, "--out", out], monkeypatch) == CODES.get(verb, 0)
    assert "6 micro-batches were done before" in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == whole.read_bytes()
    assert set(tmp_path.iterdir()) == {*before, out}


def test_lines_of_another_job_are_kept_until_asked_otherwise(
    few_tokens: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = command_of("yesno", tmp_path, "--out", out)
    interrupted(command, 6, monkeypatch)
    before = partial.read_bytes()
    assert before
    capsys.readouterr()
    bad = save(tmp_path / "bad.jsonl", ["no JSON"])
    for other, difference in (
        ([*command, "--yes", "sure"], r'yes was "yes" and is "sure"'),
        (["forward", tmp_path / "in.jsonl", *SMALL, "--out", out], "slowllm yesno, not forward"),
        (["score", bad, *SMALL, "--out", out], "slowllm yesno, not score"),
    ):
        sentence = refused(other, monkeypatch, capsys)
        assert f"{partial}: has lines of another job that was not finished ({difference})" in sentence
        assert sentence.endswith("or begin anew with --overwrite")
        assert partial.read_bytes() == before
    new = [*command, "--state", tmp_path / "new"]
    assert f"({tmp_path / 'new'} has none of them)" in refused(new, monkeypatch, capsys)
    shutil.rmtree(state_of(out))
    assert "(which one is not known)" in refused(command, monkeypatch, capsys)
    assert partial.read_bytes() == before
    assert run([*command, "--yes", "sure", "--overwrite"], monkeypatch) == 0
    assert json.loads(out.read_text().splitlines()[0])["answer"] in ("sure", "not at all")
    assert not partial.exists()
    assert not state_of(out).exists()


def test_what_was_left_of_a_finished_job_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with State(state_of(out), {"kind": "score", "dtype": "float32"}) as state:
        state.finish(0, "of a job whose file has its name")
    assert run(command_of("yesno", tmp_path, "--out", out), monkeypatch) == 0
    assert len(out.read_text().splitlines()) == 12
    assert not state_of(out).exists()


# With --state


@pytest.mark.parametrize("verb", long_but("score", "yesno"))
def test_any_number_of_finished_micro_batches_leads_to_the_same_bytes(
    verb: str, few_tokens: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, results = tmp_path / "out.jsonl", tmp_path / "state" / "results.jsonl"
    command = command_of(verb, tmp_path, "--out", out, "--state", tmp_path / "state")
    assert run(command, monkeypatch) == CODES.get(verb, 0)
    whole, saved = out.read_bytes(), results.read_bytes().splitlines(keepends=True)
    assert len(saved) > 7
    printed = capsys.readouterr().out
    for kept in (saved[: len(saved) // 2], saved[3:7]):
        results.write_bytes(b"".join(kept))
        assert run(command, monkeypatch) == CODES.get(verb, 0)
        assert out.read_bytes() == whole
        assert capsys.readouterr().out == printed
        # The others were done again, in another order where keys and values are shared.
        assert sorted(results.read_bytes().splitlines(keepends=True)) == sorted(saved)


def change_model(folder: Path) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.1}))


def change_tokenizer(folder: Path) -> None:
    with open(folder / "model" / "tokenizer_config.json", "a") as file:
        file.write("\n")


def change_lines(folder: Path) -> None:
    file = folder / "in.jsonl"
    file.write_text(file.read_text().replace("value 3", "value three"))


def change_templates(folder: Path) -> None:
    (folder / "t.yaml").write_text(TEMPLATES.replace("{{ passage }} {{ question }}?", "{{ question }}"))


def change_nothing(folder: Path) -> None:
    pass


CHANGES: dict[str, list[tuple[Callable[[Path], None], list[str], str]]] = {
    "score": [
        (change_nothing, ["--normalize", "tokens"], 'normalize was "none" and is "tokens"'),
        (change_nothing, ["--dtype", "bf16"], 'dtype was "float32" and is "bfloat16"'),
        (change_lines, [], "other lines"),
        (change_tokenizer, [], "other tokenizer"),
    ],
    "yesno": [
        (
            change_nothing,
            ["--template", "{question}"],
            r'template was "Question: {question}\nAnswer:" and is',
        ),
        (change_nothing, ["--no", "never"], 'no was "not at all" and is "never"'),
        (change_model, [], "other model"),
    ],
    "generate": [
        (change_nothing, ["--seed", "8"], "seed was 7 and is 8"),
        (change_nothing, ["--max-new-tokens", "4"], "max_new_tokens was 3 and is 4"),
        (change_lines, [], "other prompts"),
    ],
    "eval": [
        (change_nothing, ["--limit", "3"], "limit was null and is 3"),
        (change_nothing, ["--truncate"], "truncate was false and is true"),
        (change_templates, [], "other templates"),
        (change_lines, [], "other questions"),
    ],
}


@pytest.mark.parametrize("verb", CHANGES)
def test_another_job_is_refused_by_what_differs(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(TINY_BLOOM, tmp_path / "model")
    command = command_of(verb, tmp_path, "--model", tmp_path / "model", "--state", tmp_path / "state")
    assert run(command, monkeypatch) == CODES.get(verb, 0)
    capsys.readouterr()
    for change, options, difference in CHANGES[verb]:
        change(tmp_path)
        assert f"another job ({difference}" in refused([*command, *options], monkeypatch, capsys)
        command_of(verb, tmp_path)
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(TINY_BLOOM, tmp_path / "model")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert 'ONEDNN_MAX_CPU_ISA was null and is "AVX2"' in refused(command, monkeypatch, capsys)


def test_an_interrupt_without_a_file_says_how_to_go_on(
    few_tokens: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = command_of("yesno", tmp_path, "--state", tmp_path / "state")
    interrupted(command, 2, monkeypatch)
    said = capsys.readouterr()
    assert "slowllm: interrupted; the same command goes on from there\n" in said.err
    assert run(command, monkeypatch) == 0
    assert capsys.readouterr().out.startswith(said.out)


@pytest.mark.parametrize("draft", ["lookup", str(TINY_BLOOM.parent / "tiny-bloom-draft")])
def test_drafts_go_on_as_well(
    draft: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    results = tmp_path / "state" / "results.jsonl"
    words = ["generate", "The value is", "Return the number", "On the heap", *SMALL, "--max-new-tokens", "4"]
    assert run([*words, "--state", tmp_path / "state", "--draft", draft], monkeypatch) == 0
    whole = capsys.readouterr().out
    results.write_bytes(results.read_bytes().splitlines(keepends=True)[0])
    assert run([*words, "--state", tmp_path / "state", "--draft", draft], monkeypatch) == 0
    assert capsys.readouterr().out == whole
    assert "another job (draft was" in refused([*words, "--state", tmp_path / "state"], monkeypatch, capsys)


def test_a_chat_that_names_the_time_of_day_is_the_same_when_resumed(
    few_tokens: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, out, state = tmp_path / "model", tmp_path / "out.jsonl", tmp_path / "state"
    shutil.copytree(TINY_BLOOM, model)
    (model / "chat_template.jinja").write_text(
        "At {{ strftime_now('%S.%f') }} {% for m in messages %}{{ m.content }} {% endfor %}"
    )
    body = {"messages": [{"role": "user", "content": "the value is"}], "max_tokens": 2, "logprobs": True}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    file = save(tmp_path / "in.jsonl", [{**request, "custom_id": f"r{n}"} for n in range(4)])
    command = ["batch", file, "--model", model, *SMALL, "--out", out, "--state", state]
    assert run(command, monkeypatch) == 0
    whole, saved = out.read_bytes(), (state / "results.jsonl").read_bytes().splitlines(keepends=True)
    (state / "results.jsonl").write_bytes(saved[0])
    assert run(command, monkeypatch) == 0
    assert out.read_bytes() == whole
    # Without the rendered prompts nobody can tell what was asked.
    capsys.readouterr()
    (state / "inputs.json").unlink()
    assert "another job (other prompts" in refused(command, monkeypatch, capsys)
    with open(model / "chat_template.jinja", "a") as template:
        template.write("!")
    assert "another job (other tokenizer" in refused(command, monkeypatch, capsys)
