"""Many peers of a directory without models, which announce spans of blocks, die, and are replaced."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from slowllm.swarm.announcer import Announcer
from slowllm.swarm.joining import take_scarcest
from slowllm.swarm.network import Network
from slowllm.swarm.records import ServerRecord

MODEL = "churn-16"


@dataclass
class Peer:
    """One server without blocks: its network, its record, and what repeats the record until it dies."""

    network: Network
    record: ServerRecord
    announcer: Announcer

    @property
    def id(self) -> str:
        """The peer's id."""
        return self.network.peer


class Crowd:
    """Peers that announce themselves as servers do, and one client. A context manager.

    Args:
        num_peers: at the begin.
        num_blocks: of the model.
        count: of the blocks that each takes, those that the swarm lacks most.
        seed: of who dies, and of whom a new one joins by.
    """

    def __init__(self, num_peers: int, num_blocks: int, count: int, seed: int) -> None:
        self._num_blocks, self._count = num_blocks, count
        self._random = random.Random(seed)
        self._held = ExitStack()
        self.peers: list[Peer] = []
        self._first = self._held.enter_context(Network.open())
        self.client = self._held.enter_context(
            Network.open(host_maddrs=(), initial_peers=self._first.addresses)
        )
        self.peers.append(self._announced(self._first))
        # A few at a time, as each waits for others to settle.
        with ThreadPoolExecutor(4) as pool:
            self.peers += pool.map(lambda _: self._announced(self._opened()), range(num_peers - 1))

    def _opened(self) -> Network:
        by = self._random.sample(self.peers, min(3, len(self.peers)))
        addresses = [address for peer in by for address in peer.network.addresses]
        return self._held.enter_context(Network.open(initial_peers=addresses))

    def _announced(self, network: Network) -> Peer:
        record = ServerRecord(
            peer=network.peer, addresses=network.addresses, model=MODEL, first=0, end=1, state="joining",
            dtype="float32", version="1", forward_tokens_per_second=100.0,
        )  # fmt: skip
        record = take_scarcest(network, record, self._num_blocks, self._count)
        hashes = tuple(f"hash-{block}" for block in range(record.first, record.end))
        online = replace(record, state="online", block_hashes=hashes)
        announcer = Announcer(network, lambda: online, "churn")
        announcer.__enter__()
        return Peer(network, online, announcer)

    def kill_one(self) -> Peer:
        """End libp2p's process of a peer, as if the power were cut; it says no goodbye, and nothing more."""
        peer = self.peers.pop(self._random.randrange(len(self.peers)))
        child = peer.network._p2p._child
        child.kill()
        peer.announcer.__exit__(None, None, None)
        return peer

    def join_one(self) -> Peer:
        """Let a new peer take the blocks that the swarm lacks most, by peers that live."""
        peer = self._announced(self._opened())
        self.peers.append(peer)
        return peer

    def uncovered(self, records: Sequence[ServerRecord]) -> list[int]:
        """Return the blocks that no living peer among these has."""
        living = {peer.id for peer in self.peers}
        spans = [record for record in records if record.peer in living and record.state == "online"]
        return [b for b in range(self._num_blocks) if not any(r.first <= b < r.end for r in spans)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda peer: peer.announcer.__exit__(None, None, None), self.peers))
            self._held.close()
