"""`slowllm serve` and `--swarm` refuse what cannot be used, each in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import slowllm
from slowllm.entrypoints.lm_eval_model import SlowLM
from slowllm.errors import CheckpointError, MissingBlocksError
from slowllm.swarm.client import SwarmOptions, options_of
from slowllm.swarm.routing import Wishes
from slowllm.swarm.server import Server
from tests.support.census import save_toy
from tests.support.command_line import refused, run
from tests.support.parted import OUTSIDE, parted, shard_of
from tests.support.paths import TINY_BLOOM
from tests.support.served import Served, save_model, texts
from tests.support.serving import serving
from tests.support.swarm_processes import SwarmProcesses

Refused = Callable[..., str]
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"
LOCAL = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--no-relay", "--ram", "3GiB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """A server of some of the model's blocks, with little room."""
    with serving(model, "0:4", cache_tokens=20, max_batch_tokens=30, backward=False, name="desk") as started:
        yield started


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Refused:
    """Run `slowllm serve`, which must refuse; return its sentence."""
    return lambda *arguments: refused(["serve", *arguments], monkeypatch, capsys)


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Refused:
    """Run `slowllm forward` on two words, which must refuse; return its sentence."""
    return lambda *arguments: refused(
        ["forward", "--ram", "3GiB", "--text", "The value", *arguments], monkeypatch, capsys
    )


def test_blocks_outside_of_the_model_are_refused(serve: Refused, model: Path) -> None:
    said = serve(model, "--blocks", "4:9", *LOCAL)
    assert said == "slowllm: blocks 4 to 8: the model has 6 blocks, numbered from 0 to 5"
    assert "'four' names no blocks; write 8:16" in serve(model, "--blocks", "four", *LOCAL)


def test_an_unknown_compression_is_refused(serve: Refused, model: Path) -> None:
    said = serve(model, "--blocks", "0:2", "--compression", "zip", *LOCAL)
    assert said == "slowllm: the compression 'zip' is none of none, bfloat16, float16, int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "abc"], "'abc' names no blocks; write 8:16"),
        (["--blocks", "auto", "--stream-all"], "as many blocks as stay in memory, and with --stream-all none do; say how many"),
        (["--public-name", "n" * 65], "has 65 letters, or some that cannot be printed; at most 64 that can are allowed"),
        (["--public-name", "a\x1b[2J"], "the public name"),
        (["--compression", "zip"], "the compression 'zip' is none of"),
        (["--dtype", "int3"], "dtype 'int3' is unknown"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--ram", "much"], "'much' is not a size"),
        (["--vram", "much"], "'much' is not a size"),
        (["--session-timeout", "inf"], "a session cannot end after inf s"),
        (["--drain", "inf"], "--drain inf: sessions cannot get that long; give a number of seconds"),
        (["--identity", "no/such/key"], "no/such: no such folder for --identity key"),
        (["--initial-peers", "/ip4/127.0.0.1/tcp/9/p2p/1111111111111111111"], "does not end in /p2p/ and a peer id"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_used_is_refused_before_anything_is_opened(
    arguments: list[str], message: str, serve: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "slowllm.swarm.server", None)  # importing it would fail
    assert message in serve("no-such-model", "--blocks", "0:2", *LOCAL, *arguments)


def test_options_are_checked_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; import slowllm.entrypoints.cli.app, slowllm.swarm.server_options; "
        "assert not {'torch', 'transformers', 'hivemind'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_smallest_budget_that_is_named_does(serve: Refused, model: Path) -> None:
    said = serve(model, "--blocks", "0:2", *LOCAL, "--ram", "100MiB")
    assert "gradients need more than that" in said
    named = said.partition("the smallest that would do is ")[2].partition(" ")[0]
    with serving(model, "0:2", ram=named, cache_tokens=4096, max_batch_tokens=2048) as server:
        # Whether gradients fit as well depends on how large this process was at either time.
        assert server.record().state == "online"


def test_a_plan_that_does_not_fit_is_refused_with_the_smallest_that_does(serve: Refused, model: Path) -> None:
    said = serve(model, "--blocks", "0:2", *LOCAL, "--ram", "64MiB")
    assert "a budget of 64MiB is too small for this model: the smallest that would do is" in said
    assert "tokens in the caches of sessions" in said


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        pytest.param("gemma3n_text", "hand over more than hidden states", marks=pytest.mark.long),
        ("deepseek_v4", "need token ids"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_by_its_family(
    architecture: str, why: str, serve: Refused, tmp_path: Path
) -> None:
    save_toy(architecture, tmp_path)
    said = serve(tmp_path, "--blocks", "0:2", *LOCAL)
    assert "cannot be cut between blocks" in said
    assert why in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "bloks = '0:2'",
            "'bloks' is no option of serve; there are allow-keys, announce-maddrs, attn-cache-size",
        ),
        ("model = 'x'", "'model' is no option of serve"),
        ("ram = {a = 1}", "ram takes one value"),
        ("ram = ", "cannot be read as TOML"),
        ("initial-peers = 5", "initial-peers takes a text, or a list of texts"),
        ("initial-peers = ['a', 5]", "initial-peers takes a text, or a list of texts"),
        ("initial-peers = 'nonsense'", "initial peer 'nonsense' is no multiaddress"),
    ],
)
def test_a_config_file_with_what_serve_does_not_take_is_refused(
    text: str, message: str, serve: Refused, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "serve.toml").write_text(text)
    assert message in serve(model, "--blocks", "0:2", "--config", tmp_path / "serve.toml")


