"""What a server serves, and within which limits: checked as far as that is possible without the model.

Imports neither torch nor transformers, so that an option that cannot be used is refused at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from slowllm.errors import InputError, counted
from slowllm.options import AUTO, COMPRESSIONS, parse_bytes, parse_devices, parse_dtype, parse_span
from slowllm.planning.job import Job
from slowllm.swarm.addresses import check_addresses, is_peer
from slowllm.swarm.quotas import PeerQuotas
from slowllm.swarm.records import MAX_NAME_LETTERS, is_name

MEASURED = ("auto", "eval", "dry_run")


def parse_throughput(text: str) -> float:
    """Return the tokens a second that ``--throughput`` says are announced; 0 where it says that they are measured.

    Raises:
        InputError: it is none of `MEASURED`, and no number above 0.
    """
    if text in MEASURED:
        return 0.0
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise InputError(f"--throughput is {', '.join(MEASURED)} or tokens a second, not {text!r}")
    return rate


@dataclass(frozen=True)
class ServerOptions:
    """What a server serves, and within which limits.

    Attributes:
        blocks: ``A:B``; or how many, of which the swarm then gets those that it lacks most; or ``auto``, as many as stay in
            memory.
        tokens_per_second: of a batch, which is announced in place of what was measured; 0 for that.
        rebalances: whether a server that has chosen its blocks moves to others where the swarm gains much by that.
        ram: budget for the whole process, as for `slowllm.load`.
        dtype: compute dtype.
        device: where blocks are computed.
        vram: budget on each GPU.
        cache_tokens: that the sessions of all clients hold together.
        cache_bytes: of the keys and values of all sessions together, from which `cache_tokens` follows where the blocks are known;
            None where that is given as it is.
        max_batch_tokens: of one request.
        max_length: of one sequence, what its session holds included.
        max_waiting_tokens: of all requests that are under way or wait; four times as many by default.
        backward: whether gradients are computed.
        compression: of hidden states on the wire.
        name: that people see.
        session_seconds: after which an idle session ends.
        identity: file of the server's key.
        host_maddrs: multiaddresses to listen at.
        announce_maddrs: multiaddresses that others are told, where they differ.
        initial_peers: of the swarm; a new one is begun without.
        use_relay: whether peers may be reached through others.
        keep_resident: whether blocks that fit the budget stay in memory.
        token_file: of the swarm's shared secret; None for a swarm that is open to all.
        allowed: ids of the only peers that are served; empty for all.
        quotas: what one peer may take.
    Raises:
        InputError: an option is none that a server can have, whatever the model; the message names it.
    """

    blocks: str
    ram: str | int = "auto"
    dtype: str = "auto"
    device: str = "cpu"
    vram: str | None = None
    cache_tokens: int = 4096
    cache_bytes: int | None = None
    max_batch_tokens: int = 2048
    max_length: int = 2048
    max_waiting_tokens: int | None = None
    backward: bool = True
    compression: str = "none"
    name: str = ""
    session_seconds: float = 600.0
    identity: Path | None = None
    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    initial_peers: tuple[str, ...] = ()
    use_relay: bool = False
    keep_resident: bool = True
    token_file: Path | None = None
    allowed: tuple[str, ...] = ()
    quotas: PeerQuotas = field(default_factory=PeerQuotas)
    rebalances: bool = True
    tokens_per_second: float = 0.0

    def __post_init__(self) -> None:
        if parse_span(self.blocks) == AUTO and not self.keep_resident:
            raise InputError(
                "--blocks auto takes as many blocks as stay in memory, and with --stream-all none do; say how many"
            )
        if parse_span(self.blocks) == AUTO and self.cache_bytes is not None:
            raise InputError(
                "--blocks auto takes as many blocks as stay in memory beside a number of tokens; give --attn-cache-tokens in place "
                "of --attn-cache-size, or say how many blocks"
            )
        if not 0 <= self.tokens_per_second < math.inf:
            raise InputError(f"a server cannot compute {self.tokens_per_second:g} tokens a second")
        if self.ram != AUTO:
            parse_bytes(self.ram)
        if self.vram is not None:
            parse_bytes(self.vram)
        parse_dtype(self.dtype)
        parse_devices(self.device)
        if self.compression not in COMPRESSIONS:
            raise InputError(f"the compression {self.compression!r} is none of {', '.join(COMPRESSIONS)}")
        if not 0 < self.session_seconds < math.inf:
            raise InputError(f"a session cannot end after {self.session_seconds:g} s; give a time above 0")
        if self.max_length < 1:
            raise InputError(f"a sequence cannot have {self.max_length} tokens")
        if not is_name(self.name):
            raise InputError(
                f"the public name {self.name[:80]!r} has {counted(len(self.name), 'letter')}, or some that cannot be printed; "
                f"at most {MAX_NAME_LETTERS} that can are allowed"
            )
        check_addresses(self.host_maddrs, self.announce_maddrs, self.initial_peers)
        for peer in self.allowed:
            if not is_peer(peer):
                raise InputError(
                    f"--allow-keys {peer[:80]!r} is no peer id, such as `slowllm dht` prints at the end of its lines"
                )
        self.job()

    def job(self) -> Job:
        """Return what the plan must know."""
        waiting = self.waiting_tokens
        return Job.serving(
            cache_tokens=self.cache_tokens, batch_tokens=self.max_batch_tokens, max_batch_tokens=waiting,
            backward=self.backward, longest=self.max_length,
        )  # fmt: skip

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all requests that are under way or wait."""
        return 4 * self.max_batch_tokens if self.max_waiting_tokens is None else self.max_waiting_tokens
