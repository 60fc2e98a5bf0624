"""A swarm in network namespaces, in which every packet to and from one server is dropped: `python -m tests.support.dropped FOLDER`.

To be run by root in a network namespace of its own (`unshare --net`), which ends with it. The client is in this
process, and so are nobody's signals: to the server it is as if its cable were cut, and to the client as if the way to
it were. Prints one JSON document: whether the bits are those of a local model, and the seconds of each step.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import slowllm
from slowllm.swarm.client import SwarmOptions
from tests.support.disturbed import WORKS, Moment, run
from tests.support.parted import OUTSIDE, parted
from tests.support.served import save_model
from tests.support.swarm_processes import SwarmProcesses, serve_arguments

# Nobody's: who is told to send there sends into the void.
NOBODY = "02:00:00:00:00:99"


def call(*words: str) -> None:
    """Run a command of the system."""
    subprocess.run(words, check=True)


class Machine:
    """A network namespace, joined to this one by a cable.

    Attributes:
        address: of the machine; this one has the one before.
        pid: of a process in it.
    """

    def __init__(self, number: int) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        # It answers from the namespace.
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()
        self._holder.stdout.read(1)
        self.pid, self._here, self._there = self._holder.pid, f"here{number}", f"there{number}"
        self._near, self.address = f"10.0.{number}.1", f"10.0.{number}.2"
        call("ip", "link", "add", self._here, "type", "veth", "peer", "name", self._there)
        call("ip", "link", "set", self._there, "netns", str(self.pid))
        call("ip", "address", "add", f"{self._near}/24", "dev", self._here)
        call("ip", "link", "set", self._here, "up")
        self._inside("ip", "address", "add", f"{self.address}/24", "dev", self._there)
        self._inside("ip", "link", "set", self._there, "up")
        self._inside("ip", "link", "set", "lo", "up")
        self._inside("ip", "route", "add", "default", "via", self._near)

    def _inside(self, *words: str) -> None:
        call("nsenter", "--net", "--target", str(self.pid), *words)

    def cut(self) -> None:
        """Drop every packet in both directions, and tell nobody."""
        wrong = ("lladdr", NOBODY, "nud", "permanent")
        call("ip", "neighbour", "replace", self.address, *wrong, "dev", self._here)
        self._inside("ip", "neighbour", "replace", self._near, *wrong, "dev", self._there)

    def end(self) -> None:
        """End the namespace, when its processes have ended."""
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait()


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """Make namespaces, which are ended with the context."""
    with contextlib.ExitStack() as held:
        made = []
        for number in range(count):
            made.append(Machine(number))
            held.callback(made[-1].end)
        yield made


def main() -> None:
    """Work while packets are dropped."""
    call("ip", "link", "set", "lo", "up")
    whole = save_model(Path(sys.argv[1]))
    ends = parted(whole, Path(sys.argv[1]) / "ends", OUTSIDE)
    with machines(2) as (one, other), SwarmProcesses() as swarm:
        first = swarm.start(*serve_arguments(whole, "0:3", "--host-maddrs", "/ip4/10.0.0.1/tcp/0"))
        far = swarm.start_all(
            [
                "-m", "tests.support.in_namespace", machine.pid,
                *serve_arguments(
                    whole, "3:6", "--initial-peers", first.address, "--host-maddrs", f"/ip4/{machine.address}/tcp/0",
                )[2:],
            ]
            for machine in (one, other)
        )  # fmt: skip
        by_peer = {
            process.address.rpartition("/")[2]: machine
            for process, machine in zip(far, (one, other), strict=True)
        }
        options = SwarmOptions((first.address,), timeout=60.0, step_timeout=2.0)
        with (
            slowllm.load(ends, swarm=options) as lm,
            slowllm.load(whole, ram="3GiB", dtype="float32") as local,
        ):
            theirs = WORKS["beams"](local.model, [])
            usual = run(lm, WORKS["beams"])

            def cut(_: str) -> None:
                # Whoever is asked at the moment, the server of the second half loses its cable.
                by_peer[next(peer for peer in list(lm.swarm.times)[::-1] if peer in by_peer)].cut()

            ours = run(lm, WORKS["beams"], Moment("sent", 9, 0.0), cut)
            same = all(map(torch.equal, ours.outputs, theirs))
        print(
            json.dumps({"same": same, "harmed": len(ours.harmed), "usual": usual.steps, "steps": ours.steps})
        )


if __name__ == "__main__":
    main()
