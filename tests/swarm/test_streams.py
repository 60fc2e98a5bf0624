"""Requests over one stream of bytes, without a network: order, room, silence, faults, and any bytes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import InputError, PeerLostError, PeerTimeoutError, ProtocolError, RemoteError
from slowllm.swarm.messages import Meta, decode, encode
from slowllm.swarm.requests import PeerRequest, StreamServer, unpack_answer
from slowllm.swarm.stream_pool import StreamPool
from slowllm.swarm.streams import BEAT, Limits, Stream
from tests.support.properties import num_examples
from tests.support.stream_pairs import QUICK, ask, first_prefix, pair, run, with_server


def test_a_stream_carries_one_request_after_the_other() -> None:
    async def work(stream: Stream) -> None:
        for n in range(20):
            meta, tensors = await ask(stream, {"n": n}, {"x": torch.arange(n)})
            assert meta == {"n": n, "peer": "C"}
            assert torch.equal(tensors["x"], torch.arange(n))

    with_server(
        lambda request: request.respond({**request.meta, "peer": request.peer}, request.tensors), work
    )


def test_an_answer_is_given_once_and_errors_after_it_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    def handler(request: PeerRequest) -> None:
        request.respond()
        with pytest.raises(AssertionError, match="a request was answered twice"):
            request.respond()
        raise ValueError("late")

    async def work(stream: Stream) -> None:
        assert (await ask(stream, {}))[0] == {}

    with caplog.at_level(logging.ERROR):
        with_server(handler, work)
    assert "failed after its answer" in caplog.text


def test_an_answer_that_cannot_be_sent_can_still_be_an_error() -> None:
    def handler(request: PeerRequest) -> None:
        with pytest.raises(ProtocolError, match="more than the 1,048,576 that the peer takes"):
            request.respond({}, {"x": torch.zeros(1 << 20)})
        request.fail(InputError("too much"))

    async def work(stream: Stream) -> None:
        with pytest.raises(RemoteError, match="answers InputError: too much"):
            await ask(stream, {})
        with pytest.raises(RemoteError, match="answers InputError: too much"):
            await ask(stream, {})

    with_server(handler, work)


def test_a_peer_that_leaves_cancels_its_request_once_and_frees_what_it_held() -> None:
    requests: list[PeerRequest] = []
    told: list[str] = []

    async def work(stream: Stream) -> None:
        waiting = asyncio.create_task(ask(stream, {"op": "wait"}, {"x": torch.zeros(100)}))
        while not requests:
            await asyncio.sleep(0)
        waiting.cancel()
        stream.close()
        while not told:
            await asyncio.sleep(0)
        (request,) = requests
        assert request.is_cancelled
        request.add_cancel_callback(lambda: told.append("late"))
        request.respond()  # nobody waits, and nothing happens

    def handler(request: PeerRequest) -> None:
        requests.append(request)
        request.add_cancel_callback(lambda: told.append("first"))

    with_server(handler, work)
    assert told == ["first", "late"]
    assert requests[0].tensors == {}


def test_a_coroutine_that_handles_a_request_is_cancelled_with_it() -> None:
    ended: list[bool] = []
    begun = asyncio.Event()

    async def handler(request: PeerRequest) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request.is_cancelled)

    async def work(stream: Stream) -> None:
        waiting = asyncio.create_task(ask(stream, {}))
        await begun.wait()
        waiting.cancel()
        stream.close()

    with_server(handler, work)
    assert ended == [True]


def test_beats_come_while_there_is_no_answer_and_none_within_it() -> None:
    async def handler(request: PeerRequest) -> None:
        await asyncio.sleep(3 * QUICK.silence_seconds)
        request.respond({}, {"x": torch.zeros(200_000, dtype=torch.uint8)})

    async def work(stream: Stream) -> None:
        _, tensors = await ask(stream, {})
        assert not tensors["x"].any()

    with_server(handler, work)


def test_silence_and_the_end_of_a_stream_are_told_apart() -> None:
    async def work() -> None:
        ours, theirs = await pair()
        with pytest.raises(PeerTimeoutError, match=r"peer P: has been silent for 0\.4 s"):
            await ask(ours, {})
        theirs.close()
        ours, theirs = await pair()
        theirs.close()
        with pytest.raises(PeerLostError, match="the connection ended before it had answered"):
            await ask(ours, {})
        ours, theirs = await pair()
        await theirs.write([(1000).to_bytes(8, "big") + b"begun"])
        asyncio.get_running_loop().call_later(0.1, theirs.close)
        with pytest.raises(PeerLostError, match="the connection ended before it had answered"):
            await ask(ours, {})
        ours, theirs = await pair()
        await theirs.write([(1 << 40).to_bytes(8, "big")])
        with pytest.raises(ProtocolError, match="claims 1,099,511,627,776 bytes"):
            await ask(ours, {})

    run(work)


def test_a_client_that_stops_in_the_middle_of_its_request_is_left() -> None:
    async def work(stream: Stream) -> None:
        await stream.write([(1000).to_bytes(8, "big") + b"begun"])
        with pytest.raises(EOFError):
            await first_prefix(stream)

    with_server(lambda request: request.respond(), work)


def test_a_request_before_the_answer_to_the_last_one_ends_the_stream() -> None:
    async def work(stream: Stream) -> None:
        await stream.write([*encode({"request": {}}), *encode({"request": {}})])
        with pytest.raises(EOFError):
            await first_prefix(stream)

    with_server(lambda request: None, work)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            (1 << 40).to_bytes(8, "big") + bytes(100),
            "ProtocolError: a message claims 1,099,511,627,776 bytes, more than",
        ),
        (bytes(8), "ProtocolError: a message of 0 bytes has no header"),
        (b"".join(encode({"answer": {}})), "ProtocolError: a message is no request"),
    ],
)
def test_a_fault_of_the_client_is_its_answer(data: bytes, match: str) -> None:
    async def work(stream: Stream) -> None:
        await stream.write([data])
        length = int.from_bytes(await first_prefix(stream), "big")
        said, _ = decode(await stream.read_body(length))
        with pytest.raises(RemoteError, match=match):
            unpack_answer("P", said)

    with_server(lambda request: request.respond(), work)


@given(
    st.lists(
        st.binary(max_size=40)
        | st.just(b"".join(encode({"request": {}})))
        | st.integers(0, 50).map(lambda n: n.to_bytes(8, "big")),
        max_size=6,
    )
)
@num_examples(150)
def test_any_bytes_of_a_client_end_its_stream_and_nothing_else(chunks: list[bytes]) -> None:
    async def work(stream: Stream) -> None:
        with suppress(OSError):
            await stream.write(chunks)

    with_server(lambda request: request.respond(), work)


@given(
    st.lists(
        st.binary(max_size=40)
        | st.just(BEAT)
        | st.just(b"".join(encode({"answer": {}})))
        | st.just(b"".join(encode({"error": ["A", "b"]}))),
        max_size=4,
    )
)
@num_examples(150)
def test_any_bytes_of_a_server_are_an_answer_or_an_error_that_names_it(chunks: list[bytes]) -> None:
    async def work() -> None:
        ours, theirs = await pair()
        await theirs.write(chunks)
        theirs._writer.write_eof()
        with suppress(PeerLostError, RemoteError, ProtocolError):
            assert (await ask(ours, {}))[0] == {}
        ours.close()
        theirs.close()

    run(work)


@pytest.mark.parametrize("said", [{}, {"answer": []}, {"error": "x"}, {"error": ["x"]}, {"error": [1, 2]}])
def test_what_is_neither_answer_nor_error_is_a_fault_of_the_peer(said: Meta) -> None:
    with pytest.raises(ProtocolError, match="peer P sends neither an answer nor an error"):
        unpack_answer("P", said)


def test_letters_of_strangers_do_not_reach_the_terminal() -> None:
    with pytest.raises(RemoteError) as caught:
        unpack_answer("P", {"error": ["A\x1b]0;", "b\r\n\u202e" * 2000]})
    assert str(caught.value).isprintable()
    assert len(caught.value.sentence) == 1000


def test_a_pool_uses_its_streams_again_and_opens_new_ones_for_those_that_ended() -> None:
    async def work() -> None:
        others: list[Stream] = []

        async def open_stream() -> Stream:
            ours, theirs = await pair()
            others.append(theirs)
            return ours

        pool = StreamPool(open_stream, 2)
        for _ in range(3):
            async with pool.stream() as first:
                pass
        assert len(others) == 1
        async with pool.stream() as again, pool.stream() as second:
            assert again is first
            assert second is not first
            waiting = asyncio.create_task(pool.stream().__aenter__())
            await asyncio.sleep(0)
            assert not waiting.done()  # two are allowed
        third = await waiting
        assert third in (first, second)
        assert len(others) == 2
        # One that failed is not used again, nor one that the other side closed.
        with pytest.raises(PeerLostError):
            async with pool.stream() as failed:
                raise PeerLostError("P", "x")
        assert failed.has_ended
        pool.close()

        pool = StreamPool(open_stream, 2)
        async with pool.stream() as ended:
            pass
        others[-1].close()
        while not ended.has_ended:
            await asyncio.sleep(0)
        async with pool.stream() as fresh:
            assert fresh is not ended
            pool.close()
            assert fresh.has_ended

    run(work)


def test_streams_of_one_peer_and_of_all_are_limited() -> None:
    async def work() -> None:
        server = StreamServer(lambda request: request.respond(), Limits(streams_per_peer=2, num_streams=3))
        tasks, ours = [], []
        for peer in ("A", "A", "A", "B", "C"):
            mine, theirs = await pair()
            ours.append(mine)
            tasks.append(asyncio.create_task(server.serve(peer, theirs)))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False, False, True, False, True]
        for stream in ours:
            stream.close()
        await asyncio.gather(*tasks)
        mine, theirs = await pair()
        task = asyncio.create_task(server.serve("A", theirs))
        assert (await ask(mine, {}))[0] == {}
        mine.close()
        await task

    run(work)


def test_a_stream_without_requests_is_closed_after_a_while() -> None:
    async def work() -> None:
        mine, theirs = await pair()
        server = StreamServer(lambda request: request.respond(), Limits(idle_seconds=0.05))
        await server.serve("A", theirs)
        with pytest.raises(EOFError):
            await mine.read_prefix()
        mine.close()

    run(work)
