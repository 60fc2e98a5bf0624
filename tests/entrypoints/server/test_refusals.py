"""What is refused: in OpenAI's shape, and the server lives."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from slowllm.entrypoints.server.limits import ClientLimits, read_key
from slowllm.entrypoints.server.running import HTTPServer
from slowllm.errors import InputError, NonFiniteError, SlowLLMError
from tests.entrypoints.server.conftest import Serve
from tests.support.memory_stops import until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"prompt": "The value", "max_tokens": 2}
MESSAGES = [{"role": "user", "content": "The value"}]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    (only,) = answer.json().items()
    assert only[0] == "error"
    assert set(only[1]) == {"message", "type", "param", "code"}
    return only[1]


BAD = [
    (COMPLETIONS, {}, "prompt", "prompt must be a string"),
    (COMPLETIONS, {"prompt": [1, "b"]}, "prompt", "prompt must be a string"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "the prompt is empty"),
    (COMPLETIONS, {"prompt": [4096]}, "prompt", "token 4096 is not one of the model's 4096"),
    (COMPLETIONS, {"prompt": [5] * 1_000_000}, "prompt", "has 1,000,000 tokens and is to get 16 more"),
    (COMPLETIONS, {"prompt": "value " * 100_000}, "prompt", "has more than 512 tokens"),
    (COMPLETIONS, {**GOOD, "max_tokens": 600}, None, "memory was planned for"),
    (COMPLETIONS, {**GOOD, "max_tokens": 0}, "max_tokens", "at least 1, not 0, unless echo is true"),
    (COMPLETIONS, {**GOOD, "n": 0}, "n", "n must be a whole number from 1 to 128, not 0"),
    (COMPLETIONS, {**GOOD, "temperature": "hot"}, "temperature", 'a number from 0 to 2, not "hot"'),
    (COMPLETIONS, {**GOOD, "suffix": "."}, "suffix", 'suffix "." is not supported'),
    (COMPLETIONS, {**GOOD, "best_of": 3}, "best_of", "best_of other than n is not supported, and it is 3"),
    (COMPLETIONS, {**GOOD, "presence_penalty": 0.5}, "presence_penalty", "presence_penalty 0.5 is not supported"),
    (COMPLETIONS, {**GOOD, "frequency_penalty": 1}, "frequency_penalty", "frequency_penalty 1 is not supported"),
    (COMPLETIONS, {**GOOD, "logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
    (COMPLETIONS, {**GOOD, "stop": list("abcdefghijklmnopq")}, "stop", "stop must be a string or up to 16"),
    (COMPLETIONS, {**GOOD, "logprobs": 6}, "logprobs", "logprobs must be a whole number from 0 to 5"),
    (COMPLETIONS, {**GOOD, "wings": 2, "beams": 3}, "beams", "beams, wings: unknown in the body"),
    (COMPLETIONS, {**GOOD, "w" * 5000: 2}, f"{'w' * 100}...", f"{'w' * 100}...: unknown in the body"),
    (COMPLETIONS, {**GOOD, "stream_options": {"wings": 2}}, "stream_options", "stream_options must be an object"),
    (COMPLETIONS, {**GOOD, "stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    (COMPLETIONS, {"prompt": ["a"] * 257}, "prompt", "a request may have 256 prompts, and this one has 257"),
    (CHAT, {"messages": []}, "messages", "messages must be a list of messages"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages", "a content of text"),
    (CHAT, {"messages": [{**MESSAGES[0], "name": 3}]}, "messages", "the name in a message must be a string"),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "tools"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "response_format"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs to be true"),
]  # fmt: skip


@pytest.mark.parametrize(("url", "body", "param", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_body_that_cannot_be_done_is_refused_by_its_field(
    url: str, body: dict[str, Any], param: str | None, message: str, client: TestClient
) -> None:
    error = error_of(client.post(url, json=body), 400)
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


RAW = [
    (b"", "is not JSON"),
    (b"[1]", "must be an object, not: [1]"),
    (b'{"prompt": "\xff"}', "is not JSON"),
    (b"[" * 10_000, "nested too deeply"),
    (b'{"a":' * 10_000, "nested too deeply"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN is no number"),
    (b'{"prompt": "x", "temperature": Infinity}', "Infinity is no number"),
    (b'{"prompt": "x", "temperature": 1e999}', "too large a number"),
    (b'{"prompt": "x", "prompt": "y"}', 'has the key "prompt" twice'),
    (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
]


@pytest.mark.parametrize(("body", "message"), RAW, ids=[message for _, message in RAW])
def test_a_body_that_is_no_json_object_is_refused(body: bytes, message: str, client: TestClient) -> None:
    for url in (COMPLETIONS, CHAT):
        answer = client.post(url, content=body, headers={"Content-Type": "application/json"})
        error = error_of(answer, 400)
        assert error["code"] == "invalid_json"
        assert error["message"].startswith("the body ")
        assert message in error["message"]


def test_a_page_in_a_browser_cannot_ask_without_asking_first(client: TestClient) -> None:
    answer = client.post(COMPLETIONS, content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in error_of(answer, 415)["message"]


def test_routes_that_are_not_there_are_refused_by_name(client: TestClient) -> None:
    error = error_of(client.post("/v1/embeddings", json={"input": "x"}), 404)
    assert "/v1/embeddings is not supported" in error["message"]
    assert (
        "/v1/responses is not here; there are /v1/completions"
        in error_of(client.post("/v1/responses"), 404)["message"]
    )
    assert error_of(client.get(COMPLETIONS), 405)["message"] == "/v1/completions takes no GET"
    assert error_of(client.delete("/v1/models"), 405)["code"] == "method_not_allowed"


def test_a_key_is_asked_for_everywhere_but_for_health(serve: Serve) -> None:
    key = b"0123456789abcdef"
    with serve(key=key) as client:
        for header in ({}, {"Authorization": "Bearer 0123456789abcdeF"}, {"Authorization": "Basic 0123456789abcdef"},
                       {"Authorization": b"Bearer \xe9"}):  # fmt: skip
            for answer in (
                client.post(COMPLETIONS, json=GOOD, headers=header), client.post(CHAT, content=b"", headers=header),
                client.get("/v1/models", headers=header), client.get("/metrics", headers=header),
                client.get("/openapi.json", headers=header), client.post("/v1/embeddings", headers=header),
                client.get("/v1/models/x", headers=header),
            ):  # fmt: skip
                assert error_of(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200
        good = {"Authorization": f"Bearer {key.decode()}"}
        assert client.post(COMPLETIONS, json=GOOD, headers=good).status_code == 200


@pytest.mark.parametrize(
    ("content", "mode", "match"),
    [
        (b"short", 0o600, "a key has 16 to 4,096 bytes, not 5"),
        (b"x" * 5000, 0o600, "a key has 16 to 4,096 bytes"),
        (b"0123456789 abcdefgh", 0o600, "a key is one word of ASCII letters"),
        (b"0123456789abcdef", 0o644, "may be read or written by others"),
    ],
)
def test_a_file_that_has_no_key_is_refused(content: bytes, mode: int, match: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(InputError, match=match):
        read_key(file)
    with pytest.raises(InputError, match="is no ordinary file"):
        read_key(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        read_key(tmp_path / "none")


def test_a_body_that_is_too_large_is_refused_unread(serve: Serve) -> None:
    with serve(limits=ClientLimits(body_bytes=1000)) as client:
        assert client.post(COMPLETIONS, json={**GOOD, "user": "x" * 900}).status_code == 200

        def parts() -> Any:
            for _ in range(100):
                yield b" " * 100

        for content in (b" " * 2000, parts()):
            answer = client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
            error = error_of(answer, 413)
            assert error["message"] == "the body is larger than 1 kB"
            assert answer.headers["connection"] == "close"
        assert client.post(COMPLETIONS, json=GOOD).status_code == 200


def test_a_full_queue_says_when_to_come_again(serve: Serve) -> None:
    with serve(max_waiting=0) as client:
        for stream in (False, True):
            answer = client.post(COMPLETIONS, json={**GOOD, "stream": stream})
            assert error_of(answer, 429)["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1


def test_a_server_that_ends_takes_nothing_new(serve: Serve) -> None:
    with serve() as client:
        client.answering.leave()  # type: ignore[attr-defined]
        answer = client.post(COMPLETIONS, json=GOOD)
        assert error_of(answer, 503)["code"] == "server_shutting_down"
        assert "retry-after" in answer.headers
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "ending")


def test_what_is_cancelled_by_the_end_of_the_server_is_told_so(serve: Serve) -> None:
    with serve() as client:
        answering = client.answering  # type: ignore[attr-defined]
        ask = {"prompt": "The value", "max_tokens": 500}
        with ThreadPoolExecutor(2) as threads:
            plainly = threads.submit(client.post, COMPLETIONS, json=ask)
            streamed = threads.submit(client.post, COMPLETIONS, json={**ask, "stream": True})
            until(lambda: answering.served.service.status().num_riding == 2)
            answering.leave()
            answering.served.service.drain(0.0)
            assert error_of(plainly.result(), 503)["code"] == "server_shutting_down"
        assert streamed.result().text.endswith('"code": "server_shutting_down"}}\n\n')


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (NonFiniteError("block 3: NaN"), "block 3: NaN"),
        (ZeroDivisionError("secret"), "the server's log says why"),
    ],
)
def test_a_ride_that_fails_fails_alone(
    raised: Exception, message: str, serve: Serve, lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as client:

        def fail(*_: Any, **__: Any) -> Any:
            raise raised

        with monkeypatch.context() as patched:
            patched.setattr("slowllm.inference.live_batch.BatchModel.start", fail)
            error = error_of(client.post(COMPLETIONS, json=GOOD), 500)
            assert error["type"] == "server_error"
            assert message in error["message"]
            with client.stream("POST", COMPLETIONS, json={**GOOD, "stream": True}) as answer:
                told = "".join(answer.iter_text())
            assert message in told
            assert "[DONE]" not in told
        assert client.post(COMPLETIONS, json=GOOD).status_code == 200


class Talk:
    """One request to the application, whose client is the test."""

    def __init__(self, body: dict[str, Any], path: str = COMPLETIONS) -> None:
        self.sent: list[dict[str, Any]] = []
        self.has_sent, self.hangs_up = asyncio.Event(), asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json")]
        self.scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("test", 80), "asgi": {"version": "3.0"},
        }  # fmt: skip

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.hangs_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.has_sent.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_has_its_ride_cancelled(stream: bool, serve: Serve) -> None:
    with serve() as client:
        answering = client.answering  # type: ignore[attr-defined]
        service = answering.served.service

        complaints: list[dict[str, Any]] = []

        async def hang_up() -> int:
            asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
            talk = Talk({"prompt": "The value", "max_tokens": 500, "stream": stream, "n": 2})
            running = asyncio.create_task(client.app(talk.scope, talk.receive, talk.send))  # type: ignore[arg-type]
            while not (done := service.status().num_new_tokens):
                await asyncio.sleep(0.001)
            talk.hangs_up.set()
            await running
            assert not service.status().num_riding
            assert bool(talk.sent) == stream or talk.sent[0]["status"] == 499
            return done

        asyncio.run(hang_up())
        gc.collect()  # asyncio complains of an exception when its future goes
        assert not complaints
        assert client.post(COMPLETIONS, json=GOOD).status_code == 200
        assert service.status().num_new_tokens < 500
        assert 'status="499"' in client.get("/metrics").text


def test_a_body_that_comes_slowly_is_refused(serve: Serve) -> None:
    with serve(limits=ClientLimits(body_seconds=0.05)) as client:

        async def dawdle() -> list[dict[str, Any]]:
            talk = Talk(GOOD)
            talk._body = None  # nothing comes
            await client.app(talk.scope, talk.receive, talk.send)  # type: ignore[arg-type]
            return talk.sent

        start, body, *_ = asyncio.run(dawdle())
        assert start["status"] == 408
        assert json.loads(body["body"])["error"]["code"] == "request_timeout"


def test_bodies_that_come_at_once_have_a_bound(serve: Serve) -> None:
    with serve(limits=ClientLimits(body_bytes=100)) as client:

        async def send() -> list[int]:
            talks = [Talk(GOOD) for _ in range(7)]
            for talk in talks:
                talk._body = b"{" + b" " * 78

            async def receive(talk: Talk) -> dict[str, Any]:
                if talk._body is not None:
                    body, talk._body = talk._body, None
                    return {"type": "http.request", "body": body, "more_body": True}
                await talk.hangs_up.wait()
                return {"type": "http.request", "body": b"}", "more_body": False}

            running = [
                asyncio.create_task(client.app(talk.scope, partial(receive, talk), talk.send))  # type: ignore[arg-type]
                for talk in talks
            ]
            while not any(talk.sent for talk in talks):
                await asyncio.sleep(0.001)
            for talk in talks:
                talk.hangs_up.set()
            await asyncio.gather(*running)
            return sorted(talk.sent[0]["status"] for talk in talks)

        # Five of 80 bytes are as many as four of the largest.
        assert asyncio.run(send()) == [400] * 5 + [503] * 2
        assert client.post(COMPLETIONS, json=GOOD).status_code == 200


def test_a_server_that_has_ended_by_itself_is_noticed(serve: Serve) -> None:
    with serve() as client, socket.create_server(("127.0.0.1", 0)) as listening:
        with HTTPServer(client.answering, listening) as server:  # type: ignore[attr-defined]
            server.check()
        with pytest.raises(SlowLLMError, match="the HTTP server has ended by itself"):
            server.check()
