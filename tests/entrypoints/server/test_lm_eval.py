"""lm-eval, as it is, against the server: the figures of its own `hf` model and of slowllm's, sample by sample."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import slowllm.entrypoints.lm_eval_model  # noqa: F401 (registers slowllm's model)
from tests.support.api_server import ApiServer, api_server
from tests.support.lm_eval_tasks import QUESTIONS, assert_same, evaluate, rows_in, save_llama, tasks_of
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes

pytestmark = pytest.mark.long

# What a row may have so that some are cut; the API's model counts the token that it asks for behind the row, and leaves
# out another.
LENGTH = 40
API_LENGTH = LENGTH + 2


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return tasks_of(rows_in(tmp_path_factory.mktemp("rows")))


@pytest.fixture(scope="module", params=["bloom", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bloom":
        return TINY_BLOOM
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, processes: Processes) -> Iterator[ApiServer]:
    with api_server(processes, folder) as started:
        yield started


def arguments(server: ApiServer, folder: Path, path: str, **more: Any) -> dict[str, Any]:
    return {"model": str(folder), "base_url": f"{server.url}/{path}", "max_retries": 1, **more}


def evaluated(
    folder: Path, tasks: list[dict[str, Any]], max_length: int, **options: Any
) -> Iterator[dict[str, Any]]:
    """Yield what lm-eval's own model and slowllm's give."""
    same = {"pretrained": str(folder), "max_length": max_length, **options.pop("model_args", {})}
    yield evaluate(
        "hf", tasks, model_args={**same, "dtype": "float32"}, device="cpu", batch_size=1, **options
    )
    yield evaluate("slowllm", tasks, model_args={**same, "dtype": "fp32", "ram": "4GiB"}, **options)


@pytest.mark.parametrize(
    "more", [{}, {"num_concurrent": 8}, {"batch_size": 3}, {"tokenized_requests": False}]
)
def test_likelihoods_are_the_same(
    more: dict[str, Any], server: ApiServer, folder: Path, tasks: list[dict[str, Any]]
) -> None:
    asked = tasks[:3]
    if more == {"tokenized_requests": False}:
        if folder != TINY_BLOOM:
            pytest.skip(
                "BOS is put before a text, which lm-eval does not count; it asks by token ids by default"
            )
        # Texts that are cut would be tokenized otherwise.
        asked = [tasks[0]]
    ours = evaluate(
        "local-completions", asked,
        model_args={**arguments(server, folder, "completions"), "max_length": API_LENGTH, **more},
    )  # fmt: skip
    for theirs in evaluated(folder, asked, LENGTH, model_args={"add_bos_token": False}):
        assert_same(ours, theirs)


@pytest.mark.parametrize("more", [{}, {"num_concurrent": 8}, {"batch_size": 3}])
def test_generated_texts_are_the_same(
    more: dict[str, Any], server: ApiServer, folder: Path, tasks: list[dict[str, Any]]
) -> None:
    greedy = {**tasks[4], "generation_kwargs": {"max_gen_toks": 12, "do_sample": False, "until": []}}
    # Of stop strings that overlap, `hf` cuts at the one that is listed first; an API, where the first begins.
    until = {**tasks[3], "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 9}}
    asked = [until, greedy]
    ours = evaluate(
        "local-completions", asked,
        model_args={**arguments(server, folder, "completions"), "max_length": API_LENGTH, **more},
    )  # fmt: skip
    for theirs in evaluated(folder, asked, LENGTH + 1, model_args={"add_bos_token": False}):
        assert_same(ours, theirs)


@pytest.mark.parametrize("num_concurrent", [1, 8])
def test_chats_are_the_same(
    num_concurrent: int, server: ApiServer, folder: Path, tasks: list[dict[str, Any]]
) -> None:
    if folder == TINY_BLOOM:
        pytest.skip("it has no chat template")
    greedy = {**tasks[4], "generation_kwargs": {"max_gen_toks": 12, "do_sample": False, "until": ["re"]}}
    ours = evaluate(
        "local-chat-completions", [greedy], apply_chat_template=True,
        model_args=arguments(server, folder, "chat/completions", num_concurrent=num_concurrent),
    )  # fmt: skip
    for theirs in evaluated(folder, [greedy], 64, apply_chat_template=True):
        assert [one["resps"] for one in ours["samples"]["free"]] == [
            one["resps"] for one in theirs["samples"]["free"]
        ]


def test_its_command_line_runs(
    server: ApiServer, folder: Path, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "choices.yaml").write_text(yaml.safe_dump(tasks[0]))
    given = ",".join(f"{name}={value}" for name, value in arguments(server, folder, "completions").items())
    ended = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", given,
            "--tasks", "choices", "--include_path", tmp_path, "--output_path", tmp_path / "out",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (found,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(found.read_text())["n-samples"]["choices"]["effective"] == len(QUESTIONS)
