"""What a swarm looks like from here: for each model its servers, the blocks they cover, and who can be reached.

`look` asks; `view_of` is a pure function of what was found. Knows nothing of how it is shown.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from slowllm.errors import NetworkError, ProtocolError
from slowllm.swarm.network import Network
from slowllm.swarm.reach import REACH_SECONDS
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.status import ServerStatus
from slowllm.swarm.weights import assemblies, weights_hash

SHORT_LETTERS = 8
# Servers of a model that are asked; a swarm of more is shown all the same.
MAX_ASKED = 64


@dataclass(frozen=True)
class StatusAnswer:
    """What came of asking one server.

    Attributes:
        status: of the server; None if it was not reached or says nothing that can be read.
        seconds: until it answered.
        why: it was not reached; empty if it was.
        reached_by: whether another server reaches it; None where no other one could be asked.
        asked: label of that other server.
    """

    status: ServerStatus | None = None
    seconds: float = 0.0
    why: str = ""
    reached_by: bool | None = None
    asked: str = ""


@dataclass(frozen=True)
class ServerView:
    """A server of a model: what it announces, and what came of asking it.

    Attributes:
        record: that it announces.
        answer: to the request for its status.
        odd_blocks: its blocks whose weights are others than those that most servers have.
    """

    record: ServerRecord
    answer: StatusAnswer
    odd_blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ModelView:
    """A model in the swarm.

    Attributes:
        model: key under which its servers are found.
        kind: the type that its config names; empty where it is not known.
        num_blocks: of the whole model.
        replicas: how many servers that are online have each block.
        servers: in the order of their first blocks.
        weights: the words for whole sets of blocks that the servers can give together, the most common first.
    """

    model: str
    kind: str
    num_blocks: int
    replicas: tuple[int, ...]
    servers: tuple[ServerView, ...]
    weights: tuple[str, ...]

    @property
    def coverage(self) -> list[tuple[int, int, int]]:
        """Spans of blocks that equally many servers have: first block, the number behind the last, servers."""
        return [(first, end, self.replicas[first]) for first, end in _runs(self.replicas)]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Spans of blocks that no server has that is online."""
        return [(first, end) for first, end, count in self.coverage if not count]

    def to_json(self) -> dict[str, Any]:
        """Return the view in JSON types."""
        return {
            "model": self.model, "kind": self.kind, "num_blocks": self.num_blocks,
            "coverage": [{"first": a, "end": b, "servers": n} for a, b, n in self.coverage],
            "missing": [list(span) for span in self.missing], "weights": list(self.weights),
            "servers": [_server_json(server) for server in self.servers],
        }  # fmt: skip


def look(network: Network, model: str, kind: str, num_blocks: int) -> ModelView:
    """Return what one model looks like from here: find its servers, ask each one, and let each be dialled by another.

    Raises:
        NetworkError: nobody answers any more.
    """
    records = network.find(model)
    return view_of(model, kind, num_blocks, records, _ask_all(network, records[:MAX_ASKED]))


def view_of(
    model: str,
    kind: str,
    num_blocks: int,
    records: Sequence[ServerRecord],
    answers: Mapping[str, StatusAnswer],
) -> ModelView:
    """Return the view of a model from its records and answers, by the ids of peers."""
    records = [record for record in records if record.end <= num_blocks]
    online = [record for record in records if record.state == "online"]
    replicas = tuple(sum(r.first <= block < r.end for r in online) for block in range(num_blocks))
    usual: dict[int, str] = {}
    for block in range(num_blocks):
        found = [r.hash_of(block) for r in online if r.first <= block < r.end]
        if found:
            usual[block] = min(found, key=lambda name: (-found.count(name), name))
    # Few, for the eye; a pin is looked for among more of them.
    sets = [weights_hash(hashes) for hashes, _ in zip(assemblies(online, num_blocks), range(4), strict=False)]
    nobody = StatusAnswer(why="was not asked")
    servers = tuple(
        ServerView(record, answers.get(record.peer, nobody), _odd_blocks(record, usual)) for record in records
    )
    return ModelView(model, kind, num_blocks, replicas, servers, tuple(sets))