def test_a_config_file_gives_options_and_the_command_line_wins(
    serve: Refused, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("compression = 'zip'\nblocks = '1:2'\nhost-maddrs = ['nonsense']\n")
    assert "'zip'" in serve(model, "--config", file)
    assert "'zap'" in serve(model, "--config", file, "--compression", "zap")
    assert "nonsense" in serve(model, "--config", file, "--compression", "none", "--ram", "3GiB")


def test_an_identity_in_use_is_refused(serve: Refused, model: Path, tmp_path: Path) -> None:
    with serving(model, "0:1", identity=tmp_path / "key"):
        said = serve(model, "--blocks", "0:2", *LOCAL, "--identity", tmp_path / "key")
    assert str(tmp_path / "key") in said
    assert "another" in said


def test_a_port_that_is_taken_is_refused(serve: Refused, model: Path, server: Server) -> None:
    address = server.network.addresses[0].partition("/p2p/")[0]
    said = serve(model, "--blocks", "0:2", "--no-relay", "--ram", "3GiB", "--host-maddrs", address)
    assert address in said


def test_nobody_at_an_address_is_named(forward: Refused, serve: Refused, model: Path) -> None:
    for said in (
        forward("--model", model, "--swarm", NOBODY),
        serve(model, "--blocks", "0:2", *LOCAL, "--initial-peers", NOBODY),
    ):
        assert f"no initial peer can be joined: {NOBODY}: nobody answers there" in said


def test_a_wrong_multiaddress_is_refused(forward: Refused, model: Path) -> None:
    said = forward("--model", model, "--swarm", "127.0.0.1:3000")
    assert "slowllm: --swarm '127.0.0.1:3000' is no multiaddress such as" in said
    said = forward("--model", model, "--swarm", "/ip4/127.0.0.1/tcp/3000")
    assert "--swarm '/ip4/127.0.0.1/tcp/3000' lacks its port or its peer id" in said


@pytest.mark.parametrize("option", ["--allowed-peers", "--blocked-peers"])
def test_what_is_no_peer_id_is_refused_by_the_option(option: str, forward: Refused, model: Path) -> None:
    said = forward("--model", model, "--swarm", NOBODY, option, "nonsense")
    assert said == (
        f"slowllm: {option} 'nonsense' is no peer id; copy what stands behind /p2p/ in the line that the server prints"
    )


def test_the_swarm_of_another_model_is_named(forward: Refused, server: Server) -> None:
    address = server.network.addresses[0]
    said = forward("--model", TINY_BLOOM, "--swarm", address)
    assert f"in the swarm of {address}: it is the swarm of another model" in said


def test_blocks_that_nobody_serves_are_named_with_the_servers(
    forward: Refused, model: Path, server: Server
) -> None:
    said = forward("--model", model, "--swarm", server.network.addresses[0])
    assert said == f"slowllm: nobody serves blocks 4:6 (desk ({server.network.peer[-6:]}) has 0:4)"


@pytest.fixture(scope="module")
def rest(model: Path, server: Server) -> Iterator[Server]:
    """A server of the other blocks."""
    with serving(model, "4:6", server.network.addresses[0], name="lamp") as started:
        yield started


def test_another_dtype_than_the_servers_is_refused(
    forward: Refused, model: Path, server: Server, rest: Server
) -> None:
    said = forward("--model", model, "--swarm", server.network.addresses[0], "--dtype", "bf16")
    assert (
        f"nobody serves blocks 0:6 (desk ({server.network.peer[-6:]}) has 0:4 but computes in float32" in said
    )
    assert "not bfloat16" in said


def test_a_client_says_what_it_asked_for_and_nothing_of_sweeps(
    model: Path, server: Server, rest: Server, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    common = ["--model", model, "--swarm", server.network.addresses[0], "--ram", "3GiB"]
    for arguments in (
        ["forward", "--text", "The value", "--json"], ["score", "--text", "The value"],
        ["generate", "The value", "--max-new-tokens", "3", "--json"],
    ):  # fmt: skip
        assert run([*arguments, *common], monkeypatch) == 0
        said = capsys.readouterr().err
        assert "of weights here, blocks in the swarm; " in said
        assert " requests to 2 servers in " in said
        assert "sweep" not in said
        assert "memory" not in said


def test_one_address_may_be_given_as_it_is(model: Path, server: Server, rest: Server) -> None:
    address = server.network.addresses[0]
    assert options_of(address) == options_of([address]) == SwarmOptions((address,))
    assert options_of(SwarmOptions((address,), timeout=3.0)).timeout == 3.0
    with slowllm.load(model, swarm=address, ram="3GiB") as lm:
        assert {record.name for record in lm.swarm.records()} == {"desk", "lamp"}
    client = SlowLM(pretrained=str(model), swarm=[address])
    assert client._swarm.peers == (address,)


def test_a_line_longer_than_a_server_takes_is_refused(
    forward: Refused, model: Path, server: Server, rest: Server
) -> None:
    said = forward("--model", model, "--swarm", server.network.addresses[0], "--text", "value " * 40)
    assert "takes 30 tokens a request, not" in said


def test_a_session_for_which_no_server_has_room_is_refused(
    model: Path, server: Server, rest: Server, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["generate", "value " * 21, "--model", model, "--swarm", server.network.addresses[0]]
    said = refused([*arguments, "--max-new-tokens", "3", "--ram", "3GiB"], monkeypatch, capsys)
    assert "keeps 20 tokens of sessions in all, not" in said


def test_gradients_that_no_server_computes_are_refused(
    model: Path, server: Server, rest: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "The value is", "answer": " returned."}))
    arguments = [
        "tune",
        tmp_path / "data.jsonl",
        "--out",
        tmp_path / "out",
        "--model",
        model,
        "--ram",
        "3GiB",
    ]
    said = refused([*arguments, "--steps", "1", "--swarm", server.network.addresses[0]], monkeypatch, capsys)
    assert "has 0:4 but computes no gradients" in said


def test_a_client_without_the_ends_is_refused_by_the_missing_shard(
    forward: Refused, model: Path, server: Server, rest: Server, tmp_path: Path
) -> None:
    folder = parted(model, tmp_path / "blocks", *(shard_of(block) for block in range(6)))
    said = forward("--model", folder, "--swarm", server.network.addresses[0])
    assert "outside.safetensors" in said
    assert "which is not there; fetch this shard" in said


def test_a_server_without_the_shard_of_a_block_is_refused(
    serve: Refused, model: Path, tmp_path: Path
) -> None:
    folder = parted(model, tmp_path / "some", shard_of(0))
    assert "block-1.safetensors" in serve(folder, "--blocks", "0:2", *LOCAL)


def test_a_server_that_can_neither_move_nor_go_back_ends_with_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, check = parted(model, tmp_path / "some", shard_of(0), shard_of(1)), Server.check

    def check_after_move(server: Server) -> None:
        (folder / shard_of(0)).unlink(missing_ok=True)
        with contextlib.suppress(CheckpointError):
            server.move(2, 3)
        check(server)

    monkeypatch.setattr(Server, "check", check_after_move)
    assert run(["serve", folder, "--blocks", "0:1", "--no-rebalance", *LOCAL], monkeypatch) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slowllm: ")]
    assert len(said) == 1
    assert "block-0.safetensors, which is not there; fetch this shard" in said[0]


def with_other_weights(model: Path, out: Path, block: int) -> Path:
    """Copy a checkpoint, with other weights in one block."""
    shutil.copytree(model, out)
    tensors = load_file(out / shard_of(block))
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()}, out / shard_of(block), {"format": "pt"}
    )
    return out


