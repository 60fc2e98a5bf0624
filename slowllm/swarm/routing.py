"""Which servers do a piece of work: pure decisions from records, measurements and wishes. No network, no clock.

A **hop** is a span of blocks at one server; a **route** is hops that cover the wanted blocks, each once, in order. A
server may be used for a part of its blocks.

Blocks of different weights are never mixed: for each block one identity is wanted, the client's own where it has the
weights, otherwise that of most servers, and servers that have another one at a block are not used for it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from slowllm.errors import MissingBlocksError
from slowllm.swarm.records import ServerRecord

# For a server that was never measured: a round trip over the internet.
UNKNOWN_LATENCY_SECONDS = 0.1
# For a server that does not say how fast it is: that of a slow one.
UNKNOWN_DECODE_SECONDS = 0.1
UNKNOWN_TOKENS_PER_SECOND = 1.0


@dataclass(frozen=True)
class Wishes:
    """Whom the client may ask, and for what.

    Attributes:
        allowed: ids of the only peers that may be asked; None for all.
        blocked: ids of peers that may not be asked.
        banned: ids of peers that failed lately.
        hashes: wanted identities of blocks by their numbers; for other blocks, that of most servers.
        needs_backward: whether gradients are wanted.
        batch_tokens: tokens of one request, at least.
        cache_tokens: tokens that a session needs, at least.
        ends_hash: of the client's ends; servers that have others serve another model.
        dtype: that the client computes in; empty for any.
    """

    allowed: Collection[str] | None = None
    blocked: Collection[str] = ()
    banned: Collection[str] = ()
    hashes: Mapping[int, str] = field(default_factory=dict)
    needs_backward: bool = False
    batch_tokens: int = 0
    cache_tokens: int = 0
    ends_hash: str = ""
    dtype: str = ""

    def refusal(self, record: ServerRecord) -> str | None:
        """Return why a server may not be asked, in a few words; None if it may."""
        if self.allowed is not None and record.peer not in self.allowed:
            return "is not among the allowed peers"
        if record.peer in self.blocked:
            return "is blocked"
        if record.state != "online":
            return f"is {record.state}"
        if record.peer in self.banned:
            return "failed lately"
        if self.ends_hash and record.ends_hash and record.ends_hash != self.ends_hash:
            return "serves another model of the same config"
        if self.dtype and record.dtype != self.dtype:
            return f"computes in {record.dtype}, not {self.dtype}"
        if self.needs_backward and not record.has_backward:
            return "computes no gradients"
        if record.max_batch_tokens < self.batch_tokens:
            return f"takes {record.max_batch_tokens} tokens a request, not {self.batch_tokens}"
        if record.cache_tokens_free < self.cache_tokens:
            return f"has room for {record.cache_tokens_free} tokens, not {self.cache_tokens}"
        return None


@dataclass(frozen=True)
class Hop:
    """A span of blocks at one server.

    Attributes:
        record: of the server.
        first: number of the first block.
        end: number behind the last block.
    """

    record: ServerRecord
    first: int
    end: int


def usable_spans(records: Iterable[ServerRecord], first: int, end: int, wishes: Wishes) -> list[Hop]:
    """Return the longest spans within first:end that each server may be used for.

    Raises:
        MissingBlocksError: a block is served by nobody who may be asked; the message names blocks and servers.
    """
    assert first < end, f"no blocks are wanted: {first}:{end}"
    records = list(records)
    allowed = [record for record in records if wishes.refusal(record) is None]
    wanted = {block: _wanted_hash(allowed, block, wishes) for block in range(first, end)}
    spans = []
    for record in allowed:
        begin = None
        for block in range(max(first, record.first), min(end, record.end) + 1):
            fits = block < min(end, record.end) and record.hash_of(block) == wanted[block]
            if fits and begin is None:
                begin = block
            elif not fits and begin is not None:
                spans.append(Hop(record, begin, block))
                begin = None
    served = {block for hop in spans for block in range(hop.first, hop.end)}
    if missing := tuple(block for block in range(first, end) if block not in served):
        raise MissingBlocksError(missing, _explain(records, missing, wishes, wanted))
    return spans


def fastest_route(
    records: Iterable[ServerRecord],
    first: int,
    end: int,
    wishes: Wishes | None = None,
    latencies: Mapping[str, float] | None = None,
    hop_latency: Callable[[str | None, str], float] | None = None,
) -> list[Hop]:
    """Return the route on which one token is fastest, for generation.

    A hop costs the way to its server and the server's seconds a block. Of equally fast routes, the one with fewer hops.

    Args:
        records: of servers.
        first: number of the first wanted block.
        end: number behind the last wanted block.
        wishes: whom the client may ask.
        latencies: seconds from this client to a peer and back, by ids, as measured. Without `hop_latency` each hop goes
            through the client and costs them.
        hop_latency: seconds from one peer (None for the client) to the next, where servers send to each other.
    Raises:
        MissingBlocksError: see `usable_spans`.
    """
    spans = usable_spans(records, first, end, wishes or Wishes())
    known = latencies or {}

    def way(last: str | None, peer: str) -> float:
        return known.get(peer, UNKNOWN_LATENCY_SECONDS) if hop_latency is None else hop_latency(last, peer)

    # A place is a block's boundary and the server that the hidden states come from. A server is left only where another
    # span begins or its own ends: to leave it elsewhere would gain nothing.
    count = 0
    queue: list[tuple[float, int, int, int, str | None, list[Hop]]] = [(0.0, 0, count, first, None, [])]
    seen: set[tuple[int, str | None]] = set()
    cuts = sorted({hop.first for hop in spans} | {hop.end for hop in spans})
    while queue:
        cost, _, _, block, last, route = heapq.heappop(queue)
        if block == end:
            return route
        if (block, last) in seen:
            continue
        seen.add((block, last))
        for hop in spans:
            peer = hop.record.peer
            if not hop.first <= block < hop.end or peer == last:
                continue
            seconds = hop.record.decode_seconds or UNKNOWN_DECODE_SECONDS
            for cut in cuts:
                if block < cut <= hop.end:
                    count += 1
                    step = way(last, peer) + seconds * (cut - block)
                    new = [*route, Hop(hop.record, block, cut)]
                    heapq.heappush(queue, (cost + step, len(new), count, cut, peer, new))
    raise AssertionError("spans that cover all blocks have a route")


def spread(
    records: Iterable[ServerRecord],
    num_batches: int,
    first: int,
    end: int,
    wishes: Wishes | None = None,
) -> list[list[Hop]]:
    """Return a route for each micro-batch, so that replicas share the work and all are done soon.

    Micro-batches are given out one after the other. Each takes the route on which it is done first, when every server
    has done what it was given before; a server's rate is its tokens a second over its own blocks.

    Args:
        records: of servers.
        num_batches: of equal size.
        first: number of the first wanted block.
        end: number behind the last wanted block.
        wishes: whom the client may ask; `needs_backward` for gradients.
    Raises:
        MissingBlocksError: see `usable_spans`.
    """
    spans = usable_spans(records, first, end, wishes or Wishes())
    busy: Counter[str] = Counter()
    routes = []
    for _ in range(num_batches):
        route = _least_busy_route(spans, first, end, busy)
        for hop in route:
            busy[hop.record.peer] += _load(hop)  # type: ignore[assignment]
        routes.append(route)
    return routes


def _least_busy_route(spans: Sequence[Hop], first: int, end: int, busy: Mapping[str, float]) -> list[Hop]:
    """Return the route whose busiest server is done first; of those, the one with the least work in all."""
    best: dict[int, tuple[float, float, int, list[Hop]]] = {first: (0.0, 0.0, 0, [])}
    cuts = sorted({hop.first for hop in spans} | {hop.end for hop in spans})
    for block in cuts:
        if block not in best or block == end:
            continue
        latest, work, _, route = best[block]
        for hop in spans:
            if not hop.first <= block < hop.end or (route and route[-1].record.peer == hop.record.peer):
                continue
            for cut in cuts:
                if not block < cut <= hop.end:
                    continue
                part = Hop(hop.record, block, cut)
                own = sum(_load(other) for other in route if other.record.peer == hop.record.peer)
                done = max(latest, busy.get(hop.record.peer, 0.0) + own + _load(part))
                new = (done, work + _load(part), len(route) + 1, [*route, part])
                if cut not in best or new[:3] < best[cut][:3]:
                    best[cut] = new
    return best[end][3]


def _load(hop: Hop) -> float:
    """Return the seconds that a hop takes of its server for each token."""
    rate = hop.record.forward_tokens_per_second or UNKNOWN_TOKENS_PER_SECOND
    return (hop.end - hop.first) / ((hop.record.end - hop.record.first) * rate)


def format_route(route: Sequence[Hop]) -> str:
    """Return a route in one line for the log, such as ``0:12 desk (ab12cd), 12:24 9fK2pq``."""
    return ", ".join(f"{hop.first}:{hop.end} {hop.record.label}" for hop in route)


def _wanted_hash(records: Iterable[ServerRecord], block: int, wishes: Wishes) -> str | None:
    if block in wishes.hashes:
        return wishes.hashes[block]
    votes = Counter(record.hash_of(block) for record in records if record.first <= block < record.end)
    # Of two that as many servers have, always the same one, whatever the order of the records.
    return min(votes, key=lambda name: (-votes[name], name)) if votes else None


def _explain(
    records: Sequence[ServerRecord], missing: Sequence[int], wishes: Wishes, wanted: Mapping[int, str | None]
) -> str:
    lines = []
    for record in records:
        reason = wishes.refusal(record)
        if reason is None:
            others = [b for b in missing if record.first <= b < record.end and record.hash_of(b) != wanted[b]]
            reason = f"has other weights in {_ranges(others)}" if others else None
        lines.append(f"{record.label} has {record.first}:{record.end}" + (f" but {reason}" if reason else ""))
    seen = "; ".join(lines) if lines else "no server was found"
    return f"nobody serves {_ranges(missing)} ({seen})"


def _ranges(blocks: Sequence[int]) -> str:
    """Return numbers of blocks as spans: ``blocks 3:5, 9:10``."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block:
            spans[-1][1] += 1
        else:
            spans.append([block, block + 1])
    return "blocks " + ", ".join(f"{first}:{end}" for first, end in spans)
