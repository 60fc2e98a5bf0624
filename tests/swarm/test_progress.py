"""What a server says of a request that it works on."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import PeerTimeoutError, ProtocolError
from slowllm.modeling.span import SpanCall
from slowllm.swarm.messages import MAX_MESSAGE_BYTES, body_bytes, encode
from slowllm.swarm.network import Network
from slowllm.swarm.progress import LOG_SECONDS, ProgressLog, RequestProgress
from slowllm.swarm.requests import PeerRequest
from slowllm.swarm.span_messages import SpanRequest, pack_request
from slowllm.swarm.streams import Limits, Stream, exchange
from tests.support.served import Served
from tests.support.serving import hidden_states, serving
from tests.support.stream_pairs import QUICK, with_server


@given(st.none() | st.integers(0, 60_000), st.integers(0, 60_000), st.none() | st.integers(0, 10_000_000))
def test_what_is_said_is_understood_and_is_no_length(
    block: int | None, num_ahead: int, seconds: int | None
) -> None:
    said = RequestProgress(block, num_ahead, None if seconds is None else float(seconds))
    prefix = said.to_prefix()
    assert RequestProgress.from_prefix(prefix) == said
    with pytest.raises(ProtocolError):
        body_bytes(prefix, MAX_MESSAGE_BYTES)


@given(st.integers(0, MAX_MESSAGE_BYTES))
def test_no_length_is_taken_for_progress(length: int) -> None:
    assert RequestProgress.from_prefix(length.to_bytes(8, "big")) is None


def test_numbers_that_are_too_large_are_the_largest() -> None:
    found = RequestProgress.from_prefix(RequestProgress(1 << 20, 1 << 20, 1e12).to_prefix())
    assert found == RequestProgress((1 << 16) - 2, (1 << 16) - 1, float((1 << 24) - 2))


def test_it_reads_well() -> None:
    assert str(RequestProgress(None, 2, 40.0)) == "waits for its first block, 2 before it, about 40 s left"
    assert str(RequestProgress(12, 0, None)) == "is at block 12"


def test_a_peer_hears_how_far_its_request_is_until_the_answer_comes() -> None:
    heard: list[RequestProgress] = []

    async def handler(request: PeerRequest) -> None:
        blocks = iter(range(1000))
        request.progress = lambda: RequestProgress(next(blocks), 0, None)
        async with asyncio.timeout(60):
            while len(heard) < 3:
                await asyncio.sleep(0.01)
        request.respond()

    async def work(stream: Stream) -> None:
        await exchange(stream, encode({"request": {}}), "P", QUICK, heard.append)
        await exchange(stream, encode({"request": {}}), "P", QUICK)

    with_server(handler, work)
    assert [said.block for said in heard][:3] == [0, 1, 2]


def test_the_log_has_a_line_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slowllm")
    times = iter([0.0, 1.0, LOG_SECONDS, LOG_SECONDS + 1, 2 * LOG_SECONDS])
    told = ProgressLog("desk", lambda: next(times))
    for block in range(4):
        told(RequestProgress(block, 0, 3.0))
    assert caplog.messages == [f"desk: the request is at block {block}, about 3 s left" for block in (1, 3)]


@pytest.mark.long
def test_a_server_that_takes_five_seconds_a_block_is_not_dead_after_two(served: Served) -> None:
    heard: list[RequestProgress] = []
    with (
        serving(served.whole, "1:4") as server,
        Network.open(
            host_maddrs=(), initial_peers=server.network.addresses, limits=Limits(silence_seconds=2.0)
        ) as client,
        server.lm.watching(lambda passage: threading.Event().wait(5.0) and None),
    ):
        meta, tensors = pack_request(SpanRequest(SpanCall(1, 4, hidden_states(64))))
        client.ask(server.network.peer, meta, tensors, on_progress=heard.append).result()
    assert {said.block for said in heard} >= {2, 3}
    assert len(heard) >= 10


@pytest.mark.long
def test_a_request_that_ran_out_of_time_says_where_it_was(served: Served) -> None:
    may_go_on = threading.Event()
    with (
        serving(served.whole, "1:4") as server,
        Network.open(host_maddrs=(), initial_peers=server.network.addresses) as client,
        server.lm.watching(lambda passage: may_go_on.wait(60) and None),
    ):
        meta, tensors = pack_request(SpanRequest(SpanCall(1, 4, hidden_states(64))))
        asked = client.ask(server.network.peer, meta, tensors, timeout=1.5)
        with pytest.raises(
            PeerTimeoutError, match=r"has not answered in 1.5 s; it is at block 2, about \d+ s left"
        ):
            asked.result()
        may_go_on.set()
