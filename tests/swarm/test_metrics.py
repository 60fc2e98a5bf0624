"""A server's metrics count requests by kind and outcome, and are read over HTTP at the one address that was given."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slowllm.errors import InputError, RemoteError
from slowllm.modeling.span import SpanCall
from slowllm.swarm.metrics import CONTENT_TYPE, KINDS, OTHER, OUTCOMES, RequestCounts, metrics_text
from slowllm.swarm.metrics_http import parse_host_port, serving_metrics
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


@pytest.mark.parametrize("text", ["", "9100", ":9100", "::1:9100", "127.0.0.1:", "127.0.0.1:65536", "a:b"])
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
