"""A server's metrics count requests by kind and outcome, and are read over HTTP at the one address that was given."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slowllm.errors import InputError, RemoteError
from slowllm.modeling.span import SpanCall
from slowllm.swarm import metrics_http
from slowllm.swarm.metrics import CONTENT_TYPE, KINDS, OTHER, OUTCOMES, RequestCounts, metrics_text
from slowllm.swarm.metrics_http import MOST_CONNECTIONS, parse_host_port, serving_metrics
from slowllm.swarm.network import Network
from slowllm.swarm.status import ServerStatus
from tests.support.served import save_model
from tests.support.serving import hidden_states, send, serving

SAMPLE = re.compile(r'slowllm_[a-z_]+(\{[a-z]+="\w+"(,[a-z]+="\w+")*\})? [0-9.e+-]+')


def request(**meta: Any) -> Any:
    ended: list[Any] = []
    tensors = {"hidden": torch.zeros(2, 3, 4)}
    return SimpleNamespace(meta=meta, tensors=tensors, ended=ended, add_end_callback=ended.append)


def test_requests_are_counted_by_kind_and_outcome_and_no_word_of_a_stranger_is_a_label() -> None:
    counts = RequestCounts()
    for op, outcome in (
        ("forward", "answered"), ("forward", "BusyError"), ("x" * 90, "InputError"), (["forward"], "OSError"),
    ):  # fmt: skip
        asked = request(op=op)
        counts.watch(asked)
        asked.ended[0](outcome, {"queue_seconds": 0.5, "compute_seconds": 2.0})
    assert counts.requests == {
        ("forward", "answered"): 1, ("forward", "BusyError"): 1, (OTHER, "InputError"): 1, (OTHER, OTHER): 1,
    }  # fmt: skip
    assert (counts.tokens, counts.compute_seconds) == ({"forward": 6}, {"forward": 2.0})
    text = metrics_text(ServerStatus(1, 2, 3, 4, 5, 6), counts, 9)
    assert 'slowllm_requests_total{kind="forward",outcome="BusyError"} 1' in text.splitlines()
    assert 'slowllm_queue_seconds_total{kind="forward"} 0.5' in text.splitlines()
    for line in text.splitlines():
        assert line.startswith(("# HELP slowllm_", "# TYPE slowllm_")) or SAMPLE.fullmatch(line), line
    for kind, outcome in counts.requests:
        assert kind in (*KINDS, OTHER)
        assert outcome in (*OUTCOMES, OTHER)


def test_metrics_of_a_server_are_read_over_http(tmp_path: Path) -> None:
    with serving(save_model(tmp_path), "0:2", cache_tokens=30) as server:
        with Network.open(host_maddrs=(), initial_peers=server.network.addresses) as network:
            hidden = hidden_states(64)
            send(network, server.network.peer, SpanCall(0, 2, hidden), "mine").result(60)
            with pytest.raises(RemoteError, match="SessionError"):
                send(network, server.network.peer, SpanCall(0, 2, hidden), "mine").result(60)
        with serving_metrics("127.0.0.1:0", CONTENT_TYPE, server.metrics) as url:
            with urllib.request.urlopen(url) as answer:
                assert answer.headers["Content-Type"] == CONTENT_TYPE
                lines = answer.read().decode().splitlines()
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url.replace("metrics", "secret"))
    assert 'slowllm_requests_total{kind="forward",outcome="answered"} 1' in lines
    assert 'slowllm_requests_total{kind="forward",outcome="SessionError"} 1' in lines
    assert 'slowllm_tokens_total{kind="forward"} 11' in lines
    assert "slowllm_sessions 1" in lines
    assert "slowllm_cache_tokens_free 19" in lines


@pytest.mark.parametrize(
    "text", ["", "9100", ":9100", "::1:9100", "127.0.0.1:", "127.0.0.1:65536", "a:b", "a:" + "9" * 5000]
)
def test_what_is_no_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is no HOST:PORT such as 127\.0\.0\.1:9100"):
        parse_host_port(text)


def test_hosts_are_names_or_numbers() -> None:
    assert parse_host_port("[::1]:9100") == ("::1", 9100)
    assert parse_host_port("localhost:0") == ("localhost", 0)


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(InputError, match=f"--metrics {address} cannot be listened at"),
            serving_metrics(address, CONTENT_TYPE, str),
        ):
            pass


def connect(url: str) -> socket.socket:
    host, _, port = url.split("/")[2].rpartition(":")
    return socket.create_connection((host, int(port)), 30)


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def test_silent_clients_keep_nobody_waiting_and_the_oldest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "REQUEST_SECONDS", math.inf)
    with contextlib.ExitStack() as held:
        with serving_metrics("127.0.0.1:0", CONTENT_TYPE, lambda: "all well") as url:
            silent = [held.enter_context(connect(url)) for _ in range(MOST_CONNECTIONS)]
            assert read(url) == "all well"
            assert silent[0].recv(1) == b""
            silent[1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert silent[1].recv(8) == b"HTTP/1.0"
        # The end has not waited for the others, which are told.
        assert silent[-1].recv(1) == b""


def test_a_request_that_drips_is_ended_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "REQUEST_SECONDS", 0.5)
    with serving_metrics("127.0.0.1:0", CONTENT_TYPE, lambda: "all well") as url, connect(url) as dripping:
        dripping.sendall(b"GET /metrics HTTP/1.0\r\nX: ")
        # Each byte by itself comes in time.
        dripping.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            while dripping.sendall(b"y") is None:
                with contextlib.suppress(TimeoutError):
                    assert dripping.recv(1) == b""
                    break


def test_clients_that_hang_up_are_not_spoken_of_and_errors_of_the_metrics_are(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def large() -> str:
        started.set()
        go_on.wait(30)
        return "x" * 50_000_000

    def broken() -> str:
        raise ArithmeticError("seven")

    with serving_metrics("127.0.0.1:0", CONTENT_TYPE, large) as url:
        with connect(url) as leaving:
            leaving.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert started.wait(30)
            threads = [one for one in threading.enumerate() if "process_request_thread" in one.name]
        go_on.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert threads
    assert (capsys.readouterr().err, caplog.messages) == ("", [])
    with serving_metrics("127.0.0.1:0", CONTENT_TYPE, broken) as url, pytest.raises(ConnectionError):
        read(url)
    assert caplog.messages == ["the metrics were not answered: ArithmeticError: seven"]
