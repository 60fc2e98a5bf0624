"""Take the blocks that a swarm lacks most, also when others do so at the same time.

A server announces what it has chosen, waits until whoever chose before that has announced, too, and looks again. Of two
that took the same blocks unknown to each other, the one with the lower peer id keeps them and the other chooses again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import replace

from slowllm.errors import NetworkError
from slowllm.swarm.announcer import RECORD_SECONDS
from slowllm.swarm.network import Network
from slowllm.swarm.placement import is_overtaken, scarcest_blocks
from slowllm.swarm.records import ServerRecord

log = logging.getLogger(__name__)

# From a look into the directory to the announcement of what was chosen by it, with peers that answer late.
SETTLE_SECONDS = 2.0
# In each round at least one of those that join at the same time has its blocks.
MAX_ROUNDS = 16


def take_scarcest(
    network: Network,
    record: ServerRecord,
    num_blocks: int,
    count: int,
    settle_seconds: float = SETTLE_SECONDS,
    allowed: Collection[int] | None = None,
) -> ServerRecord:
    """Return a joining server's record with the blocks that it has chosen and announced.

    Args:
        network: of the server.
        record: of the server, with any blocks.
        num_blocks: of the model.
        count: of the blocks to take.
        settle_seconds: after an announcement, before others are looked at again.
        allowed: blocks that the server can have; None for all.
    Raises:
        InputError: no span of so many blocks is allowed.
        NetworkError: the swarm cannot be asked.
    """

    def others() -> list[ServerRecord]:
        return [other for other in network.find(record.model) if other.peer != record.peer]

    known = others()
    for _ in range(MAX_ROUNDS):
        first, end = scarcest_blocks(known, num_blocks, count, allowed)
        record = replace(record, first=first, end=end)
        try:
            network.announce(record, RECORD_SECONDS)
        except NetworkError as error:
            log.warning("%s; others that join now may take the same blocks", error)
        time.sleep(settle_seconds)
        found = others()
        if not is_overtaken(record, known, found):
            return record
        known = found
    log.warning(
        "blocks %d:%d are taken by others, too, and more join all the while", record.first, record.end
    )
    return record
