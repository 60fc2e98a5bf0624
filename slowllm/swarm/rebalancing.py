"""When a server should give up its blocks for others: pure decisions from the records of the swarm.

A swarm is as fast as its slowest block, and of no use while a block is served by nobody. Moving costs the time in which the
blocks are read again, and if all servers saw the same gap and moved at once they would leave another: so a server moves only
where that gains much, waits for a random time first, and looks again before it goes.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from slowllm.errors import counted
from slowllm.swarm.placement import block_rates, scarcest_blocks
from slowllm.swarm.records import ServerRecord

# By how much the slowest block must become faster.
LEAST_GAIN = 1.25
MEAN_CHECK_SECONDS = 120.0
# Before a move, in which those who have seen the same gap go first or later.
MOST_DELAY_SECONDS = 30.0


def better_blocks(
    records: Iterable[ServerRecord],
    own: ServerRecord,
    num_blocks: int,
    *,
    least_gain: float = LEAST_GAIN,
    allowed: Collection[int] | None = None,
) -> tuple[int, int] | None:
    """Return the span to which a server should move, None where it should stay.

    It moves where fewer blocks are served by nobody then, or where the slowest block is faster by `least_gain` at least and
    others serve all blocks that it leaves.

    Args:
        records: of the swarm's servers; its own among them counts as `own`.
        own: the server's record as it is now.
        num_blocks: of the model.
        least_gain: ratio of the slowest block's tokens a second after and before.
        allowed: blocks that the server can have; None for all.
    """
    count = own.end - own.first
    others = [record for record in records if record.peer != own.peer]
    span = scarcest_blocks(others, num_blocks, count, allowed)
    if span == (own.first, own.end):
        return None
    rates = block_rates(others, num_blocks)
    rate = own.forward_tokens_per_second or 1.0
    before, after = (_with(rates, *place, rate) for place in ((own.first, own.end), span))
    uncovered_before, uncovered_after = before.count(0.0), after.count(0.0)
    if uncovered_before != uncovered_after:
        return span if uncovered_after < uncovered_before else None
    # While it reads its new blocks, others must serve those that it has left.
    online = block_rates([record for record in others if record.state == "online"], num_blocks)
    if not all(online[own.first : own.end]):
        return None
    return span if min(after) > least_gain * min(before) else None


def reason_to_move(
    records: Iterable[ServerRecord], own: ServerRecord, span: tuple[int, int], num_blocks: int
) -> str:
    """Return in words what the swarm gains where a server moves to a span that `better_blocks` returned.

    Args:
        records: as for `better_blocks`.
        own: as for `better_blocks`.
        span: the first block and the number after the last.
        num_blocks: of the model.
    """
    rates = block_rates([record for record in records if record.peer != own.peer], num_blocks)
    rate = own.forward_tokens_per_second or 1.0
    before, after = (_with(rates, *place, rate) for place in ((own.first, own.end), span))
    if (gained := before.count(0.0) - after.count(0.0)) > 0:
        return f"{counted(gained, 'block more is', 'blocks more are')} served then"
    return f"the swarm's slowest block gets {min(after) / min(before):.2g} times the tokens a second then"


def next_check_seconds(generator: random.Random) -> float:
    """Return how long a server waits before it looks at the swarm again, so that servers do not look in step."""
    return generator.uniform(0.5, 1.5) * MEAN_CHECK_SECONDS


def delay_seconds(generator: random.Random) -> float:
    """Return how long a server waits between its wish to move and the second look."""
    return generator.uniform(0.0, MOST_DELAY_SECONDS)


def _with(rates: Sequence[float], first: int, end: int, rate: float) -> list[float]:
    return [known + rate if first <= block < end else known for block, known in enumerate(rates)]
