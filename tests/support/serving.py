"""Servers of a swarm in the tests' own process, and requests that are sent to a server by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slowllm.modeling.span import SpanCall
from slowllm.swarm.network import Network
from slowllm.swarm.server import Server
from slowllm.swarm.server_options import ServerOptions
from slowllm.swarm.span_messages import SpanRequest, pack_request

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@contextlib.contextmanager
def serving(folder: Path, blocks: str, *initial_peers: str, **options: Any) -> Iterator[Server]:
    """Serve a span of a checkpoint from this process."""
    given = {"ram": "3GiB", "dtype": "float32", "cache_tokens": 2000, "max_batch_tokens": 512, **options}
    with Server(
        folder, ServerOptions(blocks, host_maddrs=LOOPBACK, initial_peers=initial_peers, **given)
    ) as server:
        yield server


def hidden_states(width: int, rows: int = 1, num_positions: int = 11, seed: int = 0) -> Tensor:
    """Return random hidden states (rows, positions, width)."""
    return torch.randn(rows, num_positions, width, generator=torch.Generator().manual_seed(seed))


def send(
    network: Network, peer: str, call: SpanCall, session: str | None = None, step: int = 0
) -> Future[Any]:
    """Ask a server to compute a span; return the future of its answer's meta and tensors."""
    meta, tensors = pack_request(SpanRequest(call, session, step))
    return network.ask(peer, meta, tensors)
