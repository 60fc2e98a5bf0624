"""Serving the page: its address, its end, and that nothing goes to any other machine."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import urllib.parse
import urllib.request
from typing import Any

import pytest

from slowllm.entrypoints.listening import listening_at, url_of
from slowllm.entrypoints.web.bodies import BoundedBodies
from slowllm.entrypoints.web.running import PageServer, quiet_gradio
from slowllm.errors import InputError
from tests.support.memory_stops import until


def test_an_address_in_use_or_of_another_machine_is_refused() -> None:
    with listening_at("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url_of(bound) == f"http://127.0.0.1:{port}/"
        with (
            pytest.raises(InputError, match=f"--port {port}: cannot be listened at .*in use.*another --port"),
            listening_at("127.0.0.1", port),
        ):
            pass
    with (
        pytest.raises(InputError, match=r"--host no\.such\.host\.invalid: is no address of this machine"),
        listening_at("no.such.host.invalid", 0),
    ):
        pass


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 on this machine")
def test_an_address_of_ipv6_is_written_as_browsers_read_it() -> None:
    with listening_at("::1", 0) as bound:
        assert url_of(bound) == f"http://[::1]:{bound.getsockname()[1]}/"


async def _application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})


def test_the_server_serves_until_its_context_ends_and_says_when_it_ended_by_itself() -> None:
    ended = list[bool]()
    with (
        listening_at("127.0.0.1", 0) as bound,
        PageServer(_application, bound, lambda: ended.append(True)) as server,
    ):
        with urllib.request.urlopen(url_of(bound)) as answer:
            assert answer.read() == b"here"
        server.check()
    assert ended == [True]
    with pytest.raises(RuntimeError, match="the page's server has ended by itself"):
        server.check()


def status_of(url: str, body: Any, **headers: str) -> int:
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc)
    with contextlib.closing(connection):
        # The server may answer, and hang up, before it has got the body.
        with contextlib.suppress(BrokenPipeError):
            connection.request("GET" if body is None else "POST", "/", body, headers)
        return connection.getresponse().status


def test_bodies_that_the_page_does_not_send_are_not_read() -> None:
    app = BoundedBodies(_application, 10)
    with listening_at("127.0.0.1", 0) as bound, PageServer(app, bound, lambda: None):
        url = url_of(bound)
        assert status_of(url, b"0123456789") == 200
        assert status_of(url, b"0123456789a") == 413
        assert status_of(url, iter([b"0"])) == 411  # in chunks
        assert status_of(url, None) == 200


def test_what_ends_the_server_is_raised_where_it_is_looked_for() -> None:
    with listening_at("127.0.0.1", 0) as bound:
        other = socket.socket()
        other.close()
        with PageServer(_application, other, lambda: None) as server:

            def has_failed() -> bool:
                try:
                    server.check()
                except OSError:
                    return True
                return False

            until(has_failed)
        assert bound


def test_gradio_is_told_to_send_nothing_and_its_files_are_deleted(monkeypatch: Any) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with quiet_gradio() as folder:
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "upload").write_text("of a visitor")
    assert not folder.exists()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"
    assert "GRADIO_TEMP_DIR" not in os.environ