@pytest.mark.long
def test_a_server_with_other_weights_is_named_and_never_used(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = with_other_weights(model, tmp_path / "other", 4)
    ids, _ = texts()
    with (
        serving(model, "0:4") as first,
        serving(other, "3:6", first.network.addresses[0], name="odd") as odd,
    ):
        address = first.network.addresses[0]
        # A client that has the weights knows which ones are meant.
        known = Served(model, model, address, ())
        with pytest.raises(
            MissingBlocksError, match=r"nobody serves blocks 4:5 .*has other weights in blocks 4:5"
        ):
            known.load()
        with serving(model, "4:6", address), known.load() as lm, known.load_local() as local, torch.no_grad():
            named = f"odd ({odd.network.peer[-6:]}) is not used for blocks 4:5: its weights are others"
            assert [record.message for record in caplog.records].count(named) == 1
            for _ in range(4):
                assert torch.equal(lm.model(ids).logits, local.model(ids).logits)


@pytest.mark.long
def test_a_client_keeps_to_the_weights_that_it_found_first(model: Path, tmp_path: Path) -> None:
    other = with_other_weights(model, tmp_path / "other", 4)
    ends = parted(model, tmp_path / "ends", OUTSIDE)
    ids, _ = texts()
    with serving(model, "0:6") as first:
        address = first.network.addresses[0]
        with (
            Served(model, ends, address, ()).load() as lm,
            serving(other, "0:6", address, name="odd"),
            serving(other, "0:6", address, name="strange"),
            torch.no_grad(),
        ):
            before = lm.model(ids).logits
            lm.swarm.renew()  # the others are found
            for _ in range(4):
                assert torch.equal(lm.model(ids).logits, before)
            assert {record.name for record in lm.swarm.records()} == {"", "odd", "strange"}
            # So a state folder of a job in one swarm is not gone on with in another.
            wishes = Wishes(blocked={first.network.peer})
            with Served(model, ends, address, ()).load(swarm=SwarmOptions((address,), wishes)) as astray:
                assert astray.fingerprint() != lm.fingerprint()
                assert not torch.equal(astray.model(ids).logits, before)


def test_a_dry_run_does_not_plan_what_others_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert "leave one of them out" in refused(
        ["forward", "--model", model, "--dry-run", "--swarm", NOBODY, "--text", "x"], monkeypatch, capsys
    )


@pytest.mark.long
def test_a_server_that_was_stopped_for_a_while_goes_on_and_does_not_leave() -> None:
    program = """
import signal
from slowllm.entrypoints.cli.told_to_end import has_been_told_to_end
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
print("waits", flush=True)
print([number for number in range(200) if has_been_told_to_end(0.01)][:1] or "goes on", flush=True)
print(has_been_told_to_end(60.0), flush=True)
"""
    with SwarmProcesses() as processes:
        waits = processes.start("-c", program)
        assert waits.line == "waits\n"
        for _ in range(20):
            waits.freeze()
            threading.Event().wait(0.05)  # longer than it waits for a signal
            waits.thaw()
        assert waits.process.stdout.readline() == "goes on\n"
        os.kill(waits.process.pid, signal.SIGTERM)
        assert waits.process.stdout.readline() == "True\n"
        waits.wait()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_has_not_started_ends_when_it_is_told_to(number: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "slowllm", "serve", "embedded:tiny-bloom", "--blocks", "0:2", "--host-maddrs", "/ip4/127.0.0.1/tcp/0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        # From here on the signal waits to be asked for.
        blocked = Path(f"/proc/{started.pid}/status")
        while (
            not int(re.search(r"SigBlk:\s*(\w+)", blocked.read_text()).group(1), 16) & 1 << signal.SIGTERM - 1
        ):
            assert started.poll() is None
        started.send_signal(number)
        out, said = started.communicate(timeout=120)
    assert out == ""
    assert "interrupted before it has started" in said
    assert started.returncode == 130
