"""--device and --vram reach `open_model` from every verb, and what cannot be is refused before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import slowllm
from slowllm.entrypoints.cli.app import app
from slowllm.errors import InputError
from slowllm.runtime import load, survey
from slowllm.tuning import session
from tests.support.paths import TINY_BLOOM

TEXT = "A cat sat."


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    contents = {
        "lines": TEXT + "\n",
        "scores": '{"context": "A cat", "choices": [" sat", " ran"]}\n',
        "boolq": '{"question": "is it so", "passage": "It is so.", "answer": true}\n',
        "batch": '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "A"}}\n',
    }
    found = {name: tmp_path / f"{name}.{'txt' if name == 'lines' else 'jsonl'}" for name in contents}
    for name, text in contents.items():
        found[name].write_text(text)
    return {**{name: str(path) for name, path in found.items()}, "out": str(tmp_path / "out")}


VERBS: dict[str, list[str]] = {
    "forward": ["{lines}"],
    "score": ["{scores}"],
    "yesno": ["{lines}"],
    "generate": [TEXT],
    "batch": ["{batch}"],
    "chat": [],
    "tune": ["{lines}", "--out", "{out}"],
    "plan": [str(TINY_BLOOM)],
    "eval boolq": ["--data", "{boolq}"],
}


def invoke(verb: str, files: dict[str, str], *options: str) -> Any:
    arguments = [argument.format(**files) for argument in VERBS[verb]]
    return CliRunner().invoke(app, [*verb.split(), *arguments, *options])


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_reach_load(verb: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []

    def open_model(*args: Any, **options: Any) -> None:
        seen.append((options.get("device"), options.get("vram")))
        raise InputError("seen")

    for module in (load, survey, session):  # the verbs import it where they call it
        monkeypatch.setattr(module, "open_model", open_model)
    result = invoke(verb, files, "--device", "cuda:1", "--vram", "3GiB", "--dtype", "fp32")
    assert str(result.exception) == "seen", (result.output, result.exception)
    assert seen == [("cuda:1", "3GiB")]


@pytest.mark.parametrize("verb", VERBS)
def test_what_cannot_be_is_refused(verb: str, files: dict[str, str]) -> None:
    for options, message in (
        (
            ("--device", "tpu"),
            "device 'tpu' is unknown; use cpu, cuda, cuda:1, or several as in cuda:0,cuda:1",
        ),
        (("--vram", "1GiB"), "--vram is for a GPU; name one with --device cuda, or leave it out"),
        (("--device", "cuda", "--vram", "much"), "'much' is not a size; write it like 16GiB, 500MB or 8g"),
    ):
        result = invoke(verb, files, *options)
        assert isinstance(result.exception, InputError), result.output
        assert str(result.exception) == message


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"device cuda:0 cannot be used: this torch .*; use cpu"):
        slowllm.load(TINY_BLOOM, device="cuda")
    with pytest.raises(InputError, match="a vram budget is for a GPU"):
        slowllm.load(TINY_BLOOM, vram="1GiB")
