"""lm-eval with a streamed model: the same figures as its own `hf` model, sample by sample, in few sweeps."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

import slowllm
from slowllm.entrypoints import lm_eval_model, lm_eval_run
from slowllm.errors import InputError
from tests.support.cases import quick_and_long
from tests.support.lm_eval_tasks import (
    HEADER,
    QUESTIONS,
    assert_same,
    evaluate,
    rows_in,
    save_llama,
    tasks_of,
)
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a tokenizer that puts BOS before a text, as Llama's does, and takes 64 tokens."""
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return what a task's config needs to read rows of its own."""
    return rows_in(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def tasks(rows: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """One task of each kind of request."""
    return tasks_of(rows)


@pytest.mark.parametrize(
    "kind",
    quick_and_long(
        ["bloom", "llama", "llama with BOS off", "llama after its own prefix"],
        quick=["bloom", "llama with BOS off"],
    ),
)
def test_every_kind_of_request_equals_hf(kind: str, llama: Path, tasks: list[dict[str, Any]]) -> None:
    folder = TINY_BLOOM if kind == "bloom" else llama
    same = {"pretrained": str(folder)}
    if kind == "llama with BOS off":
        same |= {"add_bos_token": False, "max_length": 40}
    if kind == "llama after its own prefix":
        same |= {"prefix_token_id": 7, "add_bos_token": True}
    theirs = evaluate("hf", tasks, model_args={**same, "dtype": "float32"}, device="cpu", batch_size=1)
    ours = evaluate("slowllm", tasks, model_args={**same, "dtype": "fp32", "ram": "4GiB"}, batch_size="auto")
    assert_same(ours, theirs)
    assert ours["config"]["model_dtype"] == "torch.float32"


def test_arguments_come_as_a_string(tasks: list[dict[str, Any]]) -> None:
    arguments = f"pretrained={TINY_BLOOM},ram=4GiB,dtype=fp32"
    found = evaluate("slowllm", tasks[:1], model_args=arguments, device="cpu", batch_size=4, max_batch_size=8)
    assert "acc,none" in found["results"]["choices"]


def test_chat_templates_equal_hf(llama: Path, tasks: list[dict[str, Any]]) -> None:
    options = {"apply_chat_template": True, "system_instruction": "Be brief."}
    both = [tasks[0], tasks[3]]
    theirs = evaluate(
        "hf", both, model_args={"pretrained": str(llama), "dtype": "float32"}, device="cpu", **options
    )
    ours = evaluate("slowllm", both, model_args={"pretrained": str(llama), "dtype": "fp32"}, **options)
    assert_same(ours, theirs)
    context = ours["samples"]["choices"][0]["arguments"][0][0]
    assert context.startswith("<s>user: ")  # the system's role is left out, which this template refuses


@pytest.mark.parametrize("end", ["e", pytest.param(40, marks=pytest.mark.long)])
def test_thinking_is_cut_off(end: str | int, llama: Path, tasks: list[dict[str, Any]]) -> None:
    arguments = {"pretrained": str(llama), "think_end_token": end}
    theirs = evaluate("hf", tasks[4:], model_args={**arguments, "dtype": "float32"}, device="cpu")
    ours = evaluate("slowllm", tasks[4:], model_args={**arguments, "dtype": "fp32"})
    mine, others = (
        [sample["resps"][0][0] for sample in found["samples"]["free"]] for found in (ours, theirs)
    )
    assert mine == others


@pytest.fixture
def model(llama: Path) -> Iterator[lm_eval_model.SlowLM]:
    model = lm_eval_model.SlowLM(str(llama), dtype="fp32", ram="4GiB")
    yield model
    model.close()


def test_samples_are_seeded_and_differ(
    model: lm_eval_model.SlowLM, rows: Callable[..., dict[str, Any]]
) -> None:
    task = {
        **rows(QUESTIONS[:2], "drawn"), "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}], "repeats": 3,
        "generation_kwargs": {"max_gen_toks": 8, "temperature": 0.9, "top_p": 0.95, "until": []},
    }  # fmt: skip
    first, second = (evaluate(model, [task])["samples"]["drawn"] for _ in range(2))
    assert [sample["resps"] for sample in first] == [sample["resps"] for sample in second]
    assert len(set(first[0]["resps"][0])) > 1


def test_questions_with_a_header_share_two_sweeps(rows: Callable[..., dict[str, Any]]) -> None:
    questions = [{"question": f"Does number {n} return the value", "label": n % 2} for n in range(200)]
    task = {
        **rows(questions, "many"), "output_type": "multiple_choice", "doc_to_text": HEADER * 3 + "{{question}}?",
        "doc_to_choice": ["no", "yes"], "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    model = lm_eval_model.SlowLM(str(TINY_BLOOM), dtype="fp32", ram="4GiB")
    found = evaluate(model, [task])
    assert len(found["samples"]["many"]) == 200
    assert model.lm is not None
    assert model.lm.report.num_passages / model.lm.num_stops <= 2
    model.close()
    assert model.lm is None


def test_a_loaded_model_is_used_as_it_is(tasks: list[dict[str, Any]]) -> None:
    with slowllm.load(TINY_BLOOM, dtype="fp32") as lm:
        model = lm_eval_model.SlowLM(lm)
        evaluate(model, [tasks[0], tasks[3]])
        assert model.lm is lm
        assert lm.report.num_passages > 0
        model.close()
        assert lm.ride([lambda: 1]) == [1]  # still open


def test_exact_is_an_argument(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def open_model(*args: Any, **options: Any) -> None:
        seen.append(options["exact"])
        raise InputError("seen")

    monkeypatch.setattr(lm_eval_model, "open_model", open_model)
    for more in ("", ",exact=True", ",exact=False"):
        model = lm_eval_model.SlowLM.create_from_arg_string(f"pretrained={llama},dtype=fp32{more}")
        with pytest.raises(InputError, match="seen"):
            model.loglikelihood([instance("loglikelihood", ("A value", " the"))])
    assert seen == [True, True, False]
    with (
        slowllm.load(llama, dtype="fp32") as lm,
        pytest.raises(InputError, match="a loaded model has its own choice of exact; give it to load"),
    ):
        lm_eval_model.SlowLM(lm, exact=False)


def test_a_model_is_opened_anew_only_for_more(model: lm_eval_model.SlowLM) -> None:
    def ask(text: str) -> Any:
        return model.loglikelihood([instance("loglikelihood", (text, " the"))])

    ask("A value of the caller is returned")
    opened = model.lm
    ask("A value")
    assert model.lm is opened
    ask("A value of the caller is returned. " * 2)
    assert model.lm is not opened


def instance(kind: str, arguments: tuple[Any, ...]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_results_are_cached_as_they_come(llama: Path, tasks: list[dict[str, Any]], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = evaluate(
        "slowllm", tasks, model_args={"pretrained": str(llama), "dtype": "fp32"}, use_cache=cache
    )
    model = lm_eval_model.SlowLM(str(llama))
    second = evaluate(model, tasks, use_cache=cache)
    assert model.lm is None  # never opened
    assert_same(second, first)
    assert (tmp_path / "cache_rank0.db").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"peft": "x"}, "slowllm's model has no argument peft"),
        ({"trust_remote_code": True}, "remote code is never run"),
        ({"enable_thinking": True}, "needs think_end_token"),
        ({"dtype": "fp8"}, "dtype 'fp8' is unknown"),
        ({"pretrained": "./nowhere"}, "no such folder"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(slowllm.SlowLLMError, match=match):
        lm_eval_model.SlowLM(**{"pretrained": str(TINY_BLOOM), **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"min_p": 0.1}, "generation option min_p is not supported"),
        ({"max_gen_toks": 64}, "leaves no room for a prompt: the model takes 64 tokens"),
        (
            {"max_gen_toks": 2, "do_sample": True, "temperature": 0.0},
            "temperature must be a number of at least 0.0001",
        ),
    ],
)
def test_generation_that_cannot_be_done_is_refused(
    model: lm_eval_model.SlowLM, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        model.generate_until([instance("generate_until", ("The value", options))])
    assert model.lm is None


def test_likelihoods_that_cannot_be_had_are_refused(model: lm_eval_model.SlowLM, llama: Path) -> None:
    for continuation, count in ((" value" * 100, "tokens of what is to be scored"), ("", "makes 0 tokens")):
        with pytest.raises(InputError, match=count):
            model.loglikelihood([instance("loglikelihood", ("The", continuation))])
    before = lm_eval_model.SlowLM(str(llama), prefix_token_id=999)
    with pytest.raises(InputError, match="token 999 is beyond the model's vocabulary of 307"):
        before.loglikelihood([instance("loglikelihood", ("", "The"))])
    thinking = lm_eval_model.SlowLM(str(llama), enable_thinking=True, think_end_token="</think>")
    with pytest.raises(InputError, match="this one compares likelihoods"):
        thinking.loglikelihood([])


def test_nothing_asked_is_nothing_opened(model: lm_eval_model.SlowLM) -> None:
    assert model.loglikelihood([]) == []
    assert model.loglikelihood_rolling([]) == []
    assert model.generate_until([]) == []
    assert model.loglikelihood_rolling([instance("loglikelihood_rolling", ("The value",))])[0] < 0


def test_a_damaged_generation_config_is_named(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json: cannot be read"):
        lm_eval_model.SlowLM(str(tmp_path))


@pytest.mark.long
def test_defaults_of_the_checkpoint_hold_for_what_a_task_leaves_open(
    llama: Path, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    own = tmp_path / "generation_config.json"
    before = json.loads(own.read_text())
    own.unlink()
    own.write_text(json.dumps({**before, "do_sample": True, "temperature": 0.6, "repetition_penalty": 3.0}))
    results = {}
    for folder in (llama, tmp_path):
        for name, dtype in (("hf", "float32"), ("slowllm", "fp32")):
            device = {"device": "cpu"}
            found = evaluate(
                name, tasks[4:], model_args={"pretrained": str(folder), "dtype": dtype}, **device
            )
            results[folder, name] = [sample["resps"] for sample in found["samples"]["free"]]
    assert results[llama, "hf"] == results[llama, "slowllm"]
    assert results[tmp_path, "hf"] == results[tmp_path, "slowllm"]
    assert results[llama, "hf"] != results[tmp_path, "hf"]


def test_the_command_line_is_lm_evals(
    tasks: list[dict[str, Any]], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**tasks[0], "task": "mine"}))
    out, before = tmp_path / "out", list(sys.argv)
    model_args = f"pretrained={TINY_BLOOM},ram=4GiB,dtype=fp32"
    lm_eval_run.main(
        ["--tasks", str(tmp_path / "mine.yaml"), "--model_args", model_args, "--output_path", str(out)]
    )
    assert sys.argv == before
    assert "|mine" in capsys.readouterr().out
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text())
    assert "acc,none" in found["results"]["mine"]
    assert found["config"]["model"] == "slowllm"
    with pytest.raises(InputError, match=r"lm-eval: Tasks not found: nothing"):
        lm_eval_run.main(["run", "--tasks", "nothing", "--model_args", model_args])
    with pytest.raises(SystemExit):
        lm_eval_run.main(["--help"])
    assert "lm-eval run" in capsys.readouterr().out


def test_it_runs_as_a_module(tmp_path: Path, processes: Processes) -> None:
    done = processes.run("-m", "slowllm.harness", "run", "--config", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "slowllm: lm-eval: Config file not found" in done.stderr
    assert "Traceback" not in done.stderr
