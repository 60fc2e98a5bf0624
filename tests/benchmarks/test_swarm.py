"""The benchmark of a swarm runs on a tiny model, quickly with servers in this process, at length with processes and a delay."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import delay_proxy, swarm, swarm_servers
from tests.support.serving import serving

TINY = [
    "--blocks", "3", "--width", "64", "--heads", "4", "--vocab", "64", "--tokens", "3", "--rounds", "1",
    "--forward-tokens", "20", "--threads", str(torch.get_num_threads()),
]  # fmt: skip


@contextlib.contextmanager
def in_this_process(model: Path, spans: Sequence[tuple[int, int]], *_: object, **__: object) -> Iterator[str]:
    """Serve spans from this process, as `swarm_servers.servers` does from others."""
    with contextlib.ExitStack() as held:
        address: list[str] = []
        for first, end in spans:
            server = held.enter_context(serving(model, f"{first}:{end}", *address))
            address = address or [server.network.addresses[0]]
        yield address[0]


Measured = Callable[..., dict[str, Any]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Measured:
    monkeypatch.setattr(swarm, "servers", in_this_process)

    def measure(*arguments: str) -> dict[str, Any]:
        swarm.main([*TINY, *arguments])
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    return measure


def check_report(report: dict[str, Any], delay_ms: float) -> None:
    assert report["verified"] is True
    for kind in swarm.WORK:
        limit, found = report[f"limit_{kind}_s"], report[f"swarm_{kind}_s"]
        assert limit == pytest.approx(report[f"plain_{kind}_s"] + report["servers"] * delay_ms / 1e3)
        assert report[f"swarm_{kind}_of_limit"] == pytest.approx(limit / found)
        shares = [
            report[f"swarm_{kind}_{share}_share"] for share in ("compute", "queue", "network", "client")
        ]
        assert sum(shares) == pytest.approx(1)
        assert all(share > 0 for share in shares)
    assert report["lookup_tokens_per_pass"] >= 1
    assert report["swarm_lookup_tokens_per_s"] > 0


def test_a_swarm_is_compared_with_one_machine_by_equal_bits(measured: Measured) -> None:
    check_report(measured("--servers", "2"), 0.0)


@pytest.mark.long
def test_servers_of_the_benchmark_are_processes_behind_a_delay(capsys: pytest.CaptureFixture[str]) -> None:
    swarm.main([*TINY, "--delay-ms", "4"])
    check_report(json.loads(capsys.readouterr().out.splitlines()[-1]), 4.0)


def test_a_swarm_whose_logits_differ_is_not_reported() -> None:
    def found(value: float) -> dict[str, swarm.Timed]:
        return {kind: swarm.Timed(1.0, swarm.Shares(), torch.full((1, 4), value)) for kind in swarm.WORK}

    swarm.check_equal(found(1.0), found(1.0), "swarm")
    with pytest.raises(SystemExit, match=r"not verified: prefill of swarm differs .* by up to 0\.5"):
        swarm.check_equal(found(1.0), found(1.5), "swarm")


@pytest.mark.long
def test_a_swarm_with_other_tokens_is_not_reported(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter([(1, 2, 3), (1, 2, 4)])
    monkeypatch.setattr(swarm, "generate", lambda *_, **__: (1.0, next(tokens), 1.0))
    with pytest.raises(SystemExit, match="not verified: the swarm's generate gives other tokens"):
        measured("--servers", "1")


@pytest.mark.long
def test_servers_that_read_while_they_are_measured_are_not_reported(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = iter([0, 1])
    monkeypatch.setattr(swarm, "bytes_read_by_servers", lambda _: next(read))
    with pytest.raises(SystemExit, match="not all blocks of the servers lie in memory"):
        measured("--servers", "1")


def test_a_server_that_cannot_start_ends_the_benchmark_with_what_it_said(tmp_path: Path) -> None:
    process = swarm_servers.launch(
        ["-c", "import sys; sys.exit('no such model')"], tmp_path / "log", threads=1
    )
    with pytest.raises(SystemExit, match="has ended:\nno such model"):
        swarm_servers.first_line(process, tmp_path / "log")
    swarm_servers.end(process)


@pytest.mark.parametrize(("num_blocks", "num_servers"), [(24, 3), (10, 3), (1, 1)])
def test_spans_cover_all_blocks(num_blocks: int, num_servers: int) -> None:
    spans = swarm_servers.spans_of(num_blocks, num_servers)
    assert [block for first, end in spans for block in range(first, end)] == list(range(num_blocks))
    assert len(spans) == num_servers


async def talk(sent: bytes) -> bytes:
    """Send bytes through a proxy to a server that returns them when their end has come; return what comes back."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        await writer.drain()
        writer.close()

    listened, port = swarm_servers.free_ports(2)
    async with (
        await asyncio.start_server(answer, delay_proxy.HOST, port),
        delay_proxy.forwarding([(listened, port)], 0.001),
    ):
        reader, writer = await asyncio.open_connection(delay_proxy.HOST, listened)
        writer.write(sent)
        await writer.drain()
        writer.write_eof()
        came = await reader.read()
        writer.close()
        await writer.wait_closed()
        return came


def test_a_delayed_connection_loses_nothing_and_ends_with_both_sides() -> None:
    sent = bytes(range(256)) * 4000
    assert asyncio.run(talk(sent)) == sent
