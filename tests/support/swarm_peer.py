"""A peer of a swarm in a process of its own, for tests: `python -m tests.support.swarm_peer '{"initial_peers": [...]}'`.

Prints one JSON line when it is there, serves requests for tests, and closes when it is told to end (SIGTERM). Options are those of `Network.open`; `limits` is a table, and `clock` sets the clock of the
directory wrong by so many seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from slowllm.errors import InputError
from slowllm.swarm.network import Network
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.requests import PeerRequest
from slowllm.swarm.streams import Limits


class Answers:
    """What a peer for tests answers, by the request's `op`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._waiting: dict[str, PeerRequest] = {}
        self._cancelled: set[str] = set()
        self._watching: dict[str, PeerRequest] = {}

    def __call__(self, request: PeerRequest) -> Any:
        """Answer a request on the network's thread."""
        return getattr(self, request.meta["op"])(request)

    def echo(self, request: PeerRequest) -> None:
        """Send back what came."""
        request.respond(request.meta, request.tensors, request.meta.get("compression"))

    def thread(self, request: PeerRequest) -> None:
        """The same, from another thread."""
        threading.Thread(target=self.echo, args=[request]).start()

    async def coroutine(self, request: PeerRequest) -> None:
        """The same, from a coroutine."""
        self.echo(request)

    def count(self, request: PeerRequest) -> None:
        """Say how many bytes came, and send as many as are wanted."""
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in request.tensors.values())
        request.respond(
            {"bytes": num_bytes}, {"out": torch.zeros(request.meta.get("want", 0), dtype=torch.uint8)}
        )

    def wait(self, request: PeerRequest) -> None:
        """Answer when a request `release` of the same name comes; note it when the peer has cancelled before."""
        name = request.meta["name"]
        self._waiting[name] = request

        def cancelled() -> None:
            self._cancelled.add(name)
            if name in self._watching:
                self._watching.pop(name).respond()

        request.add_cancel_callback(cancelled)
        if f"arrival of {name}" in self._watching:
            self._watching.pop(f"arrival of {name}").respond()

    def release(self, request: PeerRequest) -> None:
        """Let a request that waits be answered."""
        self._waiting.pop(request.meta["name"]).respond({"released": True})
        request.respond()

    def arrival(self, request: PeerRequest) -> None:
        """Answer when a request `wait` of this name is there."""
        name = request.meta["name"]
        if name in self._waiting:
            request.respond()
        else:
            self._watching[f"arrival of {name}"] = request

    def cancellation(self, request: PeerRequest) -> None:
        """Answer when a request `wait` of this name was cancelled."""
        name = request.meta["name"]
        if name in self._cancelled:
            request.respond()
        else:
            self._watching[name] = request

    def delay(self, request: PeerRequest) -> None:
        """Answer after some seconds."""
        threading.Timer(request.meta["seconds"], request.respond).start()

    def refuse(self, request: PeerRequest) -> None:
        """Raise what a user got wrong."""
        raise InputError(request.meta["sentence"])

    async def crash(self, request: PeerRequest) -> None:
        """Raise what nobody expects."""
        raise ValueError("/home/someone/secret")

    def announce(self, request: PeerRequest) -> None:
        """Announce a record of this peer, with what the request says in it."""

        def work() -> None:
            fields = {
                "peer": self._network.peer,
                "addresses": self._network.addresses,
                **request.meta["record"],
            }
            fields["block_hashes"] = tuple(fields.get("block_hashes", ()))
            self._network.announce(ServerRecord(**fields), request.meta["ttl"])
            request.respond()

        threading.Thread(target=work).start()


def main() -> None:
    """Run the peer to its end."""
    # Of all threads, so that the one that waits for it gets it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    options = json.loads(sys.argv[1])
    if wrong := options.pop("clock", 0.0):
        import hivemind.dht.protocol

        hivemind.dht.protocol.get_dht_time = lambda: time.time() + wrong  # in this process, which only tests
    is_serving = options.pop("serve", True)
    limits = Limits(**options.pop("limits", {}))
    if "identity" in options:
        options["identity"] = Path(options["identity"])
    with Network.open(limits=limits, **options) as network:
        if is_serving:
            network.serve(Answers(network))
        children = [child.pid for child in psutil.Process().children()]
        told = {
            "peer": network.peer,
            "addresses": network.addresses,
            "pid": os.getpid(),
            "children": children,
        }
        print(json.dumps(told), flush=True)
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
