"""Batches of requests: the answers of plain transformers, the lines of OpenAI's format, and no work done twice."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.entrypoints import openai_batch, openai_responses
from slowllm.entrypoints.cli import app
from slowllm.entrypoints.openai_requests import Refusal, Request, read_requests
from slowllm.errors import NonFiniteError, StateError
from slowllm.runtime.state import State
from tests.support.families import save_tiny, speaking
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes

NUM_KILLS = 3
# fp32, and logits of about 10: two orders of a sum differ by a few units of the last place.
TOLERANCE = 1e-5
PROMPTS = [
    "The value is",
    "A function returns",
    "On the right is the memory on the heap that holds the contents of",
]


@pytest.fixture(scope="module")
def lm() -> Iterator[slowllm.StreamedLM]:
    with slowllm.load(TINY_BLOOM, dtype="fp32", keep_resident=False, poison=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_BLOOM, dtype=torch.float32)


def line(custom_id: Any, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def read(lm: slowllm.StreamedLM, *lines: Any) -> list[Request | Refusal]:
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    return read_requests(lm, enumerate(texts, 1))


def done(lm: slowllm.StreamedLM, *lines: Any) -> list[dict[str, Any]]:
    entries = read(lm, *lines)
    return list(openai_batch.answer(lm, entries, openai_batch.describe(lm, entries)))


def body_of(row: dict[str, Any]) -> dict[str, Any]:
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    return row["response"]["body"]


def texts_of(row: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body_of(row)["choices"]]


def expected(
    lm: Any, plain: Any, prompt: str, max_tokens: int, seed: int = 0, **sampling: Any
) -> list[list[int]]:
    """Return what plain transformers continues a prompt with, EOS left out."""
    ids = lm.tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    found = plain.generate(**ids, max_new_tokens=max_tokens, **sampling)[:, ids["input_ids"].shape[1] :]
    return [[token for token in row if token not in (2, 3)] for row in found.tolist()]


def test_greedy_answers_and_their_log_probabilities_are_those_of_transformers(lm: Any, plain: Any) -> None:
    before = lm.report.num_passages
    rows = done(
        lm,
        *(
            line(f"r{n}", prompt=prompt, max_tokens=4 + n, temperature=0, logprobs=3)
            for n, prompt in enumerate(PROMPTS)
        ),
    )
    # All requests share the sweeps, whatever they ask for: one for each token of the longest.
    assert lm.report.num_passages - before <= (4 + len(PROMPTS) - 1) * lm.num_stops
    for n, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        [new] = expected(lm, plain, prompt, 4 + n, do_sample=False)
        [choice] = body_of(row)["choices"]
        assert choice["text"] == lm.tokenizer.decode(new)
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(new))]
        ids = lm.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = plain(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
        reference = logits.log_softmax(-1)
        assert found["token_logprobs"] == pytest.approx(
            reference[range(len(new)), new].tolist(), abs=TOLERANCE
        )
        for tops, place in zip(found["top_logprobs"], reference, strict=True):
            best = place.topk(3)
            assert list(tops) == [lm.tokenizer.decode([token]) for token in best.indices.tolist()]
            assert list(tops.values()) == pytest.approx(best.values.tolist(), abs=TOLERANCE)


def test_drawn_answers_are_those_of_transformers_with_the_same_seed(lm: Any, plain: Any) -> None:
    settings = {"temperature": 0.8, "top_p": 0.9}
    row, other = done(
        lm,
        line("a", prompt=PROMPTS[:2], max_tokens=8, n=3, seed=5, **settings),
        line("b", prompt=PROMPTS[1], max_tokens=8, n=3, seed=6, **settings),
    )
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, **settings}
    reference = [
        lm.tokenizer.decode(new)
        for seed, prompt in ((5, PROMPTS[0]), (6, PROMPTS[1]))
        for new in expected(lm, plain, prompt, 8, seed, **sampling)
    ]
    assert texts_of(row) == reference
    assert len(set(reference)) > 3
    assert [choice["index"] for choice in body_of(row)["choices"]] == list(range(6))
    # A list's prompts count on from its seed.
    assert texts_of(other) == reference[3:]


def test_a_seed_is_made_of_the_custom_id(lm: Any) -> None:
    request = functools.partial(line, prompt=PROMPTS[0], max_tokens=8)
    a, b = done(lm, request("a"), request("b"))
    [alone] = done(lm, request("a"))
    assert alone["response"]["body"]["choices"] == a["response"]["body"]["choices"]
    assert alone["id"] == a["id"]
    assert texts_of(a) != texts_of(b)
    # The default is that of OpenAI: the same as asking for temperature 1 and all of the distribution.
    assert read(lm, request("a", temperature=1, top_p=1))[0].prompts == read(lm, request("a"))[0].prompts


def test_without_sampling_every_choice_is_the_same(lm: Any) -> None:
    [row] = done(lm, line("a", prompt=PROMPTS[0], max_tokens=4, temperature=0, n=3))
    body = body_of(row)
    assert len(set(texts_of(row))) == 1
    assert len(body["choices"]) == 3
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_an_answer_ends_before_a_stop_string(lm: Any) -> None:
    request = functools.partial(line, prompt=PROMPTS[0], max_tokens=12, temperature=0, logprobs=0)
    whole, cut, inside = done(
        lm, request("a"), request("b", stop=" of the v"), request("c", stop=["zzz", "alu"])
    )
    [text] = texts_of(whole)
    for row, stop in ((cut, " of the v"), (inside, "alu")):
        [choice] = body_of(row)["choices"]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
        # Tokens that the stop string took away are not told of; one that it cut is.
        tokens = choice["logprobs"]["tokens"]
        assert "".join(tokens).startswith(choice["text"])
        assert len("".join(tokens[:-1])) < len(choice["text"])
    assert body_of(whole)["choices"][0]["finish_reason"] == "length"


def test_prompts_may_be_token_ids_and_be_echoed(lm: Any) -> None:
    ids = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    settings = {"max_tokens": 3, "temperature": 0, "echo": True}
    rows = done(
        lm,
        line("a", prompt=PROMPTS[:2], **settings),
        line("b", prompt=ids, **settings),
        line("c", prompt=ids[0], **settings),
    )
    assert texts_of(rows[0]) == texts_of(rows[1])
    assert texts_of(rows[2]) == texts_of(rows[0])[:1]
    assert all(text.startswith(prompt) for text, prompt in zip(texts_of(rows[0]), PROMPTS, strict=False))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_has_the_log_probabilities_of_the_prompt(max_tokens: int, lm: Any, plain: Any) -> None:
    request = functools.partial(line, max_tokens=max_tokens, temperature=0, echo=True, logprobs=2)
    before = lm.report.num_passages
    rows = done(
        lm,
        *(request(f"r{n}", prompt=prompt) for n, prompt in enumerate(PROMPTS)),
        line("a", **GOOD, max_tokens=1),
    )
    assert lm.report.num_passages - before <= 2 * lm.num_stops
    for row, prompt in zip(rows, PROMPTS, strict=False):
        ids = lm.tokenizer(prompt)["input_ids"]
        [new] = expected(lm, plain, prompt, 1, do_sample=False) if max_tokens else [[]]
        [choice] = body_of(row)["choices"]
        assert choice["text"] == prompt + lm.tokenizer.decode(new)
        with torch.no_grad():
            reference = plain(torch.tensor([ids + new])).logits[0].log_softmax(-1)
        wanted = reference[range(len(ids + new) - 1), (ids + new)[1:]].tolist()
        assert choice["logprobs"]["token_logprobs"] == [
            None,
            *(pytest.approx(one, abs=TOLERANCE) for one in wanted),
        ]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert body_of(row)["usage"]["completion_tokens"] == len(new)
    assert body_of(rows[-1])["choices"][0]["logprobs"] is None


def test_chats_go_through_the_chat_template(lm: Any, plain: Any, monkeypatch: Any) -> None:
    template = "{% for m in messages %}{{ m.role }} says {{ m.content }} {% endfor %}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    parts = [{"type": "text", "text": "the value"}, {"type": "text", "text": " is"}]
    messages = [{"role": "system", "content": "that"}, {"role": "user", "content": parts}]
    chat = functools.partial(line, url="/v1/chat/completions", messages=messages, temperature=0)
    [row] = done(lm, chat("a", max_completion_tokens=6, logprobs=True, top_logprobs=2))
    body = body_of(row)
    assert body["object"] == "chat.completion"
    [new] = expected(lm, plain, "system says that user says the value is ", 6, do_sample=False)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": lm.tokenizer.decode(new), "refusal": None}
    found = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in found) == choice["message"]["content"]
    assert bytes(b for token in found for b in token["bytes"]).decode() == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in found)
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in found)
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ raise_exception('no systems here') }}")
    [refusal] = read(lm, chat("a"))
    assert "chat template refuses the messages (no systems here)" in refusal.message


GOOD = {"prompt": "The value"}
BAD = [
    ("[1]", "invalid_json_line", "line 1: is JSON but no object"),
    ('{"custom_id": "a"', "invalid_json_line", "line 1: is not JSON"),
    ('{"custom_id": "\\ud800"}', "invalid_json_line", "half of a surrogate pair"),
    ('{"custom_id": "a", "body": {"seed": NaN}}', "invalid_json_line", "NaN is no number"),
    ("[" * 100_000, "invalid_json_line", "nested too deeply"),
    ({"method": "POST"}, "missing_required_parameter", "has no custom_id"),
    ({**line(3), "body": GOOD}, "missing_required_parameter", "has no custom_id"),
    ({**line("a"), "method": "GET"}, "invalid_method", 'must be POST, not "GET"'),
    ({**line("a"), "url": "/v1/embeddings"}, "invalid_url", "url must be /v1/completions or /v1/chat"),
    ({**line("a"), "body": "hi"}, "invalid_request", 'body must be an object, not "hi"'),
    ({**line("a", **GOOD), "priority": 1}, "unknown_parameter", "priority: no such field"),
    (line("a"), "invalid_value", "prompt must be a string"),
    (line("a", prompt=[]), "invalid_value", "prompt must be a string"),
    (line("a", prompt=[1, "b"]), "invalid_value", "prompt must be a string"),
    (line("a", prompt=[True]), "invalid_value", "prompt must be a string"),
    (line("a", prompt=""), "invalid_value", "the prompt is empty"),
    (line("a", prompt=["x", ""]), "invalid_value", "the prompt is empty"),
    (line("a", prompt=[4096]), "invalid_value", "token 4096 is not one of the model's 4096"),
    (line("a", prompt=[1] * 2048), "context_length_exceeded", "has 2,048 tokens and is to get 16 more"),
    (line("a", **GOOD, max_tokens=2048), "context_length_exceeded", "the model takes 2048"),
    (line("a", **GOOD, max_tokens=0), "invalid_value", "max_tokens must be a whole number of at least 1, not 0"),
    (line("a", **GOOD, max_tokens=1.5), "invalid_value", "max_tokens must be a whole number"),
    (line("a", **GOOD, max_tokens=True), "invalid_value", "max_tokens must be a whole number"),
    (line("a", **GOOD, temperature=3), "invalid_value", "temperature must be a number from 0 to 2, not 3"),
    (line("a", **GOOD, temperature="hot"), "invalid_value", 'temperature must be a number from 0 to 2, not "hot"'),
    (line("a", **GOOD, top_p=0), "invalid_value", "top_p must be above 0"),
    (line("a", **GOOD, n=0), "invalid_value", "n must be a whole number from 1 to 128"),
    (line("a", **GOOD, seed=-1), "invalid_value", "seed must be a whole number from 0"),
    (line("a", **GOOD, logprobs=6), "invalid_value", "logprobs must be a whole number from 0 to 5"),
    (line("a", **GOOD, logprobs=True), "invalid_value", "logprobs must be a whole number from 0 to 5"),
    (line("a", **GOOD, stop=[""]), "invalid_value", "stop must be a string or up to 16"),
    (line("a", **GOOD, stop=list("abcdefghijklmnopq")), "invalid_value", "stop must be a string or up to 16"),
    (line("a", **GOOD, echo=1), "invalid_value", "echo must be true or false"),
    (line("a", **GOOD, model=7), "invalid_value", "model must be a string"),
    (line("a", **GOOD, temperature=1e-30), "invalid_request", "temperature must be a number of at least 0.0001"),
    (line("a", **GOOD, best_of=2), "unsupported_parameter", "best_of other than n"),
    (line("a", **GOOD, stream=True), "unsupported_parameter", "stream true is not supported"),
    (line("a", **GOOD, presence_penalty=0.5), "unsupported_parameter", "presence_penalty 0.5"),
    (line("a", **GOOD, logit_bias={"5": 1}), "unsupported_parameter", "logit_bias"),
    (line("a", **GOOD, reasoning_effort="high"), "unsupported_parameter", 'reasoning_effort "high" is not supported'),
    (line("a", **GOOD, verbosity="low"), "unsupported_parameter", "verbosity"),
    (line("a", **GOOD, response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
    (line("a", **GOOD, frequency_penalty=False), "unsupported_parameter", "frequency_penalty"),
    (line("a", **GOOD, tools=[{"type": "function"}]), "unsupported_parameter", "tools"),
    (line("a", **GOOD, beams=3, wings=2), "unknown_parameter", "beams, wings: unknown in the body"),
    (line("a", "/v1/chat/completions", messages=[]), "invalid_value", "messages must be a list"),
    (line("a", "/v1/chat/completions", messages=[{"role": "user"}]), "invalid_value", "a content of text"),
    (line("a", "/v1/chat/completions", messages=["hi"]), "invalid_value", "a message has role, content"),
    (
        line("a", "/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "unsupported_value",
        "content other than text",
    ),
    (
        line("a", "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], top_logprobs=2),
        "invalid_value",
        "top_logprobs needs logprobs",
    ),
    (
        line("a", "/v1/chat/completions", messages=[{"role": "user", "content": "x"}]),
        "unsupported_value",
        "has no chat template",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "code", "message"), BAD, ids=[message for _, _, message in BAD])
def test_a_bad_line_is_refused_with_its_reason(lm: Any, given: Any, code: str, message: str) -> None:
    [found] = read(lm, given)
    assert isinstance(found, Refusal)
    assert found.code == code
    assert message in found.message
    row = openai_responses.refused(found)
    json.dumps(row, ensure_ascii=False).encode()
    assert row["error"] == {"code": code, "message": found.message}
    assert row["custom_id"] == found.custom_id
    if found.custom_id is None:
        assert row["response"] is None
    else:
        assert row["response"]["status_code"] == 400
        assert row["response"]["body"]["error"]["param"] == found.param


def test_fields_that_ask_for_nothing_are_taken(lm: Any) -> None:
    harmless = {
        "model": "any", "stream": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me",
        "best_of": 2, "n": 2, "stop": None, "logprobs": None, "suffix": None, "stream_options": None, "store": True,
        "metadata": {"a": "b"}, "service_tier": "flex", "safety_identifier": "x", "prompt_cache_key": "y",
        "parallel_tool_calls": True, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "modalities": ["text"], "reasoning_effort": None, "verbosity": None, "echo": False,
    }  # fmt: skip
    [plainly, decorated] = read(lm, line("a", **GOOD, n=2), line("b", **GOOD, seed=1, **harmless))
    assert isinstance(decorated, Request)
    assert isinstance(plainly, Request)
    assert plainly.prompts[0].ids == decorated.prompts[0].ids
    assert openai_batch.other_models(lm, [plainly, decorated]) == ["any"]


def test_messages_may_have_the_empty_fields_of_an_answer(lm: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }} {% endfor %}")
    message = {
        "role": "assistant",
        "content": "the value",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    chat = functools.partial(line, url="/v1/chat/completions", top_logprobs=0, logprobs=False)
    bare, whole, called = read(
        lm,
        chat("a", messages=[{"role": "assistant", "content": "the value"}]),
        chat("b", messages=[message]),
        chat("c", messages=[{**message, "tool_calls": [{"id": "x"}]}]),
    )
    assert isinstance(bare, Request)
    assert isinstance(whole, Request)
    assert bare.prompts[0].ids == whole.prompts[0].ids
    assert isinstance(called, Refusal)
    assert "a message has role, content and name" in called.message


def test_requests_that_share_a_custom_id_are_all_refused(lm: Any) -> None:
    found = read(lm, line("a", **GOOD), line("b", **GOOD), line("a", prompt="Another"), "nonsense")
    assert [isinstance(entry, Refusal) for entry in found] == [True, False, True, True]
    assert {entry.code for entry in found[::2]} == {"duplicate_custom_id"}
    assert "is that of lines 1, 3" in found[0].message


def test_a_rider_that_fails_costs_the_others_nothing(lm: Any, monkeypatch: Any) -> None:
    go_on = openai_batch.continue_prompts

    def fail(lm: Any, view: Any, numbers: Any, prompts: Any, **more: Any) -> Any:
        if 1 in numbers:
            raise NonFiniteError("block 3: NaN")
        return go_on(lm, view, numbers, prompts, **more)

    monkeypatch.setattr(openai_batch, "continue_prompts", fail)
    # Of different settings, so that each has a rider of its own.
    rows = done(lm, *(line(f"r{n}", prompt=prompt, max_tokens=2 + n) for n, prompt in enumerate(PROMPTS)))
    assert [row["response"]["status_code"] for row in rows] == [200, 500, 200]
    assert rows[1]["error"] == {"code": "server_error", "message": "block 3: NaN"}


@pytest.mark.parametrize(
    "body",
    [{"max_tokens": 2}, {"max_tokens": 0, "echo": True, "logprobs": 1}, {"max_tokens": 2, "logprobs": 1, "echo": True}],
    ids=["sampled", "scored", "both"],
)  # fmt: skip
def test_a_prompt_that_gives_nan_costs_its_micro_batch_nothing(body: dict[str, Any], tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "llama")  # whose head is not the embedding
    folder = speaking(tmp_path / "llama", tmp_path / "model")
    name, prompts = "model.embed_tokens.weight", [[230, 42], [230, 77, 8], [231, 5, 9]]
    shard = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][77] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    with slowllm.load(folder, dtype="fp32") as lm:
        lines = [line(f"r{number}", prompt=prompt, **body) for number, prompt in enumerate(prompts)]
        entries = read(lm, *lines)
        job = openai_batch.describe(lm, entries)
        found = []
        for _ in range(2):  # and again, from what was saved
            with State(tmp_path / "state", job) as state:
                found.append(list(openai_batch.answer(lm, entries, job, state)))
    assert found[0] == found[1]
    assert [row["response"]["status_code"] for row in found[0]] == [200, 500, 200]


# The command


def run(arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["slowllm", "batch", *map(str, arguments)])
    try:
        app.run()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join(f"{text if isinstance(text, str) else json.dumps(text)}\n" for text in lines))
    return file


def test_answers_come_in_order_with_errors_in_their_places(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    file = write(
        tmp_path / "in.jsonl",
        line("long", prompt=PROMPTS[0], max_tokens=6, temperature=0, model="gpt"),
        "nonsense",
        line("short", prompt=PROMPTS[1], max_tokens=1, temperature=0),
    )
    out = tmp_path / "out.jsonl"
    assert run([file, "--dtype", "fp32", "--stream-all", "--out", out], monkeypatch) == 1
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == ["long", None, "short"]
    assert rows[1]["error"]["code"] == "invalid_json_line"
    error = capsys.readouterr().err
    assert "2 requests answered in 6 sweeps" in error
    assert "1 of 3 lines failed" in error
    assert "tiny-bloom answers requests for gpt" in error
    assert body_of(rows[0])["model"] == "tiny-bloom"


def test_a_file_without_any_good_request_opens_no_model(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were opened")

    monkeypatch.setattr("slowllm.runtime.load.open_model", refuse)
    assert run([write(tmp_path / "in.jsonl", "nonsense", line("a"))], monkeypatch) == 1
    captured = capsys.readouterr()
    assert [json.loads(text)["custom_id"] for text in captured.out.splitlines()] == [None, "a"]
    assert "2 of 2 lines failed" in captured.err
    assert run([tmp_path / "missing.jsonl"], monkeypatch) == 2


# Killed


def lives(processes: Processes, *jobs: tuple[Path, str, int]) -> list[dict[str, Any]]:
    """Run the command in each folder, to a file of that name, killed so many times."""
    for folder, _, _ in jobs:
        folder.mkdir(exist_ok=True)
        write(folder / "in.jsonl", *REQUESTS)
    ended = processes.run(
        "-m", "tests.entrypoints.test_openai_batch", *(part for job in jobs for part in job)
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(text) for text in ended.stdout.splitlines()[-len(jobs) :]]


REQUESTS = [
    line(
        f"r{n}", prompt=f"The value number {n}{' again' * (n % 5)} is", max_tokens=1 + n % 4, temperature=n % 2, logprobs=1
    )
    for n in range(24)
] + [
    line(f"e{n}", prompt=f"The value {n} is", max_tokens=n % 2, echo=True, logprobs=2, temperature=0) for n in range(4)
] + ["nonsense"]  # fmt: skip


@pytest.mark.long
def test_killed_at_many_moments_it_gives_the_same_bytes_and_ends_nothing_twice(
    tmp_path: Path, processes: Processes
) -> None:
    one, other = tmp_path / "whole", tmp_path / "killed"
    whole, killed, again = lives(
        processes, (one, "out.jsonl", 0), (other, "out.jsonl", NUM_KILLS), (other, "again.jsonl", 0)
    )
    assert killed["codes"] == [-signal.SIGKILL] * NUM_KILLS + [1]
    out = (one / "out.jsonl").read_bytes()
    assert len(out.splitlines()) == len(REQUESTS)
    assert (other / "out.jsonl").read_bytes() == out
    # What had ended before a kill was not begun again.
    assert killed["num_begun"][-1] < whole["num_begun"][0] / 2
    assert killed["num_ended"] == whole["num_ended"]
    # A job that is done reads nothing, and gives its answers again.
    assert again["num_passages"] == [0]
    assert (other / "again.jsonl").read_bytes() == out


def test_the_state_of_other_requests_is_refused(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    arguments = ["--dtype", "fp32", "--state", tmp_path / "state"]
    assert run([write(tmp_path / "a", line("a", **GOOD, max_tokens=1)), *arguments], monkeypatch) == 0
    assert run([write(tmp_path / "b", line("a", **GOOD, max_tokens=2)), *arguments], monkeypatch) == 2
    assert "is the state of another job (other requests" in capsys.readouterr().err


@pytest.mark.parametrize("begun", [{}, {"packing": [1, 1, 1], "dtype": "float32"}, {"packing": [0, 1, 1]}])
def test_the_state_of_another_verb_is_refused(lm: Any, begun: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="another job's or version's, or damaged"):
        openai_batch.plan_of(lm, read(lm, line("a", **GOOD)), slowllm.Rates(), begun)


def main(folder: Path, name: str, num_kills: int) -> None:
    """Run the command in forked children, each killed at a stop of its own, but for the last."""
    generator = random.Random(7)
    told = {"codes": [], "num_passages": [], "num_begun": [], "num_ended": 0}
    for number in range(num_kills + 1):
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.close(reading)
            live(folder, name, writing)
        os.close(writing)
        until = generator.randint(24, 60) if number < num_kills else 1 << 30
        events = b""
        while events.count(b"s") < until and (more := os.read(reading, 1)):
            events += more
        if events.count(b"s") == until:
            os.kill(child, signal.SIGKILL)
        while more := os.read(reading, 4096):
            events += more
        os.close(reading)
        told["codes"].append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        told["num_passages"].append(events.count(b"s"))
        told["num_begun"].append(events.count(b"b"))
        told["num_ended"] += events.count(b"e")
    print(json.dumps(told))


def live(folder: Path, name: str, told: int) -> None:
    """Run the command; tell of every stop, and of every micro-batch begun and kept."""
    from slowllm.planning import host_plan
    from slowllm.runtime import streamed_lm
    from slowllm.runtime.state import State

    report, go_on, finish = streamed_lm._report_passage, openai_batch.continue_prompts, State.finish

    def tell_parent(handle: Any, passage: Any) -> None:
        report(handle, passage)
        os.write(told, b"s")

    def begin(*arguments: Any, **more: Any) -> Any:
        os.write(told, b"b")
        return go_on(*arguments, **more)

    def end(*arguments: Any) -> None:
        finish(*arguments)
        os.write(told, b"e")

    streamed_lm._report_passage, openai_batch.continue_prompts, State.finish = tell_parent, begin, end
    # Several riders, and more of them than find a seat at once.
    host_plan.MAX_RIDER_TOKENS, host_plan.MAX_SWEEP_TOKENS = 32, 16
    openai_batch.time = SimpleNamespace(
        time=lambda: 1_700_000_000
    )  # or the whole run would have begun at another time
    sys.argv = [
        "slowllm", "batch", str(folder / "in.jsonl"), "--dtype", "fp32", "--ram", "4GiB", "--stream-all",
        "--out", str(folder / name), "--state", str(folder / "state"),
    ]  # fmt: skip
    code = 70
    try:
        app.run()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for folder, name, num_kills in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        main(Path(folder), name, int(num_kills))
