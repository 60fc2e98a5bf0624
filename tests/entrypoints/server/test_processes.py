"""The server as clients meet it: a process, OpenAI's own client, and clients that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.api_server import ApiServer, api_server
from tests.support.memory_stops import until
from tests.support.processes import Processes
from tests.support.serving import serving

pytestmark = pytest.mark.long

PROMPTS = ["The value is", "A function returns", "On the right is the memory on the heap that holds"]
# So many tokens do not end while a test looks at them.
FOREVER = {"prompt": "The value is", "max_tokens": 1900, "temperature": 0}


@pytest.fixture(scope="module")
def server(processes: Processes, talkative: Path) -> Iterator[ApiServer]:
    with api_server(processes, talkative, "--stream-all", "--max-tokens", 4096) as started:
        yield started


@pytest.fixture
def client(server: ApiServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def is_idle(server: ApiServer) -> bool:
    status = server.status()
    return not (status["riding"] or status["waiting"])


def test_openai_completes_and_scores(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "any",
        "prompt": PROMPTS,
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": 2,
    }
    whole = client.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    echoed = client.completions.create(**{**ask, "echo": True, "max_tokens": 1})
    for choice, prompt in zip(echoed.choices, PROMPTS, strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_openai_streams_completions(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "any", "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_openai_chats(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "any",
        "messages": [{"role": "user", "content": "The value"}],
        "max_tokens": 6,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    chunks = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    with client.chat.completions.stream(**ask) as stream:  # which puts the message together by itself
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == choice.message.content
    assert final.choices[0].finish_reason == "length"


def test_openai_lists_the_model(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id).id == listed.id == "talkative"


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n must be a whole number from 1 to 128") as caught:
        client.completions.create(model="any", prompt="x", n=1000)
    assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings is not supported"):
        client.embeddings.create(model="any", input="x")


def test_a_client_that_times_out_has_its_ride_cancelled(server: ApiServer) -> None:
    with server.client(timeout=1.0) as hasty, pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model="any", **FOREVER)
    until(lambda: is_idle(server))
    before = server.metrics()
    assert before['slowllm_requests_total{endpoint="/v1/completions",status="499"}'] >= 1


def test_a_stream_that_is_closed_has_its_ride_cancelled(server: ApiServer, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="any", **FOREVER, stream=True)
    next(iter(stream))
    assert not is_idle(server)
    stream.close()
    until(lambda: is_idle(server))


def test_a_client_that_is_killed_has_its_ride_cancelled(server: ApiServer) -> None:
    code = f"import httpx; httpx.post({server.url!r} + '/completions', json={FOREVER!r}, timeout=None)"
    with subprocess.Popen([sys.executable, "-c", code]) as killed:
        until(lambda: not is_idle(server))
        killed.kill()
    until(lambda: is_idle(server))


def test_a_silent_stream_says_where_the_sweep_is(server: ApiServer) -> None:
    with httpx.stream(
        "POST", f"{server.url}/completions", json={**FOREVER, "stream": True}, timeout=60
    ) as answer:
        first = next(answer.iter_lines())
    assert first.startswith((": block", ": stop", ": waiting"))
    until(lambda: is_idle(server))


def test_many_clients_at_once_get_what_each_gets_alone(server: ApiServer) -> None:
    draw = random.Random(3)
    asks: list[tuple[str, dict[str, Any]]] = []
    for number in range(64):
        settings: dict[str, Any] = {
            "max_tokens": draw.randint(1, 12),
            "temperature": draw.choice([0, 0.8]),
            "seed": number,
        }
        if number % 3 == 0:
            messages = [{"role": "user", "content": draw.choice(PROMPTS)}]
            asks.append(("chat/completions", {"messages": messages, **settings}))
        else:
            echo = {"echo": True, "logprobs": 1} if number % 3 == 1 else {"n": 2}
            asks.append(("completions", {"prompt": draw.choice(PROMPTS), **settings, **echo}))
    bad = [("completions", {"prompt": []}), ("chat/completions", {"messages": 3}), ("nothing", {})]

    def told(body: dict[str, Any]) -> list[Any]:
        return [choice.get("text", choice.get("message")) for choice in body["choices"]]

    async def all_at_once() -> tuple[list[Any], list[int]]:
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=80)) as client:

            async def ask(url: str, body: dict[str, Any]) -> httpx.Response:
                return await client.post(f"{server.url}/{url}", json=body)

            answers = await asyncio.gather(*(ask(*one) for one in asks + bad))
            good = [answer.json() for answer in answers[: len(asks)]]
            return [told(one) for one in good], [answer.status_code for answer in answers[len(asks) :]]

    together, statuses = asyncio.run(all_at_once())
    assert statuses == [400, 400, 404]
    with httpx.Client(timeout=300) as client:
        alone = [told(client.post(f"{server.url}/{url}", json=body).json()) for url, body in asks]
    assert together == alone


def test_a_body_or_a_text_that_is_far_too_large_is_refused_and_takes_little_memory(server: ApiServer) -> None:
    before = server.metrics()["slowllm_peak_rss_bytes"]
    piece = b" " * (1 << 20)
    headers = {"Content-Type": "application/json"}
    for content in (b" " * 100_000_000, (piece for _ in range(100))):
        answer = httpx.post(f"{server.url}/completions", content=content, headers=headers, timeout=60)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert server.metrics()["slowllm_peak_rss_bytes"] < before + (64 << 20)
    answer = httpx.post(f"{server.url}/completions", json={"prompt": "value " * 600_000}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    # As much as the plan leaves to bodies and what is made of them.
    assert server.metrics()["slowllm_peak_rss_bytes"] < before + (160 << 20)
    assert is_idle(server)


def test_clients_that_send_slowly_are_hung_up_on_and_hold_nobody_up(
    processes: Processes, talkative: Path
) -> None:
    heads = [b"", b"POST /v1/comple", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"]
    body = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with (
        api_server(processes, talkative, "--head-seconds", 1, "--body-seconds", 1) as server,
        contextlib.ExitStack() as stack,
    ):
        slow = [stack.enter_context(socket.create_connection(server.address)) for _ in range(60)]
        for number, one in enumerate(slow):
            one.settimeout(60)
            one.sendall([*heads, body][number % 4])
        assert server.status()["status"] == "ok"
        with server.client() as client:
            assert client.completions.create(model="any", prompt="The value", max_tokens=2).choices
        for number, one in enumerate(slow):
            told = b""
            with contextlib.suppress(ConnectionError):
                while part := one.recv(4096):
                    told += part
            assert told.startswith(b"HTTP/1.1 408") if number % 4 == 3 else told == b""
        assert server.status()["status"] == "ok"


def test_a_signal_lets_requests_end(processes: Processes, talkative: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with api_server(processes, talkative, "--stream-all") as server:
            found: list[httpx.Response] = []
            ask = {"prompt": "The value is", "max_tokens": 60, "temperature": 0}
            thread = threading.Thread(
                target=lambda url=server.url: found.append(
                    httpx.post(f"{url}/completions", json=ask, timeout=60)
                )
            )
            thread.start()
            until(lambda server=server: not is_idle(server))
            ended = server.end(number)
            thread.join()
            assert ended.returncode == 0, ended.stderr
            assert found[0].status_code == 200
            assert found[0].json()["usage"]["completion_tokens"] == 60
            assert "ending when all requests are answered" in ended.stderr


@pytest.mark.parametrize("options", [("--drain", 0), ("--drain", 600)])
def test_a_second_signal_ends_requests_at_once(options: Any, processes: Processes, talkative: Path) -> None:
    with api_server(processes, talkative, "--stream-all", *options) as server:
        with httpx.stream(
            "POST", f"{server.url}/completions", json={**FOREVER, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            server.process_signal(signal.SIGTERM)
            if options[1]:
                until(lambda: server.status()["status"] == "ending")
                refused = httpx.post(f"{server.url}/completions", json=FOREVER, timeout=60)
                assert refused.status_code == 503
                server.process_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert "server_shutting_down" in last
        ended = server.wait()
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.endswith("ended\n")


def test_a_key_is_asked_for(processes: Processes, talkative: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("an-api-key-of-32-letters-or-more\n")
    file.chmod(0o600)
    with api_server(processes, talkative, "--api-key-file", file) as server:
        with (
            server.client() as stranger,
            pytest.raises(openai.AuthenticationError, match="asks for its API key"),
        ):
            stranger.models.list()
        with server.client(api_key=file.read_text().strip()) as client:
            assert client.models.list().data


def test_a_swarm_may_compute_the_blocks(server: ApiServer, processes: Processes, talkative: Path) -> None:
    ask = {"prompt": PROMPTS, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
    wanted = httpx.post(f"{server.url}/completions", json=ask, timeout=120).json()["choices"]
    with serving(talkative, "0:10", backward=False) as span:
        address = str(span.network.addresses[0])
        with api_server(processes, talkative, "--swarm", address) as client:
            found = httpx.post(f"{client.url}/completions", json=ask, timeout=120).json()["choices"]
    for one, other in zip(found, wanted, strict=True):
        assert one["text"] == other["text"]
        pairs = zip(
            one["logprobs"]["token_logprobs"][1:], other["logprobs"]["token_logprobs"][1:], strict=True
        )
        assert all(mine == pytest.approx(theirs, abs=2e-4) for mine, theirs in pairs)


def test_the_description_survives_schemathesis(processes: Processes, talkative: Path, tmp_path: Path) -> None:
    with api_server(processes, talkative, "--context", 40, "--max-tokens", 400) as server:
        root = server.url.removesuffix("/v1")
        described = httpx.get(f"{root}/openapi.json").json()
        # Texts are made at random, and without these most of them would be continued for long, or refused.
        for path in ("/v1/completions", "/v1/chat/completions"):
            schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            schema["required"].append("max_tokens")
            for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("n", 3)):
                if name in schema["properties"]:
                    schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": most}
        file = tmp_path / "openapi.json"
        file.write_text(json.dumps(described))
        ended = subprocess.run(
            [
                Path(sys.executable).parent / "schemathesis", "run", file, "--url", root,
                "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
                "--max-examples", "50", "--seed", "1", "--no-color", "--request-timeout", "120",
            ],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
        metrics = server.metrics()
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert metrics[f'slowllm_requests_total{{endpoint="{path}",status="200"}}'] > 10
        until(lambda: is_idle(server))


def test_a_later_server_finds_a_conversation_on_disk(
    processes: Processes, talkative: Path, tmp_path: Path
) -> None:
    cache, ask = tmp_path / "cache", {"model": "any", "max_tokens": 24, "temperature": 0}
    options = ("--stream-all", "--max-tokens", 512, "--cache", cache, "--cache-size", "1MiB")
    with api_server(processes, talkative, *options) as server, server.client() as client:
        first = client.completions.create(prompt=" ".join(PROMPTS * 3), **ask).choices[0].text
    assert list(cache.rglob("*.safetensors"))
    prompt = " ".join(PROMPTS * 3) + first + " and"
    with api_server(processes, talkative, *options) as server, server.client() as client:
        found = client.completions.create(prompt=prompt, **ask)
        metrics = server.metrics()
    assert found.usage is not None
    assert metrics["slowllm_found_tokens_total"] >= 16
    assert (
        metrics["slowllm_prompt_tokens_total"]
        == found.usage.prompt_tokens - metrics["slowllm_found_tokens_total"]
    )
    with api_server(processes, talkative, "--max-tokens", 512) as server, server.client() as client:
        assert client.completions.create(prompt=prompt, **ask).choices[0].text == found.choices[0].text
