"""Which blocks a server should hold: pure decisions from the records of the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from slowllm.errors import InputError
from slowllm.swarm.records import ServerRecord


def block_rates(records: Iterable[ServerRecord], num_blocks: int) -> list[float]:
    """Return the tokens a second that the servers which join or serve have for each block."""
    rates = [0.0] * num_blocks
    for record in records:
        if record.state in ("joining", "online"):
            # A server that was not measured counts as a little, so that its blocks are not taken again.
            rate = record.forward_tokens_per_second or 1.0
            for block in range(record.first, min(record.end, num_blocks)):
                rates[block] += rate
    return rates


def scarcest_blocks(
    records: Iterable[ServerRecord], num_blocks: int, count: int, allowed: Collection[int] | None = None
) -> tuple[int, int]:
    """Return the span of `count` blocks that the swarm lacks most.

    The swarm is as fast as its slowest block, so the span is one whose least served block has the fewest tokens a
    second; of those, one that is served least in all, and the first.

    Args:
        records: of the other servers; only those that join or serve count.
        num_blocks: of the model.
        count: of the blocks, at most `num_blocks`.
        allowed: blocks that the server can have; None for all.
    Returns:
        the first block and the number after the last.
    Raises:
        InputError: no span of so many blocks is allowed.
    """
    rates = block_rates(records, num_blocks)
    starts = [
        start
        for start in range(num_blocks - count + 1)
        if allowed is None or all(block in allowed for block in range(start, start + count))
    ]
    if not starts:
        raise InputError(f"the folder has no {count} blocks in a row")
    first = min(
        starts,
        key=lambda start: (sorted(rates[start : start + count]), sum(rates[start : start + count]), start),
    )
    return first, first + count


def is_overtaken(own: ServerRecord, known: Iterable[ServerRecord], found: Iterable[ServerRecord]) -> bool:
    """Whether a server that joins must choose its blocks again, because others took some of them unknown to it.

    Args:
        own: the record with the blocks that it has chosen.
        known: the records of others by which it chose.
        found: the records of others after it has announced its own.
    """
    seen = {(record.peer, record.first, record.end) for record in known}
    return any(
        (record.peer, record.first, record.end) not in seen
        and record.first < own.end
        and own.first < record.end
        # Both may see each other, and one of them keeps what it has.
        and (record.state == "online" or (record.state == "joining" and record.peer < own.peer))
        for record in found
    )
