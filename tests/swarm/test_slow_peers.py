"""Clients that claim, send or read slowly are left in time, and hold up nobody meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from slowllm.swarm.messages import encode
from slowllm.swarm.requests import PeerRequest, StreamServer
from slowllm.swarm.streams import Stream
from tests.support.stream_pairs import QUICK, ask, first_prefix, pair, run, with_server


def test_who_claims_much_and_sends_little_holds_up_nobody() -> None:
    async def work() -> None:
        server = StreamServer(lambda request: request.respond(), replace(QUICK, silence_seconds=30))
        slow, tasks = [], []
        for peer in "ABC":
            mine, theirs = await pair()
            tasks.append(asyncio.create_task(server.serve(peer, theirs)))
            await mine.write([(QUICK.message_bytes).to_bytes(8, "big") + b"begun"])
            slow.append(mine)
        mine, theirs = await pair()
        tasks.append(asyncio.create_task(server.serve("D", theirs)))
        assert (await ask(mine, {}, {"x": torch.zeros(200_000)}))[0] == {}
        assert not any(task.done() for task in tasks)
        for stream in (*slow, mine):
            stream.close()
        await asyncio.gather(*tasks)

    run(work)


def test_a_client_that_sends_byte_by_byte_is_left() -> None:
    async def work(stream: Stream) -> None:
        await stream.write([(100_000).to_bytes(8, "big")])
        ended = asyncio.create_task(first_prefix(stream))
        with suppress(OSError):
            while not ended.done():
                await stream.write([b"x"])
                await asyncio.sleep(QUICK.silence_seconds / 10)
        with pytest.raises((EOFError, OSError)):
            await ended

    with_server(lambda request: request.respond(), work)


def test_a_client_that_hardly_reads_its_answer_is_left() -> None:
    async def work() -> None:
        mine, theirs = await pair()
        server = StreamServer(
            lambda request: request.respond({}, {"x": torch.zeros(200_000)}), replace(QUICK, least_rate=1e6)
        )
        serving = asyncio.create_task(server.serve("C", theirs))
        await mine.write(encode({"request": {}}))
        while not serving.done():  # at a tenth of the rate, never silent
            await mine._reader.read(4000)
            await asyncio.sleep(QUICK.silence_seconds / 10)
        mine.close()

    run(work)


def test_waiting_for_room_is_not_the_clients_silence() -> None:
    waiting: list[PeerRequest] = []

    async def work() -> None:
        server = StreamServer(
            waiting.append, replace(QUICK, held_bytes=QUICK.message_bytes, silence_seconds=0.2)
        )
        streams = [await pair() for _ in "AB"]
        tasks = [
            asyncio.create_task(server.serve(peer, theirs))
            for peer, (_, theirs) in zip("AB", streams, strict=True)
        ]
        asked = [asyncio.create_task(ask(mine, {}, {"x": torch.zeros(200_000)})) for mine, _ in streams]
        while not waiting:
            await asyncio.sleep(0)
        await asyncio.sleep(0.5)
        for number in range(2):
            while len(waiting) <= number:
                await asyncio.sleep(0)
            waiting[number].respond()
        await asyncio.gather(*asked)
        for mine, _ in streams:
            mine.close()
        await asyncio.gather(*tasks)

    run(work)
