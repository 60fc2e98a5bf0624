"""`slowllm swarm status` shows what real servers serve, as a table and as one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slowllm.runtime.block_identity import block_hashes
from slowllm.storage.checkpoint import Checkpoint
from slowllm.swarm.server import Server
from slowllm.swarm.weights import weights_hash
from tests.support.command_line import refused, run
from tests.support.served import save_model
from tests.support.serving import serving
from tests.support.swarm_processes import SwarmProcesses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[list[Server]]:
    """Two servers, of blocks 0 to 3 and 2 to 3."""
    with (
        serving(model, "0:4", name="desk") as desk,
        serving(model, "2:4", desk.network.addresses[0], name="lamp") as lamp,
    ):
        yield [desk, lamp]


def test_the_servers_of_a_swarm_are_shown_as_json(
    servers: list[Server], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    address = servers[0].network.addresses[0]
    for extra in ([], ["--model", model]):
        assert run(["swarm", "status", "--initial-peers", address, "--json", *extra], monkeypatch) == 0
        (shown,) = json.loads(capsys.readouterr().out)["models"]
        assert (shown["kind"], shown["num_blocks"], shown["missing"]) == ("llama", 6, [[4, 6]])
        assert shown["coverage"][:2] == [
            {"first": 0, "end": 2, "servers": 1}, {"first": 2, "end": 4, "servers": 2},
        ]  # fmt: skip
        assert [(one["name"], one["reached"], one["reached_by_others"]) for one in shown["servers"]] == [
            ("desk", True, True), ("lamp", True, True),
        ]  # fmt: skip


def test_the_table_names_servers_blocks_and_weights(
    servers: list[Server], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    address = servers[0].network.addresses[0]
    with serving(model, "4:6", address, name="rest"):
        assert run(["swarm", "status", "--initial-peers", address], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama of 6 blocks, ")
    assert lines[1] == "  served: 0:2 by 1, 2:4 by 2, 4:6 by 1"
    whole = weights_hash(list(block_hashes(Checkpoint.open(model), range(6)).values()))
    assert lines[2] == f"  weights: {whole}"
    for server, row in zip(servers, lines[4:], strict=False):
        served = server.spans.served
        label = f"({server.network.peer[-6:]})"
        assert row.split()[1:4] == [label, f"{served.first}:{served.end}", "online"]


def test_a_swarm_without_models_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from slowllm.swarm.network import Network

    with Network.open() as network:
        assert run(["swarm", "status", "--initial-peers", network.addresses[0]], monkeypatch) == 0
    assert capsys.readouterr().out == "no server of this swarm has named a model\n"


def test_a_swarm_with_a_token_is_seen_and_used_by_those_who_have_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    token = tmp_path / "swarm.token"
    token.write_text("a token of this swarm\n")
    token.chmod(0o600)
    key = ["--token-file", token]
    with serving(model, "0:6", token_file=token) as server:
        peer = server.network.addresses[0]
        asking = [
            "forward",
            "--model",
            model,
            "--ram",
            "3GiB",
            "--text",
            "The value",
            "--json",
            "--swarm",
            peer,
        ]
        assert run([*asking, *key, "--weights", server.weights], monkeypatch) == 0
        assert json.loads(capsys.readouterr().out)["num_tokens"] > 0
        status = ["swarm", "status", "--initial-peers", peer]
        assert run([*status, *key, "--json"], monkeypatch) == 0
        (shown,) = json.loads(capsys.readouterr().out)["models"]
        assert shown["weights"] == [server.weights]
        for arguments in (asking, status):
            said = refused(arguments, monkeypatch, capsys)
            assert said.endswith("; if the swarm has a token, give its file with --token-file")
        token.chmod(0o644)
        assert "may be read or written by others" in refused([*status, *key], monkeypatch, capsys)


def test_options_of_a_swarm_without_one_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for option in (
        ["--weights", "0" * 32],
        ["--spot-check", "0.5"],
        ["--token-file", "x"],
        ["--identity", "x"],
        ["--replay", "steps"],
        ["--timeout", "600"],
        ["--step-timeout", "20"],
        ["--allowed-peers", "x"],
        ["--blocked-peers", "x"],
        ["--spot-check", "0"],
        ["--weights", ""],
    ):
        said = refused(["forward", "--text", "x", *option], monkeypatch, capsys)
        assert f"{option[0]} is for a swarm; name it with --swarm" in said
    said = refused(["forward", "--text", "x", "--timeout", "5", "--replay", "fast"], monkeypatch, capsys)
    assert "--timeout and --replay are for a swarm; name it with --swarm" in said


def test_values_of_a_swarms_options_are_refused_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    peer = "/ip4/127.0.0.1/tcp/9/p2p/QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"
    for option, value, sentence in (
        ("--weights", "zz", "--weights 'zz' is no word of 32 hexadecimal digits"),
        ("--weights", "", "--weights '' is no word of 32 hexadecimal digits"),
        ("--timeout", "inf", "--timeout=inf is no time"),
        ("--step-timeout", "inf", "--step-timeout=inf is no time"),
        ("--replay", "slow", "--replay is steps or fast, not 'slow'"),
    ):
        said = refused(["forward", "--text", "x", "--swarm", peer, option, value], monkeypatch, capsys)
        assert sentence in said
    said = refused(["serve", "nowhere", "--blocks", "0:1", "--metrics", "foo"], monkeypatch, capsys)
    assert "--metrics 'foo' is no HOST:PORT" in said


@pytest.mark.long
def test_a_swarm_at_whose_address_nobody_listens_is_said_before_anything_heavy_is_loaded(
    swarm: SwarmProcesses,
) -> None:
    peer = "/ip4/127.0.0.1/tcp/9/p2p/QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"
    arguments = [
        "slowllm",
        "generate",
        "embedded:tiny-bloom",
        "Hello",
        "--max-new-tokens",
        "2",
        "--swarm",
        peer,
    ]
    said = f"slowllm: no initial peer can be joined: {peer}: nobody answers there\n"
    ended = swarm.run("-m", *arguments)
    assert (ended.returncode, ended.stderr) == (2, said)
    program = f"""
import sys
from slowllm.entrypoints.cli import app
sys.argv = {arguments!r}
try:
    app.run()
finally:
    print("torch" in sys.modules, "hivemind" in sys.modules)
"""
    alone = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert (alone.returncode, alone.stdout, alone.stderr) == (2, "False False\n", said)


@pytest.mark.long
def test_serve_logs_json_lines_and_answers_prometheus(model: Path, swarm: SwarmProcesses) -> None:
    server = swarm.serve(
        model,
        "0:2",
        "--metrics",
        "127.0.0.1:0",
        "--log-format",
        "json",
        "--allow-keys",
        "QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn",
    )
    ended = server.stop()
    assert ended.returncode == 0
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert any(line["message"].startswith("metrics at http://127.0.0.1:") for line in lines)
    assert lines[-1]["message"] == "left the swarm"


def test_a_swarm_must_be_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert "name a peer of the swarm with --initial-peers" in refused(
        ["swarm", "status"], monkeypatch, capsys
    )
