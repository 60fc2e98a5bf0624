"""Wait for rides in a coroutine: riders' threads ring, and the page's event loop wakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from slowllm.entrypoints.web.desk import Desk
from slowllm.errors import counted
from slowllm.inference.service_types import Answer
from slowllm.streaming.ride import Ride

# How often what is shown is renewed while nothing comes, and how long it stays at least.
LOOK_SECONDS, REST_SECONDS = 0.5, 0.1


class Bell:
    """Wakes the coroutine that made it, from any thread."""

    def __init__(self) -> None:
        self._loop, self._rung = asyncio.get_running_loop(), asyncio.Event()

    def ring(self, *_: object) -> None:
        """Wake it. Whatever is given is left aside, so that this may be called back by anything."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._rung.set)

    async def wait(self, seconds: float) -> None:
        """Wait until somebody has rung since the last wait, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()


async def until_done(rides: Sequence[Ride[Answer]], bell: Bell) -> AsyncIterator[None]:
    """Yield whenever the bell has rung or some time has passed, until all rides have ended; not after that."""
    for ride in rides:
        ride.add_done_callback(bell.ring)
    while not all(ride.done() for ride in rides):
        await bell.wait(LOOK_SECONDS)
        if not all(ride.done() for ride in rides):
            yield
            # Tokens of a small model come faster than a browser should draw.
            await asyncio.sleep(REST_SECONDS)


def where(desk: Desk) -> str:
    """Return in words where the carousel is, and who waits."""
    status = desk.status()
    place = "the carousel begins" if status.stop is None else f"stop {status.stop + 1} of {status.num_stops}"
    if status.num_waiting:
        place += f"; {counted(status.num_waiting, 'request waits', 'requests wait')} for room"
    return place
