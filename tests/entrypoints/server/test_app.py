"""What the server answers: transformers' tokens and log-probabilities, in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

import slowllm
from tests.entrypoints.server.conftest import Serve

# fp32, and rows that share a batch: sums of another order differ by this of a log-probability.
TOLERANCE = 2e-4
PROMPTS = ["The value is", "A function returns", "On the right is the memory on the heap that holds"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def greedy(lm: Any, plain: Any, text: str, max_tokens: int) -> list[int]:
    ids = lm.tokenizer(text, return_tensors="pt")
    found = plain.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
    return found[0, ids["input_ids"].shape[1] :].tolist()


def log_probs(plain: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return plain(torch.tensor([ids])).logits[0].log_softmax(-1)


def post(client: TestClient, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    answer = client.post(url, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_completions_are_those_of_transformers(client: TestClient, lm: Any, plain: Any) -> None:
    body = post(client, prompt=PROMPTS, max_tokens=6, temperature=0, logprobs=2)
    assert body["object"] == "text_completion"
    assert body["model"] == lm.name
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    for choice, prompt in zip(body["choices"], PROMPTS, strict=True):
        new = greedy(lm, plain, prompt, 6)
        assert choice["text"] == lm.tokenizer.decode(new, skip_special_tokens=True)
        ids = lm.tokenizer(prompt)["input_ids"]
        wanted = log_probs(plain, ids + new)[len(ids) - 1 : -1]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(
            wanted[range(len(new)), new].tolist(), abs=TOLERANCE
        )
        assert choice["finish_reason"] == "length"
    num_prompt = sum(len(lm.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert body["usage"] == {
        "prompt_tokens": num_prompt, "completion_tokens": 18, "total_tokens": num_prompt + 18,
    }  # fmt: skip


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_has_the_log_probabilities_of_the_prompt(
    max_tokens: int, as_ids: bool, client: TestClient, lm: Any, plain: Any
) -> None:
    rows = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    given = rows if as_ids else PROMPTS
    body = post(client, prompt=given, max_tokens=max_tokens, temperature=0, logprobs=2, echo=True)
    for choice, prompt, ids in zip(body["choices"], PROMPTS, rows, strict=True):
        new = greedy(lm, plain, prompt, max_tokens) if max_tokens else []
        assert choice["text"] == prompt + lm.tokenizer.decode(new, skip_special_tokens=True)
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        assert found["text_offset"] == [len("".join(found["tokens"][:n])) for n in range(len(ids + new))]
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        wanted = log_probs(plain, ids + new)[:-1]
        told = wanted[range(len(ids + new) - 1), (ids + new)[1:]].tolist()
        assert found["token_logprobs"][1:] == pytest.approx(told, abs=TOLERANCE)
        for tops, place, value in zip(
            found["top_logprobs"][1:], wanted, found["token_logprobs"][1:], strict=True
        ):
            assert max(tops.values()) == pytest.approx(float(place.max()), abs=TOLERANCE)
            # lm-eval compares these, bit by bit, to see whether a token is the likeliest.
            assert (value == max(tops.values())) == (
                float(place.max()) == pytest.approx(value, abs=TOLERANCE)
            )
    assert body["usage"]["completion_tokens"] == max_tokens * len(PROMPTS)


def test_an_echo_counts_a_token_behind_the_prompt_where_it_is_eos(
    serve: Serve, lm: Any, monkeypatch: Any
) -> None:
    """lm-eval leaves the last token out, which it takes for the new one."""
    ids = lm.tokenizer(PROMPTS[0])["input_ids"]
    with serve() as client:
        plainly = post(client, prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True)["choices"][0]
    end = lm.tokenizer.convert_tokens_to_ids(lm.tokenizer.tokenize(plainly["text"])[-1])
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", end)
    with serve() as client:
        ended = post(client, prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True)["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["text"] == PROMPTS[0]
    assert ended["logprobs"]["tokens"] == plainly["logprobs"]["tokens"]
    assert ended["logprobs"]["token_logprobs"] == plainly["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_may_ask_for_none_of_the_likeliest(max_tokens: int, client: TestClient) -> None:
    ask = {"prompt": PROMPTS[0], "max_tokens": max_tokens, "temperature": 0, "echo": True}
    none, one = (post(client, **ask, logprobs=num)["choices"][0]["logprobs"] for num in (0, 1))
    assert none["tokens"] == one["tokens"]
    assert none["token_logprobs"] == pytest.approx(one["token_logprobs"], abs=TOLERANCE)
    # The place's own token is always among them.
    assert [len(tops or ()) for tops in none["top_logprobs"][1:]] == [1] * (len(none["tokens"]) - 1)


def test_an_echo_without_any_new_token_rides_nowhere(client: TestClient, lm: Any) -> None:
    before = lm.report.num_passages
    choice = post(client, prompt=PROMPTS[0], max_tokens=0, echo=True)["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (PROMPTS[0], None, "length")
    assert lm.report.num_passages == before


def test_choices_are_drawn_with_the_seed(client: TestClient) -> None:
    ask = {"prompt": PROMPTS[0], "max_tokens": 4, "n": 3, "temperature": 0.9}
    first, again, other = (post(client, **ask, seed=seed)["choices"] for seed in (5, 5, 6))
    assert [one["text"] for one in first] == [one["text"] for one in again] != [one["text"] for one in other]
    assert len({one["text"] for one in first}) > 1
    # Without a seed, each request has one of its own.
    assert len({post(client, **{**ask, "n": 1})["choices"][0]["text"] for _ in range(4)}) > 1
    same = post(client, **{**ask, "temperature": 0})["choices"]
    assert [one["index"] for one in same] == [0, 1, 2]
    assert len({one["text"] for one in same}) == 1


def test_chats_go_through_the_template(client: TestClient, lm: Any, plain: Any) -> None:
    messages = [{"role": "system", "content": "The value"}, {"role": "user", "content": "is"}]
    body = post(client, CHAT, messages=messages, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2)
    (choice,) = body["choices"]
    new = greedy(lm, plain, "The value is ", 5)
    assert body["object"] == "chat.completion"
    assert choice["message"] == {
        "role": "assistant",
        "content": lm.tokenizer.decode(new, skip_special_tokens=True),
        "refusal": None,
    }
    told = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in told) == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in told)
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in told)


def events_of(client: TestClient, url: str, **body: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the comments and the chunks of a stream that ends as it should."""
    with client.stream("POST", url, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = "".join(answer.iter_text()).removesuffix("\n\n").split("\n\n")
    comments = [part for part in parts if part.startswith(": ")]
    data = [part.removeprefix("data: ") for part in parts if not part.startswith(": ")]
    assert parts[0] == comments[0]  # at once
    assert data.pop() == "[DONE]"
    return comments, [json.loads(one) for one in data]


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        ([], {"temperature": 0, "n": 2}),
        (["e", " the"], {"temperature": 0}),
        (["zzz", "re"], {"n": 2, "seed": 3}),
    ],
)
def test_streamed_completions_are_those_that_are_not(
    stop: list[str], options: dict[str, Any], client: TestClient
) -> None:
    ask = {"prompt": PROMPTS[:2], "max_tokens": 8, "stop": stop, "logprobs": 1, **options}
    whole = post(client, **ask)
    _, chunks = events_of(client, COMPLETIONS, **ask, stream_options={"include_usage": True})
    assert chunks.pop()["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        told = [c["logprobs"] for c in own if c["logprobs"] is not None]
        assert len(told) > 3 or choice["finish_reason"] == "stop"  # as they are made
        for name in ("tokens", "text_offset"):
            assert [one for logprobs in told for one in logprobs[name]] == choice["logprobs"][name]
        assert [one for logprobs in told for one in logprobs["token_logprobs"]] == pytest.approx(
            choice["logprobs"]["token_logprobs"], abs=TOLERANCE
        )
    assert all(chunk["usage"] is None for chunk in chunks)


def test_streamed_chats_come_as_deltas(client: TestClient) -> None:
    ask = {"messages": [{"role": "user", "content": "The value"}], "max_tokens": 8, "temperature": 0}
    whole = post(client, CHAT, **ask)
    comments, chunks = events_of(client, CHAT, **ask)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    assert len(deltas) > 3  # as they are made
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
    assert comments[0].removeprefix(": ").partition(" ")[0] in ("block", "stop", "waiting")


def test_streamed_log_probabilities_of_a_chat_come_with_their_text(client: TestClient) -> None:
    ask = {
        "messages": [{"role": "user", "content": "The value"}], "max_tokens": 8, "temperature": 0,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = post(client, CHAT, **ask)["choices"][0]["logprobs"]["content"]
    _, chunks = events_of(client, CHAT, **ask)
    told = [c["choices"][0]["logprobs"]["content"] for c in chunks if c["choices"][0]["logprobs"]]
    assert len(told) > 3
    assert [one["token"] for content in told for one in content] == [one["token"] for one in whole]
    assert [len(one["top_logprobs"]) for content in told for one in content] == [2] * len(whole)


def test_a_streamed_echo_comes_first(client: TestClient) -> None:
    ask = {"prompt": PROMPTS[0], "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1}
    _, chunks = events_of(client, COMPLETIONS, **ask)
    assert chunks[0]["choices"][0]["text"] == PROMPTS[0]
    whole = post(client, **ask)["choices"][0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["logprobs"]["tokens"] == whole["logprobs"]["tokens"]


def test_the_model_is_listed(client: TestClient, lm: slowllm.StreamedLM) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert listed["id"] == lm.name
    assert client.get(f"/v1/models/{lm.name}").json() == listed
    refused = client.get("/v1/models/bigscience/bloom")
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"


def test_health_and_metrics_tell_of_the_work(client: TestClient) -> None:
    said = client.get("/health").json()
    assert said["status"] == "ok"
    assert said["riding"] == said["waiting"] == 0
    before = metrics(client)
    post(client, prompt=PROMPTS[0], max_tokens=3)
    client.post(COMPLETIONS, json={})
    after = metrics(client)
    assert after["slowllm_new_tokens_total"] == before["slowllm_new_tokens_total"] + 3
    assert after["slowllm_sweeps_total"] >= before["slowllm_sweeps_total"] + 3
    name = 'slowllm_requests_total{{endpoint="/v1/completions",status="{}"}}'
    for status in (200, 400):
        assert after[name.format(status)] == before.get(name.format(status), 0) + 1


def metrics(client: TestClient) -> dict[str, float]:
    text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_description_names_every_route(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        COMPLETIONS, CHAT, "/v1/embeddings", "/v1/models", "/v1/models/{model}", "/health", "/metrics",
    }  # fmt: skip
    body = described["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["tools"]["enum"] == [None, []]