def _odd_blocks(record: ServerRecord, usual: Mapping[int, str]) -> tuple[tuple[int, int], ...]:
    if not record.block_hashes:
        return ()
    is_odd = [
        usual.get(block, record.hash_of(block)) != record.hash_of(block)
        for block in range(record.first, record.end)
    ]
    return tuple((record.first + a, record.first + b) for a, b in _runs(is_odd) if is_odd[a])


def _runs(values: Sequence[object]) -> list[tuple[int, int]]:
    """Return the spans of equal values."""
    cuts = [i for i in range(len(values)) if not i or values[i] != values[i - 1]] + [len(values)]
    return list(itertools.pairwise(cuts))


def _ask_all(network: Network, records: Sequence[ServerRecord]) -> dict[str, StatusAnswer]:
    """Return the answer of each server, all of which are asked at the same time."""
    began = time.monotonic()
    ended: dict[str, float] = {}
    asked: dict[str, Future[Any]] = {}
    for record in records:
        if record.state == "offline":
            continue
        future = network.ask(record.peer, {"op": "status"}, timeout=REACH_SECONDS)
        future.add_done_callback(
            lambda _, peer=record.peer: ended.setdefault(peer, time.monotonic() - began)  # type: ignore[misc]
        )
        asked[record.peer] = future
    found: dict[str, StatusAnswer] = {}
    for peer, future in asked.items():
        try:
            status = ServerStatus.from_meta(future.result()[0])
        except (NetworkError, ProtocolError) as error:
            found[peer] = StatusAnswer(why=str(error))
        else:
            found[peer] = StatusAnswer(status, ended.get(peer, 0.0))
    return _dialled_by_others(network, records, found)


def _dialled_by_others(
    network: Network, records: Sequence[ServerRecord], found: Mapping[str, StatusAnswer]
) -> dict[str, StatusAnswer]:
    """Return the answers with what another server says of reaching each one."""
    able = [record for record in records if record.peer in found and found[record.peer].status is not None]
    dialled: dict[str, tuple[ServerRecord, Future[Any]]] = {}
    for number, peer in enumerate(found):
        others = [record for record in able if record.peer != peer]
        if others:
            other = others[number % len(others)]  # so that none is asked for all
            meta = {"op": "reach", "peer": peer}
            dialled[peer] = (other, network.ask(other.peer, meta, timeout=3 * REACH_SECONDS))
    answers = dict(found)
    for peer, (other, future) in dialled.items():
        said: object = None
        # It was asked too often, or does not know of this server yet: nothing is known.
        with contextlib.suppress(NetworkError):
            said = future.result()[0].get("reached")
        reached = said if isinstance(said, bool) else None
        old = answers[peer]
        answers[peer] = StatusAnswer(old.status, old.seconds, old.why, reached, other.label)
    return answers


def _server_json(server: ServerView) -> dict[str, Any]:
    record, answer = server.record, server.answer
    status = answer.status
    return {
        "peer": record.peer, "name": record.name, "first": record.first, "end": record.end, "state": record.state,
        "version": record.version, "dtype": record.dtype, "compression": record.compression,
        "has_backward": record.has_backward, "addresses": list(record.addresses), "block_hashes": list(record.block_hashes),
        "other_weights": [list(span) for span in server.odd_blocks],
        "forward_tokens_per_second": record.forward_tokens_per_second, "decode_seconds": record.decode_seconds,
        "cache_tokens_free": status.cache_tokens_free if status else record.cache_tokens_free,
        "max_batch_tokens": record.max_batch_tokens, "reached": status is not None, "reach_seconds": answer.seconds,
        "why_not_reached": answer.why, "reached_by_others": answer.reached_by, "asked": answer.asked,
        "status": None if status is None else status.to_meta(),
    }  # fmt: skip
