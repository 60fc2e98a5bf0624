"""Answers of servers that are wrong, noisy or NaN are found at the calls that are checked, and the right ones are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slowllm.errors import (
    DisagreementError,
    InputError,
    MissingBlocksError,
    PeerError,
    PeerLostError,
    ProtocolError,
)
from slowllm.modeling.remote_spans import Hop, Kept
from slowllm.modeling.span import SpanCall, SpanGrads
from slowllm.runtime.block_identity import block_hashes
from slowllm.storage.checkpoint import Checkpoint
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.routing import Wishes
from slowllm.swarm.server import Server
from slowllm.swarm.span_messages import unpack_outputs
from slowllm.swarm.spot_check import SpotCheck
from slowllm.swarm.tolerances import difference, tolerance
from slowllm.swarm.weights import weights_hash
from tests.support.parted import OUTSIDE, parted
from tests.support.served import GREEDY, Served, save_model, texts
from tests.support.serving import serving

A, B, C = "a" * 20, "b" * 20, "c" * 20
HOP = Hop(0, 2, A)
Tamper = Callable[[Tensor], Tensor]


class FewServers:
    """Servers whose blocks double what comes, plus the sum of what their session has had; some tamper with it."""

    def __init__(self, peers: Sequence[str] = (A, B, C), **tamper: Tamper) -> None:
        self.peers, self.tamper = list(peers), tamper
        self.sessions: dict[tuple[str, str], Tensor] = {}
        self.asked: list[str] = []
        self.banned: dict[str, float] = {}

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        self.asked.append(hop.peer)
        hidden = 2 * call.hidden
        if session is not None:
            held = self.sessions.get((hop.peer, session), torch.zeros(1, 1, 4))
            self.sessions[hop.peer, session] = held + call.hidden.sum(1, keepdim=True)
            hidden = hidden + held
        return {hop.end - 1: self.tamper.get(hop.peer[0], lambda x: x)(hidden)}

    def replay(
        self, calls: Sequence[SpanCall], hop: Hop, session: str, deadline: float, *, returns: bool
    ) -> list[dict[int, Tensor]]:
        return [self.forward(call, hop, session, deadline) for call in calls]

    def replicas(self, first: int, end: int) -> list[ServerRecord]:
        return [
            ServerRecord(peer, (), "m-2", 0, 2, "online", "float32", "1", ("0", "1"))
            for peer in self.peers
            if peer not in self.banned
        ]

    def route(
        self, first: int, need: Any, end: int | None = None, *, deadline: float = float("inf")
    ) -> list[Hop]:
        return [HOP]

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        return SpanGrads(grads[1], {}, {})

    def end_session(self, kept: Kept) -> Future[Any] | None:
        self.sessions.pop((kept.hop.peer, kept.session), None)
        return None

    def soon(self, work: Callable[[], object]) -> None:
        work()

    def ban(self, peer: str, until: float) -> None:
        self.banned[peer] = until

    def name_of(self, peer: str) -> str:
        return peer[0].upper()


def call(length: int = 0, seed: int = 0) -> SpanCall:
    hidden = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))
    return SpanCall(0, 2, hidden, length=length)


def right(one: SpanCall) -> Tensor:
    return 2 * one.hidden


def noisy(hidden: Tensor) -> Tensor:
    return hidden + 0.01 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))


def with_nan(hidden: Tensor) -> Tensor:
    return hidden.clone().index_fill_(1, torch.tensor([1]), float("nan"))


def test_servers_that_agree_are_asked_twice_and_nobody_is_banned() -> None:
    servers = FewServers()
    checked = SpotCheck(servers, 1.0, lambda: 0.0)
    assert torch.equal(checked.forward(call(), HOP, None, 0.0)[1], right(call()))
    assert servers.asked == [A, B]
    assert not servers.banned
    assert str(checked) == (
        "spot checks: 1 calls were computed twice, a block of 0 of them here, 0 answers were wrong, and 0 calls had no second "
        "server"
    )


def test_the_share_of_calls_is_checked() -> None:
    servers = FewServers()
    draws = iter(
        [0.2, 0.5, 0.1, 0.0, 0.3]
    )  # the second one that is below is followed by the choice of a server
    checked = SpotCheck(servers, 0.2, lambda: next(draws))
    for _ in range(4):
        checked.forward(call(), HOP, None, 0.0)
    assert servers.asked == [A, A, A, B, A]


@pytest.mark.parametrize(
    "tamper", [noisy, with_nan, lambda x: x * 1.01, torch.zeros_like, lambda x: x * 1e30]
)
def test_a_wrong_server_is_found_by_the_third_and_the_right_answer_is_used(
    tamper: Tamper, caplog: pytest.LogCaptureFixture
) -> None:
    servers = FewServers(a=tamper)
    checked = SpotCheck(servers, 1.0, lambda: 0.0)
    assert torch.equal(checked.forward(call(), HOP, None, 0.0)[1], right(call()))
    assert servers.banned == {A: float("inf")}
    (record,) = caplog.records
    assert "A and B disagree about blocks 0:2" in record.message
    assert (
        "A was alone with its answer when C was asked, and is not asked again in this run" in record.message
    )
    checked.ban(A, 5.0)  # a shorter ban does not let it back
    assert servers.banned == {A: float("inf")}


def test_a_wrong_second_server_is_found_as_well() -> None:
    servers = FewServers(b=noisy)
    checked = SpotCheck(servers, 1.0, lambda: 0.0)
    assert torch.equal(checked.forward(call(), HOP, None, 0.0)[1], right(call()))
    assert servers.banned == {B: float("inf")}


def test_where_nobody_can_decide_the_run_ends_with_both_names() -> None:
    for servers, why in (
        (
            FewServers((A, B), b=noisy),
            "A and B disagree .*, and nobody else who may be asked has these blocks",
        ),
        (FewServers(b=noisy, c=torch.zeros_like), "A and B disagree .*, and C says a third thing"),
    ):
        with pytest.raises(DisagreementError, match=why):
            SpotCheck(servers, 1.0, lambda: 0.0).forward(call(), HOP, None, 0.0)


def test_a_call_without_a_second_server_is_counted() -> None:
    checked = SpotCheck(FewServers((A,)), 1.0, lambda: 0.0)
    assert torch.equal(checked.forward(call(), HOP, None, 0.0)[1], right(call()))
    assert checked.verdicts.num_unchecked == 1


def lost(hidden: Tensor) -> Tensor:
    raise PeerLostError(B, "has died")


def test_a_second_server_that_dies_is_no_disagreement() -> None:
    servers = FewServers(b=lost)
    checked = SpotCheck(servers, 1.0, lambda: 0.0)
    for session in (None, "x"):
        assert torch.equal(checked.forward(call(), HOP, session, 0.0)[1], right(call()))
    assert not servers.banned
    assert checked.verdicts.num_unchecked == 2
    checked.end_session(Kept(HOP, "x"))
    assert not servers.sessions


def test_a_session_is_checked_in_all_of_its_steps_and_ended_at_both_servers() -> None:
    servers = FewServers()
    checked = SpotCheck(servers, 0.5, iter([0.4, 0.0, 0.9]).__next__)
    for step in range(3):
        checked.forward(call(3 * step, step), HOP, "x", 0.0)
    checked.forward(call(), HOP, "y", 0.0)
    assert servers.asked == [A, B] * 3 + [A]
    assert len(servers.sessions) == 3
    for name in "xy":
        checked.end_session(Kept(HOP, name))
    assert not servers.sessions


def test_a_session_at_a_server_that_turns_wrong_is_to_be_rebuilt_elsewhere() -> None:
    servers = FewServers()
    checked = SpotCheck(servers, 1.0, lambda: 0.0)
    checked.forward(call(), HOP, "x", 0.0)
    servers.tamper["a"] = noisy
    with pytest.raises(PeerError, match="was wrong at a spot check"):
        checked.forward(call(3, 1), HOP, "x", 0.0)
    assert servers.banned == {A: float("inf")}
    assert set(servers.sessions) == {(A, "x")}  # which failover ends
    # The session that is filled anew elsewhere is checked again.
    hop = Hop(0, 2, B)
    checked.replay([call()], hop, "z", 0.0, returns=False)
    servers.asked.clear()
    checked.forward(call(3, 1), hop, "z", 0.0)
    assert servers.asked == [B, C]


def test_a_session_whose_second_server_turns_wrong_goes_on() -> None:
    servers = FewServers()
    checked = SpotCheck(servers, 1.0, lambda: 0.0)
    checked.forward(call(), HOP, "x", 0.0)
    servers.tamper["b"] = with_nan
    expected = right(call(3, 1)) + call().hidden.sum(1, keepdim=True)
    assert torch.equal(checked.forward(call(3, 1), HOP, "x", 0.0)[1], expected)
    assert servers.banned == {B: float("inf")}
    assert set(servers.sessions) == {(A, "x")}


def test_padding_may_hold_anything() -> None:
    mask = torch.tensor([[0, 1, 1]])
    ours, theirs = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    theirs[0, 0] = float("nan")
    assert difference({1: ours}, {1: theirs}, mask) == 0.0
    assert difference({1: ours}, {1: theirs}, None) == float("inf")
    theirs[0, 2, 1] = 1.5
    assert difference({1: ours}, {1: theirs}, mask) == pytest.approx(1 / 3)


def test_the_tolerance_grows_with_what_rounds() -> None:
    assert tolerance("float32") < tolerance("float32", "none", "float16") < tolerance("bfloat16")
    assert tolerance("bfloat16", "int8", "int8") == pytest.approx(0.1 + 2**-5)


def test_an_answer_with_nan_is_refused_where_there_is_text() -> None:
    asked = SpanCall(0, 2, torch.ones(1, 3, 4), mask=torch.tensor([[0, 1, 1]]))
    answer = {"hidden.1": torch.ones(1, 3, 4)}
    answer["hidden.1"][0, 0] = float("nan")
    unpack_outputs(answer, asked)
    answer["hidden.1"][0, 2, 1] = float("inf")
    with pytest.raises(ProtocolError, match="has NaN or infinity in the hidden states behind block 1"):
        unpack_outputs(answer, asked)
    with pytest.raises(ProtocolError, match="has NaN or infinity"):
        unpack_outputs(answer, SpanCall(0, 2, torch.ones(1, 3, 4)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[list[Server]]:
    """Three servers of all blocks."""
    with serving(model, "0:6", name="first") as first:
        address = first.network.addresses[0]
        with serving(model, "0:6", address, name="second") as second, serving(model, "0:6", address) as third:
            yield [first, second, third]


@pytest.mark.long
def test_tokens_are_those_of_a_local_model_though_a_server_lies(
    model: Path, servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    liar = servers[1]
    compute = liar.spans.runner.forward
    monkeypatch.setattr(
        liar.spans.runner, "forward", lambda *given: {n: 1.1 * h for n, h in compute(*given).items()}
    )
    weights = weights_hash(list(block_hashes(Checkpoint.open(model), range(6)).values()))
    address = servers[0].network.addresses[0]
    served = Served(model, parted(model, tmp_path / "ends", OUTSIDE), address, ())
    options = SwarmOptions((address,), weights=weights, spot_check=1.0)
    ids, mask = texts()
    with served.load(swarm=options) as lm, served.load_local() as local, torch.no_grad():
        for _ in range(3):
            assert torch.equal(
                lm.model.generate(ids, attention_mask=mask, **GREEDY),
                local.model.generate(ids, attention_mask=mask, **GREEDY),
            )
            assert torch.equal(lm.model(ids).logits, local.model(ids).logits)
    warned = [
        record.message for record in caplog.records if "is not asked again in this run" in record.message
    ]
    assert len(warned) == 1
    assert f"second ({liar.network.peer[-6:]}) was alone" in warned[0]


def test_weights_that_nobody_has_are_said(model: Path, servers: list[Server], tmp_path: Path) -> None:
    address = servers[0].network.addresses[0]
    served = Served(model, parted(model, tmp_path / "ends", OUTSIDE), address, ())
    other = "0" * 32
    with pytest.raises(
        MissingBlocksError,
        match=f"no servers have the blocks of --weights {other}; .* have those of {servers[0].weights}",
    ):
        served.load(swarm=SwarmOptions((address,), weights=other))
    with pytest.raises(InputError, match="weights 'abc' is no word of 32 hexadecimal digits"):
        SwarmOptions((address,), weights="abc")
    with pytest.raises(
        InputError, match=f"own folder are {servers[0].weights}, not the {other} of --weights"
    ):
        Served(model, model, address, ()).load(swarm=SwarmOptions((address,), weights=other))
    with pytest.raises(InputError, match=r"spot_check=2\.0 is no share; give a number from 0 to 1"):
        SwarmOptions((address,), Wishes(), spot_check=2.0)
