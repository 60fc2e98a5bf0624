"""`slowllm dht` as a real process: what it prints, how others join by it, and how it ends."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from slowllm.swarm.network import Network
from tests.support.command_line import refused
from tests.support.swarm_processes import LOOPBACK, SwarmProcess, SwarmProcesses, wait_for_end


def start(swarm: SwarmProcesses, *options: object) -> SwarmProcess:
    """Start `slowllm dht` on the loopback."""
    return swarm.start("-m", "slowllm", "dht", "--host-maddrs", LOOPBACK, *options)


def test_others_join_by_the_line_that_it_prints_until_it_is_told_to_end(swarm: SwarmProcesses) -> None:
    first = start(swarm)
    second = start(swarm, "--initial-peers", first.line.strip())
    with Network.open(host_maddrs=(), initial_peers=[second.line.strip()]) as client:
        assert client.find("m-1") == []
    (child,) = _children(first)
    first.has_ended = True
    ended = first.process.end(signal.SIGINT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""  # besides the one line that was read
    assert "listens at 1 address; others join with --initial-peers and one that leads here" in ended.stderr
    assert ended.stderr.endswith("left the swarm\n")
    assert "Traceback" not in ended.stderr
    wait_for_end(child)
    assert second.stop().returncode == 0


@pytest.mark.long
def test_its_id_stays_the_same_with_its_identity_file(swarm: SwarmProcesses, tmp_path: Path) -> None:
    lines = []
    for _ in range(2):
        process = start(swarm, "--identity", tmp_path / "identity", "--no-relay")
        lines.append(process.line.rpartition("/")[2])
        assert process.stop().returncode == 0
    assert lines[0] == lines[1]


def _children(process: SwarmProcess) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(process.process.pid).children()]


def test_an_announced_address_is_printed(swarm: SwarmProcesses) -> None:
    process = start(swarm, "--announce-maddrs", "/ip4/203.0.113.7/tcp/31330")
    assert process.line.startswith("/ip4/203.0.113.7/tcp/31330/p2p/Qm")
    assert process.stop().returncode == 0


def test_each_address_is_a_line(swarm: SwarmProcesses) -> None:
    process = start(swarm, "--host-maddrs", "/ip4/127.0.0.1/udp/0/quic-v1")
    assert process.line.startswith("/ip4/127.0.0.1/tcp/")
    other = process.wait_for("/udp/")
    assert other.rpartition("/")[2] == process.line.rpartition("/")[2]
    with Network.open(host_maddrs=(), initial_peers=[other.strip()]) as client:
        assert client.find("m-1") == []
    assert process.stop().returncode == 0


PEER = "QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--initial-peers", "hello"], "initial peer 'hello' is no multiaddress such as"),
        (["--initial-peers", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", "--host-maddrs", LOOPBACK], f"no initial peer can be joined: /ip4/127.0.0.1/tcp/1/p2p/{PEER}: nobody answers there"),
        (["--identity", "no/such/folder"], "no such folder for --identity folder"),
        (["--identity", "README.md"], "README.md: is no identity file; name a file that `slowllm dht --identity` made"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_sentence(
    arguments: list[Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert said in refused(["dht", *arguments], monkeypatch, capsys)
