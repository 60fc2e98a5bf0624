"""Which servers do a piece of work: pure decisions from records, measurements and wishes. No network, no clock.

A **hop** is a span of blocks at one server; a **route** is hops that cover the wanted blocks, each once, in order. A
server may be used for a part of its blocks.

Blocks of different weights are never mixed: for each block one identity is wanted, the client's own where it has the
weights, otherwise that of most servers, and servers that have another one at a block are not used for it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from slowllm.errors import MissingBlocksError
from slowllm.swarm.records import ServerRecord

# For a server that was never measured: a round trip over the internet.
UNKNOWN_LATENCY_SECONDS = 0.1
# For a server that does not say how fast it is: that of a slow one.
UNKNOWN_DECODE_SECONDS = 0.1
UNKNOWN_TOKENS_PER_SECOND = 1.0
MAX_EXPLAINED = 8


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
        cache_tokens: tokens that a session needs at its end, at least.
        length: tokens of the longest sequence, at its end.
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
    length: int = 0
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
        # 0 where a server does not say.
        if 0 < record.max_length < self.length:
            return f"takes sequences of {record.max_length} tokens, not {self.length}"
        if 0 < record.cache_tokens < self.cache_tokens:
            return f"keeps {record.cache_tokens} tokens of sessions in all, not {self.cache_tokens}"
        if record.cache_tokens_free < self.cache_tokens:
            return f"has room for {record.cache_tokens_free} tokens, not {self.cache_tokens}"
        return None


@dataclass(frozen=True)
class ServerHop:
    """A span of blocks at one server.

    Attributes:
        record: of the server.
        first: number of the first block.
        end: number behind the last block.
    """

    record: ServerRecord
    first: int
    end: int


def usable_spans(records: Iterable[ServerRecord], first: int, end: int, wishes: Wishes) -> list[ServerHop]:
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
                spans.append(ServerHop(record, begin, block))
                begin = None
    served = {block for hop in spans for block in range(hop.first, hop.end)}
    if missing := tuple(block for block in range(first, end) if block not in served):
        unfilled = replace(wishes, cache_tokens=0)
        full = [one for one in records if wishes.refusal(one) is not None and unfilled.refusal(one) is None]
        is_full = any(one.first <= block < one.end for one in full for block in missing) and all(
            one.cache_tokens >= wishes.cache_tokens for one in full
        )
        raise MissingBlocksError(missing, _explain(records, missing, wishes, wanted), is_full=is_full)
    return spans


def fastest_route(
    records: Iterable[ServerRecord],
    first: int,
    end: int,
    wishes: Wishes | None = None,
    latencies: Mapping[str, float] | None = None,
    hop_latency: Callable[[str | None, str], float] | None = None,
) -> list[ServerHop]:
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

    # For each span that has the last block: the cheapest way there, as its cost, its hops, and the route itself.
    ways: dict[int, tuple[float, int, list[ServerHop]]] = {}
    for block in range(first, end):
        new: dict[int, tuple[float, int, list[ServerHop]]] = {}
        for number, hop in enumerate(spans):
            if not hop.first <= block < hop.end:
                continue
            record = hop.record
            found = []
            if (here := ways.get(number)) is not None:
                *before, last = here[2]
                found.append((here[0], here[1], [*before, ServerHop(record, last.first, block + 1)]))
            if block == first:
                found.append((way(None, record.peer), 1, [ServerHop(record, block, block + 1)]))
            for other, (cost, hops, route) in ways.items():
                if other != number:
                    step = way(spans[other].record.peer, record.peer)
                    found.append((cost + step, hops + 1, [*route, ServerHop(record, block, block + 1)]))
            if found:
                cost, hops, route = min(found, key=lambda choice: choice[:2])
                new[number] = (cost + (record.decode_seconds or UNKNOWN_DECODE_SECONDS), hops, route)
        ways = new
    return min(ways.values(), key=lambda choice: choice[:2])[2]


def spread(
    records: Iterable[ServerRecord],
    num_batches: int,
    first: int,
    end: int,
    wishes: Wishes | None = None,
) -> list[list[ServerHop]]:
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
    busy: dict[str, float] = {}
    routes = []
    for _ in range(num_batches):
        route = _least_busy_route(spans, first, end, busy)
        for hop in route:
            busy[hop.record.peer] = busy.get(hop.record.peer, 0.0) + _load(hop)
        routes.append(route)
    return routes


def _least_busy_route(
    spans: Sequence[ServerHop], first: int, end: int, busy: Mapping[str, float]
) -> list[ServerHop]:
    """Return the route whose busiest server is done first; of those, the one whose servers are least busy in all."""
    best: dict[int, tuple[float, float, int, list[ServerHop]]] = {first: (0.0, 0.0, 0, [])}
    cuts = sorted({hop.first for hop in spans} | {hop.end for hop in spans})
    for block in cuts:
        if block not in best or block == end:
            continue
        latest, waiting, _, route = best[block]
        for hop in spans:
            if not hop.first <= block < hop.end or (route and route[-1].record.peer == hop.record.peer):
                continue
            for cut in cuts:
                if not block < cut <= hop.end:
                    continue
                part = ServerHop(hop.record, block, cut)
                own = sum(_load(other) for other in route if other.record.peer == hop.record.peer)
                done = max(latest, busy.get(hop.record.peer, 0.0) + own + _load(part))
                queued = waiting + busy.get(hop.record.peer, 0.0) + own + _load(part)
                new = (done, queued, len(route) + 1, [*route, part])
                if cut not in best or new[:3] < best[cut][:3]:
                    best[cut] = new
    return best[end][3]


def _load(hop: ServerHop) -> float:
    """Return the seconds that a hop takes of its server for each token."""
    rate = hop.record.forward_tokens_per_second or UNKNOWN_TOKENS_PER_SECOND
    return (hop.end - hop.first) / ((hop.record.end - hop.record.first) * rate)


def most_batch_tokens(records: Iterable[ServerRecord], num_blocks: int, wishes: Wishes) -> int:
    """Return the tokens of the largest request that servers take at every block; those that take less are passed by.

    Args:
        records: of servers.
        num_blocks: of the model.
        wishes: whom the client may ask.
    Raises:
        MissingBlocksError: some blocks are served by nobody who may be asked.
    """
    records = list(records)
    sizes = sorted({record.max_batch_tokens for record in records}, reverse=True)
    for size in sizes[:-1]:
        with contextlib.suppress(MissingBlocksError):
            usable_spans(records, 0, num_blocks, replace(wishes, batch_tokens=size))
            return size
    usable_spans(records, 0, num_blocks, wishes)  # without any server, it says so
    return sizes[-1]


def other_weights(records: Iterable[ServerRecord], first: int, end: int, wishes: Wishes) -> dict[str, str]:
    """Return which servers are not used for some blocks because their weights are others, for the log.

    Args:
        records: of servers.
        first: number of the first wanted block.
        end: number behind the last wanted block.
        wishes: whom the client may ask.
    Returns:
        The blocks as words, such as ``blocks 3:5``, by the labels of the servers.
    """
    allowed = [record for record in records if wishes.refusal(record) is None]
    wanted = {block: _wanted_hash(allowed, block, wishes) for block in range(first, end)}
    found = {}
    for record in allowed:
        if others := _with_other_hash(record, range(first, end), wanted):
            found[record.label] = _ranges(others)
    return found


def format_route(route: Sequence[ServerHop]) -> str:
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
    for record in records[:MAX_EXPLAINED]:
        reason = wishes.refusal(record)
        if reason is None and (others := _with_other_hash(record, missing, wanted)):
            reason = f"has other weights in {_ranges(others)}"
        lines.append(f"{record.label} has {record.first}:{record.end}" + (f" but {reason}" if reason else ""))
    if len(records) > MAX_EXPLAINED:
        lines.append(f"and {len(records) - MAX_EXPLAINED} more")
    return f"nobody serves {_ranges(missing)} ({'; '.join(lines) if lines else 'no server was found'})"


def _with_other_hash(
    record: ServerRecord, blocks: Iterable[int], wanted: Mapping[int, str | None]
) -> list[int]:
    return [b for b in blocks if record.first <= b < record.end and record.hash_of(b) != wanted[b]]


def _ranges(blocks: Sequence[int]) -> str:
    """Return numbers of blocks as spans: ``blocks 3:5, 9:10``."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block:
            spans[-1][1] += 1
        else:
            spans.append([block, block + 1])
    return "blocks " + ", ".join(f"{first}:{end}" for first, end in spans)
