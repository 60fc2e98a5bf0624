"""Forward TCP connections with a delay, as a longer way would have: a stand-in for distance on one machine.

    python -m benchmarks.delay_proxy 0.025 31340:31330 31341:31331

Every byte comes out as many seconds later as the first argument says, in either direction, in its order and with no limit of
the rate. Each pair is a port to listen at on the loopback and the port there that connections go on to. Prints a line when it
listens, and runs until it is ended. Knows nothing of what it forwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import AsyncIterator, Sequence

HOST = "127.0.0.1"
CHUNK_BYTES = 256 << 10
# Bytes on their way in one direction, at most so many chunks: a sender that is faster than the receiver has to wait.
MAX_CHUNKS = 1024


async def _delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Write what is read, later; pass on the end as well."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS)

    async def read() -> None:
        chunk = b"-"
        while chunk:
            chunk = await reader.read(CHUNK_BYTES)
            await under_way.put((loop.time() + seconds, chunk))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(read())
        while True:
            due, chunk = await under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not chunk:
                writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()


@contextlib.asynccontextmanager
async def forwarding(pairs: Sequence[tuple[int, int]], seconds: float) -> AsyncIterator[None]:
    """Listen at the first port of each pair, and forward to the second, while the context is open.

    Args:
        pairs: ports of the loopback.
        seconds: that each byte takes, in one direction.
    """

    async def forward(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            OSError, ExceptionGroup
        ):  # one of the two sides has gone, so the other one may
            to_reader, to_writer = await asyncio.open_connection(HOST, port)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_delayed(reader, to_writer, seconds))
                    tasks.create_task(_delayed(to_reader, writer, seconds))
            finally:
                to_writer.close()
        writer.close()

    async with contextlib.AsyncExitStack() as held:
        for listened, port in pairs:
            take = functools.partial(forward, port)
            await held.enter_async_context(await asyncio.start_server(take, HOST, listened))
        yield


async def _serve(pairs: Sequence[tuple[int, int]], seconds: float) -> None:
    async with forwarding(pairs, seconds):
        print("forwards", *(f"{listened} to {port}" for listened, port in pairs), flush=True)
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    seconds, *pairs = sys.argv[1:] if argv is None else argv
    ports = [(int(listened), int(port)) for listened, _, port in (pair.partition(":") for pair in pairs)]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(ports, float(seconds)))


if __name__ == "__main__":
    main()
