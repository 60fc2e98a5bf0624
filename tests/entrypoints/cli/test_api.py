"""`slowllm api` refuses what cannot be used, each in one sentence, and prints its plan."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest

from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.service_jobs import service_jobs
from slowllm.entrypoints.listening import listening_at
from slowllm.errors import InputError
from tests.support.command_line import refused

MODEL = "embedded:tiny-bloom"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model"),
        ([MODEL, "--ram", "much"], "'much' is not a size"),
        ([MODEL, "--drain", "inf"], "--drain inf: requests cannot get that long"),
        ([MODEL, "--body-seconds", "inf"], "--body-seconds inf: a client cannot be waited for that long"),
        ([MODEL, "--max-body", "10"], "--max-body 10: is too small for any request"),
        ([MODEL, "--cache-size", "much"], "'much' is not a size"),
        ([MODEL, "--cache", __file__], "test_api.py: is not a folder"),
        ([MODEL, "--api-key-file", "no/key"], "no/key: No such file or directory"),
        ([MODEL, "--host", "no such host"], "--host no such host: is no address of this machine"),
        ([MODEL, "--host", "203.0.113.7"], "cannot be listened at"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_before_anything_is_opened(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "slowllm.inference.service", None)  # importing it would fail
    assert message in refused(["api", *arguments], monkeypatch, capsys)


def test_a_port_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(["api", MODEL, "--port", port], monkeypatch, capsys)
    assert f"--host 127.0.0.1 --port {port}: cannot be listened at (Address already in use)" in said


def test_it_listens_at_ipv6_as_well() -> None:
    try:
        with listening_at("::1", 0) as bound:
            assert bound.getsockname()[0] == "::1"
    except InputError:
        pytest.skip("this machine has no IPv6")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else sys)
    assert "uvicorn is not installed; pip install 'slowllm[api]'" in refused(
        ["api", MODEL], monkeypatch, capsys
    )


def test_so_many_tokens_as_are_asked_for_are_planned() -> None:
    runner = Runner(MODEL, "4GiB", "cpu", None, "fp32")
    (job,) = service_jobs(runner, None, 1000, 8, None)
    assert job.packing is not None
    assert (job.packing[1], job.longest) == (1000, 1000)
    jobs = service_jobs(runner, None, None, 8, None)
    assert [(job.num_tokens, job.longest) for job in jobs][::4] == [(8192, 2048), (512, 512)]
    assert [job.num_tokens for job in service_jobs(runner, 2048, None, 8, None)] == [8192, 4096, 2048]
    with pytest.raises(InputError, match="100 tokens in all cannot hold 8 rows and a sequence of 200 tokens"):
        service_jobs(runner, 200, 100, 8, None)
    with pytest.raises(InputError, match="longer than the 2048 that the model takes"):
        service_jobs(runner, 3000, None, 8, None)
