"""How often a swarm has all blocks while its servers come and go: the placement's own decisions, simulated.

    python -m benchmarks.swarm_churn --servers 200 --blocks 70 --churn 0.2 --hours 24

Nothing is measured here: servers are records, time is a number, and what is run is `swarm.placement` and
`swarm.rebalancing`, as servers run them. Half of those that go die, and are seen for as long as a record lives; the others
say goodbye. As many come, and take the blocks that the swarm lacks most. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report import add_report_option, finish
from slowllm.swarm.placement import block_rates, scarcest_blocks
from slowllm.swarm.rebalancing import better_blocks, delay_seconds, next_check_seconds
from slowllm.swarm.records import ServerRecord

# As in `swarm.server`: a record lives so long after its last announcement, which may have been a while ago.
RECORD_SECONDS, ANNOUNCE_SECONDS = 30.0, 10.0
# In which a server reads its blocks, before it serves.
LOADING_SECONDS = (20.0, 180.0)


@dataclass(frozen=True)
class Coverage:
    """What came of a simulation.

    Attributes:
        num_joined: servers that came, those of the start among them.
        num_left: servers that went.
        num_moves: changes of blocks.
        covered: share of the time in which every block was served.
        longest_gap_seconds: for which some block was not.
        mean_slowest: tokens a second of the slowest block, on the average over time.
        mean_fair: what it would be if all servers' rates lay evenly over the blocks.
    """

    num_joined: int
    num_left: int
    num_moves: int
    covered: float
    longest_gap_seconds: float
    mean_slowest: float
    mean_fair: float


class Simulation:
    """A swarm whose servers are records, and events in their order of time."""

    def __init__(
        self, num_servers: int, num_blocks: int, churn: float, seed: int, *, rebalances: bool = True
    ) -> None:
        self._random, self._num_blocks, self._churn = random.Random(seed), num_blocks, churn
        self._num_servers, self._rebalances = num_servers, rebalances
        self._records: dict[str, ServerRecord] = {}  # as the swarm sees them
        self._alive: set[str] = set()
        self._events: list[tuple[float, int, str, str]] = []
        self._number = self.num_left = self.num_moves = 0
        for _ in range(num_servers):
            self._push(self._random.uniform(0.0, 60.0), "join", "")

    def _push(self, at: float, what: str, peer: str) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, what, peer))

    def run(self, hours: float, warm_up_hours: float = 0.5) -> Coverage:
        """Return what happens between the end of the warm-up and the end."""
        begin, end = warm_up_hours * 3600.0, hours * 3600.0
        now = begin
        covered = gap = longest = slowest = fair = 0.0
        while self._events and self._events[0][0] < end:
            at, _, what, peer = heapq.heappop(self._events)
            if at > now:
                rates = self._served_rates()
                if min(rates) > 0:
                    covered, gap = covered + at - now, 0.0
                else:
                    gap += at - now
                    longest = max(longest, gap)
                slowest += min(rates) * (at - now)
                fair += sum(rates) / self._num_blocks * (at - now)
                now = at
            getattr(self, f"_{what}")(at, peer)
        seconds = now - begin
        return Coverage(
            self._joined,
            self.num_left,
            self.num_moves,
            covered / seconds,
            longest,
            slowest / seconds,
            fair / seconds,
        )

    _joined = 0

    def _served_rates(self) -> list[float]:
        return block_rates(
            [r for peer, r in self._records.items() if peer in self._alive and r.state == "online"],
            self._num_blocks,
        )

    def _join(self, now: float, peer: str) -> None:
        """Let a server come, on the blocks that the swarm lacks most."""
        self._joined += 1
        peer = f"Qm{self._joined:018d}".replace("0", "z")
        count = self._random.randint(2, min(12, self._num_blocks))
        first, end = scarcest_blocks(self._records.values(), self._num_blocks, count)
        # A server's speed through its blocks; machines differ by a factor of ten.
        rate = 10.0 ** self._random.uniform(1.0, 2.0)
        self._records[peer] = ServerRecord(
            peer=peer, addresses=(), model="m", first=first, end=end, state="joining", dtype="bfloat16", version="1",
            forward_tokens_per_second=rate, block_hashes=("h",) * count,
        )  # fmt: skip
        self._alive.add(peer)
        self._push(now + self._random.uniform(*LOADING_SECONDS), "serve", peer)
        if self._churn:
            self._push(now + self._random.expovariate(self._churn / 3600.0), "leave", peer)

    def _serve(self, now: float, peer: str) -> None:
        if peer in self._alive:
            self._records[peer] = replace(self._records[peer], state="online")
            self._push(now + next_check_seconds(self._random), "look", peer)

    def _leave(self, now: float, peer: str) -> None:
        self.num_left += 1
        self._alive.discard(peer)
        dies = self._random.random() < 0.5
        unseen = RECORD_SECONDS - self._random.uniform(0.0, ANNOUNCE_SECONDS) if dies else 0.0
        self._push(now + unseen, "forget", peer)
        self._push(now + self._random.expovariate(1 / 60.0), "join", "")

    def _forget(self, now: float, peer: str) -> None:
        del self._records[peer]

    def _look(self, now: float, peer: str) -> None:
        """Let a server look whether others lack it more, and if so, look again after a delay."""
        if peer not in self._alive:
            return
        if self._rebalances and self._better(peer) is not None:
            self._push(now + delay_seconds(self._random), "move", peer)
        else:
            self._push(now + next_check_seconds(self._random), "look", peer)

    def _move(self, now: float, peer: str) -> None:
        span = self._better(peer) if peer in self._alive else None
        if span is not None:
            self.num_moves += 1
            self._records[peer] = replace(self._records[peer], first=span[0], end=span[1], state="joining")
            self._push(now + self._random.uniform(*LOADING_SECONDS), "serve", peer)
        elif peer in self._alive:
            self._push(now + next_check_seconds(self._random), "look", peer)

    def _better(self, peer: str) -> tuple[int, int] | None:
        return better_blocks(self._records.values(), self._records[peer], self._num_blocks)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=70)
    parser.add_argument("--churn", type=float, default=0.2, help="share of the servers that go in an hour")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seeds", type=int, default=3)
    add_report_option(parser)
    arguments = parser.parse_args(argv)
    runs: list[dict[str, Any]] = []
    for rebalances in (True, False):
        for seed in range(arguments.seeds):
            simulation = Simulation(
                arguments.servers, arguments.blocks, arguments.churn, seed, rebalances=rebalances
            )
            found = simulation.run(arguments.hours)
            runs.append({"rebalances": rebalances, "seed": seed, **vars(found)})
            print(
                f"{'with' if rebalances else 'without'} moves, seed {seed}: all blocks served {found.covered:.3%} of the time, "
                f"longest gap {found.longest_gap_seconds:.0f} s, {found.num_left} left, {found.num_moves} moves, slowest block "
                f"{found.mean_slowest / found.mean_fair:.2f} of an even share"
            )
    given = {name: value for name, value in vars(arguments).items() if name != "report"}
    finish("swarm_churn", {**given, "runs": runs}, arguments.report)


if __name__ == "__main__":
    main()
