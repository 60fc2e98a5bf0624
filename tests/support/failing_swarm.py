"""Servers of a client in this process that fail on command: no network, and a model for all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import slowllm
from slowllm.errors import MissingBlocksError, PeerLostError
from slowllm.modeling.cache_labels import LabelSource
from slowllm.modeling.cutting import find_form
from slowllm.modeling.remote_block import make_remote
from slowllm.modeling.remote_spans import Hop, Kept, Need, Remote
from slowllm.modeling.soft_prompts import hook_inputs
from slowllm.modeling.span import SpanCall, SpanGrads, SpanRunner
from slowllm.swarm.failover import Failover, Replay
from tests.support.families import resident, save_tiny

IDS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
NUM_BLOCKS = 4
PATIENCE = 60.0


class FailingServers:
    """Servers of spans that overlap. Before each call it is asked whether the call's server fails."""

    def __init__(self, lm: slowllm.StreamedLM, spans: Mapping[str, tuple[int, int]]) -> None:
        self.spans = dict(spans)
        self._lm = lm
        self._runner = SpanRunner(lm.model, lm.layout.blocks_name, find_form(lm.model, lm.layout.blocks_name))
        self._caches: dict[tuple[str, str], DynamicCache] = {}
        self.fails: Callable[[str], Exception | None] = lambda peer: None
        self.banned: set[str] = set()
        self.asked: list[tuple[str, int, int]] = []
        self.ban_seconds: list[int] = []
        self.replayed: list[int] = []
        self.leaving: set[str] = set()
        self.needs: list[Need] = []
        self.lengths_with_vectors: set[int] = set()

    def route(
        self, first: int, need: Need, end: int | None = None, *, deadline: float = math.inf
    ) -> list[Hop]:
        self.needs.append(need)
        hops, block, goal = [], first, NUM_BLOCKS if end is None else end
        while block < goal:
            able = [
                (peer, b)
                for peer, (a, b) in self.spans.items()
                if a <= block < b and peer not in self.banned | self.leaving
            ]
            if not able:
                raise MissingBlocksError((block,), f"nobody serves block {block}")
            peer, reach = max(able, key=lambda one: one[1])
            hops.append(Hop(block, min(reach, goal), peer))
            block = hops[-1].end
        return hops

    def _check(self, hop: Hop) -> None:
        self.asked.append((hop.peer, hop.first, hop.end))
        error = self.fails(hop.peer)
        if error is not None:
            # A server that died has lost its sessions; one that answers again begins anew.
            self._caches = {key: cache for key, cache in self._caches.items() if key[0] != hop.peer}
            raise error

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        self._check(hop)
        self.lengths_with_vectors.update({call.length} if call.vectors else ())
        cache = None
        if session is not None:
            new = self._runner.new_cache(keeps_everything=call.keeps_everything)
            cache = self._caches.setdefault((hop.peer, session), new)
        return self._lm.ride([lambda: self._runner.forward(call, cache)])[0]

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        self._check(hop)
        return self._lm.ride([lambda: self._runner.backward(call, grads)])[0]

    def replay(
        self, calls: Sequence[SpanCall], hop: Hop, session: str, deadline: float, *, returns: bool
    ) -> list[dict[int, Tensor]]:
        self._check(hop)
        self.replayed.append(len(calls))
        cache = self._runner.new_cache(keeps_everything=calls[0].keeps_everything)
        outputs = self._lm.ride(self._runner.replay(calls, cache))
        self._caches[hop.peer, session] = cache
        return list(outputs) if returns else []

    def end_session(self, kept: Kept) -> None:
        self._caches.pop((kept.hop.peer, kept.session), None)

    def soon(self, work: Callable[[], object]) -> None:
        work()

    def is_leaving(self, peer: str) -> bool:
        return peer in self.leaving

    def ban(self, peer: str, until: float) -> None:
        self.banned.add(peer)
        self.ban_seconds.append(round(until - time.monotonic()))

    def name_of(self, peer: str) -> str:
        return peer


class Swarm:
    """A client whose blocks are at `FailingServers`, and plain transformers on the same weights."""

    def __init__(self, folder: Path) -> None:
        self.plain: Any = resident(folder)
        self.server, self.lm = (slowllm.load(folder, dtype="float32", ram="6GiB") for _ in range(2))
        self.servers = FailingServers(
            self.server, {"a": (0, 2), "b": (2, 4), "c": (0, 3), "d": (1, 4), "e": (0, 4)}
        )
        self.failover = Failover(self.servers, PATIENCE)
        blocks = self.lm.layout.blocks
        form = find_form(self.lm.model, self.lm.layout.blocks_name)
        self.source = LabelSource()
        for number, block in enumerate(blocks):
            remote = Remote(self, form, self.lm.config, lambda work: work(), self.source)  # type: ignore[arg-type]
            blocks[number] = make_remote(block, number, remote)
        hook_inputs(blocks)

    def __getattr__(self, name: str) -> Any:  # the `Spans` of the moment
        return getattr(self.__dict__["failover"], name)

    def reset(
        self,
        fails: Callable[[str], Exception | None] = lambda peer: None,
        timeout: float = PATIENCE,
        replay: Replay = "steps",
    ) -> None:
        self.servers.banned.clear()
        self.servers.asked.clear()
        self.servers.ban_seconds.clear()
        self.servers.fails = fails
        self.servers.replayed.clear()
        self.servers.leaving.clear()
        self.failover = Failover(self.servers, timeout, replay)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.lm.close()
        self.server.close()


def failing_swarm(folder: Path, family: str = "llama-2") -> Swarm:
    """Return a client of a tiny model, and servers a, b, c, d and e of its four blocks; a context manager."""
    save_tiny(family, folder, num_hidden_layers=NUM_BLOCKS)
    return Swarm(folder)


def at_calls(numbers: Sequence[int], error: Callable[[str], Exception]) -> Callable[[str], Exception | None]:
    """Return what lets the servers of some calls fail, counted from 0."""
    count = iter(range(1 << 30))
    return lambda peer: error(peer) if next(count) in numbers else None


def lost(peer: str) -> Exception:
    """Return the error of a server that has died."""
    return PeerLostError(peer, "has died")


def embeddings_of(model: Any) -> Tensor:
    """Return the embeddings of `IDS`, which want gradients."""
    return model.get_input_embeddings()(IDS).detach().requires_grad_(True)
