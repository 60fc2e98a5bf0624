"""The thread of the network's loop keeps nothing of those who give it work."""

from __future__ import annotations

import contextvars
import threading

from slowllm.swarm.loop_thread import LoopThread


def test_work_does_not_see_the_context_of_who_gives_it() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    variable.set("a cache")

    async def seen() -> str:
        return variable.get()

    async def nothing() -> None:
        return None

    loop = LoopThread("test")
    try:
        assert loop.call(seen, 60) == "nothing"
    finally:
        loop.close(nothing)


def test_short_work_is_done_on_the_thread_and_after_its_end_not_at_all() -> None:
    async def nothing() -> None:
        return None

    names: list[str] = []
    loop = LoopThread("test")
    try:
        loop.soon(lambda: names.append(threading.current_thread().name))
        loop.call(nothing, 60)
    finally:
        loop.close(nothing)
    loop.soon(lambda: names.append("too late"))
    assert names == ["test"]
