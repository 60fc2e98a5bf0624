"""Room for messages: given as they come and in order, never more than there is, and never so that none can end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from slowllm.swarm.room import SMALL_BYTES, Place, Room
from tests.support.properties import num_examples

MIB = 1 << 20


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a loop of its own."""

    async def whole() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(whole())


async def settle() -> None:
    """Let every task go on as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Visitors:
    """Messages in a room, each in a task of its own, which stay until they are told to leave."""

    def __init__(self, room: Room) -> None:
        self.room, self.inside = room, list[str]()
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, length: int, peer: str = "A") -> None:
        """Let a message come, all at once, and wait until it is in the room or waits for it."""
        self._ends[name] = asyncio.Event()

        async def visit() -> None:
            with self.room.place(peer, length) as place:
                await place.take(length)
                self.inside.append(name)
                await self._ends[name].wait()
            self.inside.remove(name)

        self.tasks[name] = asyncio.create_task(visit())
        await settle()

    async def leave(self, name: str) -> None:
        """Let a message leave, from the room or from before its door."""
        if name in self.inside:
            self._ends[name].set()
        else:
            self.tasks[name].cancel()
        await settle()


def test_room_is_given_in_order_and_comes_back() -> None:
    async def work() -> None:
        visitors = Visitors(Room(3 * MIB))
        for name, size in (("first", 2), ("large", 2), ("next", 1), ("last", 1)):
            await visitors.come(name, size * MIB)
        await visitors.come("small", SMALL_BYTES)
        # The third would fit, but waits its turn; what is small never waits.
        assert visitors.inside == ["first", "small"]
        await visitors.leave("large")
        assert visitors.inside == ["first", "small", "next"]
        await visitors.leave("first")
        assert visitors.inside == ["small", "next", "last"]
        for name in ("small", "next", "last"):
            await visitors.leave(name)
        await visitors.come("all of it", 3 * MIB)
        assert visitors.inside == ["all of it"]
        await visitors.leave("all of it")

    run(work)


def test_room_that_was_given_to_one_who_has_left_comes_back() -> None:
    async def work() -> None:
        room = Room(MIB)

        async def hold() -> None:
            with room.place("A", MIB) as place:
                await place.take(MIB)

        with room.place("A", MIB) as place:
            await place.take(MIB)
            task = asyncio.create_task(hold())
            await asyncio.sleep(0)
        task.cancel()  # it has the room, and has not yet run
        await asyncio.gather(task, return_exceptions=True)
        await hold()

    run(work)


def test_a_claim_takes_no_room_before_it_comes() -> None:
    async def work() -> None:
        room = Room(3 * MIB)
        with ExitStack() as held:
            for peer in "ABCD":
                await held.enter_context(room.place(peer, 2 * MIB)).take(1000)
            with room.place("E", 2 * MIB) as place:
                await place.take(2 * MIB - 8000)
                await place.take(8000)

    run(work)


def test_messages_that_have_begun_are_kept_able_to_end() -> None:
    async def work() -> None:
        room = Room(3 * MIB)
        with room.place("A", 2 * MIB) as first:
            with room.place("B", 2 * MIB) as second:
                await first.take(MIB)
                await second.take(MIB + MIB // 2)
                # Half a MiB is left, which the second needs to end; the first would need a whole one.
                more = asyncio.create_task(first.take(MIB // 4))
                await settle()
                assert not more.done()
                await second.take(MIB // 2)
                await settle()
                assert not more.done()
            await more
            await first.take(first.missing)

    run(work)


def test_a_peer_with_half_of_the_room_lets_others_begin_first() -> None:
    async def work() -> None:
        visitors = Visitors(Room(4 * MIB))
        await visitors.come("a1", MIB)
        await visitors.come("a2", 3 * MIB)  # nobody waits, so it may have all
        await visitors.come("a3", MIB)
        await visitors.come("b1", MIB, "B")
        await visitors.leave("a1")
        assert visitors.inside == ["a2", "b1"]
        await visitors.leave("b1")
        assert visitors.inside == ["a2", "a3"]
        await visitors.leave("a2")
        await visitors.leave("a3")

    run(work)


sizes = st.integers(SMALL_BYTES + 1, 4 * SMALL_BYTES)


@given(st.lists(st.tuples(sizes, st.sampled_from("ABC"), st.integers(1, 4), st.integers(0, 5)), max_size=12))
@num_examples(100)
def test_every_message_ends_and_there_is_never_more_than_the_room(
    messages: list[tuple[int, str, int, int]],
) -> None:
    total = 5 * SMALL_BYTES
    places: set[Place] = set()

    async def work() -> None:
        room = Room(total)

        async def visit(length: int, peer: str, num_chunks: int, patience: int) -> None:
            with room.place(peer, length) as place:
                places.add(place)
                while place.missing:
                    await place.take(min(place.missing, length // num_chunks))
                    assert sum(other.held for other in places) <= total
                    await asyncio.sleep(0)
                for _ in range(patience):
                    await asyncio.sleep(0)
                places.discard(place)

        await asyncio.gather(*(visit(*message) for message in messages))

    run(work)
    assert not places
