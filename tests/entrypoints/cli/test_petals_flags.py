"""The flags of Petals' run_server and run_dht: each is obeyed under its new name, or refused in one sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from slowllm.entrypoints.cli.app import app
from slowllm.entrypoints.cli.petals_flags import DHT_FLAGS, SERVER_FLAGS, WITHOUT_VALUE, Flag, from_petals
from slowllm.errors import InputError
from tests.support.command_line import refused
from tests.support.paths import ROOT

PEER = "/ip4/127.0.0.1/tcp/9/p2p/QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"


def test_a_servers_flags_are_taken_under_their_old_names() -> None:
    words = "serve bigscience/bloom --num_blocks 8 --torch_dtype=float32 --attn_cache_tokens 4096 --initial_peers PEER PEER"
    words += " --compression BLOCKWISE_8BIT --identity_path server.id --max_batch_size 512 --public_name desk"
    arguments, said = from_petals(f"{words} --step_timeout 300 --ram 8GiB".replace("PEER", PEER).split())
    assert arguments == [
        "serve", "bigscience/bloom", "--blocks", "8", "--dtype", "float32", "--attn-cache-tokens", "4096",
        "--initial-peers", PEER, "--initial-peers", PEER, "--compression", "int8", "--identity", "server.id",
        "--max-batch-tokens", "512", "--public-name", "desk", "--session-timeout", "300", "--ram", "8GiB",
    ]  # fmt: skip
    assert len(said) == 9
    assert said[0] == "--num_blocks is --blocks N here"


def test_a_cache_in_bytes_and_an_announced_rate_are_taken() -> None:
    arguments, said = from_petals(
        ["serve", "m", "--num_blocks", "2", "--attn_cache_size", "1.0 GiB", "--throughput", "dry_run"]
    )
    assert arguments == [
        "serve", "m", "--blocks", "2", "--attn-cache-size", "1.0 GiB", "--throughput", "dry_run",
    ]  # fmt: skip
    assert said[1].startswith("--attn_cache_size is --attn-cache-size: bytes of the keys and values")
    assert said[2].startswith(
        "--throughput is --throughput: auto and eval measure at each start, dry_run prints"
    )


def test_a_port_listens_at_all_interfaces_and_is_announced_with_a_public_address() -> None:
    arguments, _ = from_petals(
        ["serve", "m", "--block_indices", "0:5", "--port", "31337", "--public_ip", "1.2.3.4"]
    )
    assert arguments == [
        "serve", "m", "--blocks", "0:5", "--host-maddrs", "/ip4/0.0.0.0/tcp/31337", "--host-maddrs",
        "/ip6/::/tcp/31337", "--announce-maddrs", "/ip4/1.2.3.4/tcp/31337",
    ]  # fmt: skip


def test_a_model_is_found_among_flags_and_gets_its_revision() -> None:
    arguments, _ = from_petals(
        ["serve", "-v", "--new_swarm", "--blocks", "2", "repo/name", "--revision", "main"]
    )
    assert arguments == ["serve", "repo/name@main", "-v", "--blocks", "2"]
    arguments, _ = from_petals(["serve", "--converted_model_name_or_path", "repo/name", "--blocks", "2"])
    assert arguments == ["serve", "repo/name", "--blocks", "2"]
    arguments, _ = from_petals(
        ["serve", "m", "--tensor_parallel_devices", "cuda:0", "cuda:1", "--blocks", "2"]
    )
    assert arguments == ["serve", "m", "--device", "cuda:0,cuda:1", "--blocks", "2"]


def test_flags_of_run_dht_are_taken() -> None:
    arguments, said = from_petals(
        ["dht", "--host_maddrs", "/ip4/0.0.0.0/tcp/1", "--identity_path", "a", "--no_relay"]
    )
    assert arguments == ["dht", "--host-maddrs", "/ip4/0.0.0.0/tcp/1", "--identity", "a", "--no-relay"]
    assert len(said) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["forward", "--num_blocks", "3"], ["serve", "m", "--blocks", "2", "--compression", "int8"],
        ["dht", "--host-maddrs", "/ip4/0.0.0.0/tcp/1"], ["dht", "--port", "3"],
    ],
)  # fmt: skip
def test_a_command_line_without_old_flags_stays_as_it_is(arguments: list[str]) -> None:
    assert from_petals(arguments) == (arguments, [])


@pytest.mark.parametrize(
    ("verb", "name", "flag"),
    [
        (verb, name, flag)
        for verb, flags in (("serve", SERVER_FLAGS), ("dht", DHT_FLAGS))
        for name, flag in flags.items()
        if flag.is_refused
    ],
)
def test_what_cannot_be_obeyed_is_refused_with_what_to_use_instead(verb: str, name: str, flag: Flag) -> None:
    with pytest.raises(InputError, match=f"{name} has no meaning here: .{{10,}}"):
        from_petals([verb, name, *["1"] * (flag.values != "0")])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num_blocks"], "--num_blocks takes a value; it is --blocks N here"),
        (["--port", "1", "--host_maddrs", "/ip4/0.0.0.0/tcp/1"], "--port and --host_maddrs both say where"),
        (["--public_ip", "1.2.3.4"], "--public_ip needs a --port"),
        (
            ["--public_ip", "1.2.3.4", "--port", "3", "--announce_maddrs", "x"],
            "--public_ip and --announce_maddrs both",
        ),
        (
            ["--new_swarm", "--initial_peers", PEER],
            "--new_swarm begins a swarm and --initial_peers joins one",
        ),
        (["--revision", "main"], "--revision needs the argument MODEL"),
    ],
)
def test_what_contradicts_itself_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        from_petals(["serve", *arguments])


def test_the_command_line_says_what_a_flag_is_here(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    said = refused(["serve", "m", "--load_in_8bit"], monkeypatch, capsys)
    assert said.startswith("slowllm: --load_in_8bit has no meaning here: write a store with slowllm convert")


def test_the_document_has_every_flag_with_these_words() -> None:
    document = (ROOT / "docs" / "petals.md").read_text()
    for flags in (SERVER_FLAGS, DHT_FLAGS):
        for name, flag in flags.items():
            words = f"refused: {flag.words}" if flag.is_refused else flag.words
            assert f"| `{name}` | {words} |" in document, name


@pytest.mark.parametrize("verb", ["serve", "dht"])
def test_it_is_known_which_options_take_no_value(verb: str) -> None:
    verbs: Any = typer.main.get_command(app)
    parameters = [one for one in verbs.commands[verb].params if getattr(one, "is_flag", False)]
    options = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
    assert options
    assert options <= WITHOUT_VALUE
