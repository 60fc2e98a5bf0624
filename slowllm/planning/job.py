"""The inputs of the plan: the job, the sizes of the stops and the rates of the machine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Self

from slowllm.errors import InputError
from slowllm.rounding import ceil_div

Granularity = Literal["blocks", "experts", "leaves"]
# Those that can run backward.
WHOLE_BLOCKS: tuple[Granularity, ...] = ("blocks", "experts")

# The plan for a job of unknown size assumes this many tokens at a time, again and again.
ASSUMED_TOKENS = 2048
ASSUMED_LENGTH = 512


@dataclass(frozen=True)
class StopSize:
    """The costs of one stop.

    Attributes:
        num_bytes: in a buffer.
        largest_bytes: of its largest tensor there.
        flops: of one token.
        decoded_bytes: further bytes that pass through the processor for every micro-batch, if its tensors are decoded.
    """

    num_bytes: int
    largest_bytes: int
    flops: float = 0.0
    decoded_bytes: int = 0


@dataclass(frozen=True)
class ExpertSizes:
    """The experts of a model, where each is read when a router asks for it.

    Attributes:
        stops: those of a carousel that have experts.
        num_experts: of each of them.
        top_k: that one token takes.
        unit_bytes: of one expert in a buffer.
        largest_bytes: of its largest tensor there.
        unit_flops: of one token in one expert.
        decoded_bytes: further bytes that pass through the processor for every expert, if it is decoded.
        popularity: of each expert of a block, the most popular first, where earlier runs were counted; see `popularity_of` in
            `planning.experts`.
        router_bytes: of copies of all routers, which guess what the next stop will need.
    """

    stops: frozenset[int]
    num_experts: int
    top_k: int
    unit_bytes: int
    largest_bytes: int
    unit_flops: float = 0.0
    decoded_bytes: int = 0
    popularity: tuple[float, ...] = ()
    router_bytes: int = 0

    @property
    def num_units(self) -> int:
        """Experts of all blocks."""
        return len(self.stops) * self.num_experts

    @property
    def all_bytes(self) -> int:
        """Bytes of all experts of all blocks."""
        return self.num_units * self.unit_bytes

    @property
    def smallest_ring_bytes(self) -> int:
        """Size of a ring for the experts that never blocks."""
        return self.unit_bytes + self.largest_bytes


@dataclass(frozen=True)
class Sizes:
    """The memory that a model needs, cut into stops of one granularity.

    Attributes:
        granularity: whole blocks; blocks whose experts are read on demand; or their leaves (linears, fused experts), which
            cannot run backward.
        stops: in order, the chunks of the head last.
        kept_bytes: parameters that always stay in memory, and the buffers that weights are cast into.
        block_token_bytes: scratch memory of one token inside a block; one rider computes at a time.
        attention_token_bytes: the same for every token of its sequence, if attention scores are materialised.
        rider_token_bytes: memory of one token of a waiting rider.
        waiting_attention_bytes: the same for every token of its sequence, if riders wait in the middle of attention.
        result_token_bytes: further memory of it if a call of the model returns everything: logits, keys and values.
        checkpoint_token_bytes: further memory of it if a gradient is asked for: the input of every block.
        replay_token_bytes: further scratch memory of a token inside a block that runs backward.
        replay_attention_bytes: the same for every token of its sequence, if attention scores are materialised.
        num_head_stops: how many of the stops are chunks of the head.
        cache_token_bytes: of `result_token_bytes`, keys and values.
        logits_bytes: logits of one position in float32.
        returns_all_logits: whether a call of the model computes logits of all positions, whatever is asked for.
        num_blocks: whose stops these are.
        experts: that are read on demand, beside the stops.
        decoded_stop_bytes: of the coded matrices of the largest stop, decoded; experts are left out.
        passing_bytes: of a ring that there is even where all stops stay, because stops pass through it that stay on devices.
    """

    granularity: Granularity
    stops: tuple[StopSize, ...]
    kept_bytes: int
    block_token_bytes: int
    attention_token_bytes: int
    rider_token_bytes: int
    result_token_bytes: int = 0
    checkpoint_token_bytes: int = 0
    replay_token_bytes: int = 0
    replay_attention_bytes: int = 0
    num_head_stops: int = 0
    cache_token_bytes: int = 0
    logits_bytes: int = 0
    returns_all_logits: bool = False
    num_blocks: int = 1
    experts: ExpertSizes | None = None
    decoded_stop_bytes: int = 0
    waiting_attention_bytes: int = 0
    passing_bytes: int = 0

    @property
    def all_bytes(self) -> int:
        """Bytes of all stops, and of experts that are read on demand."""
        return sum(stop.num_bytes for stop in self.stops) + (self.experts.all_bytes if self.experts else 0)

    @property
    def smallest_ring_bytes(self) -> int:
        """Size of a ring that never blocks; see `smallest_ring` beside the reader."""
        largest = max(stop.num_bytes for stop in self.stops) + max(stop.largest_bytes for stop in self.stops)
        return max(largest, self.passing_bytes)

    @property
    def waiting_token_bytes(self) -> int:
        """Memory of one token of a waiting rider that returns everything and keeps what a gradient needs."""
        return self.rider_token_bytes + self.result_token_bytes + self.checkpoint_token_bytes

    def scratch_bytes(self, num_tokens: int, longest: int) -> int:
        """Return the memory that a block takes to compute a micro-batch with sequences of up to `longest` tokens."""
        return num_tokens * (self.block_token_bytes + longest * self.attention_token_bytes)


@dataclass(frozen=True)
class ContinuedRow:
    """A row of a batch that is continued token by token.

    Attributes:
        width: its tokens before the first new one.
        length: its tokens at the end.
        num_held: copies of the logits of one position in float32 that it holds while its rider waits.
        num_scratch: further copies while its next token is chosen.
    """

    width: int
    length: int
    num_held: int
    num_scratch: int


@dataclass(frozen=True)
class Job:
    """The job that a model is opened for.

    Attributes:
        num_tokens: of the whole job, prefixes included; None if unknown.
        longest: tokens of the longest sequence.
        repeated: whether as much will be done again and again (a session in Python, steps of tuning).
        forward_only: whether no gradient will be asked for.
        keeps_results: whether calls of the model return logits and caches, as they do by default.
        packing: tokens of a micro-batch, of a sweep and of padding, fixed because the job was begun with them.
        num_passes: sweeps that a sequence takes: each after the first computes one more token of it.
        turns: whether each sweep comes down again from the last block, as in tuning.
        first_stop: the lowest stop that the job visits.
        rider_tokens: of a micro-batch, fixed because rounding depends on it.
        rows: in generation, the rows that are continued, alike ones together, each with their number. Such a job
            keeps keys and values, and logits of its last positions only.
        serves: whether requests of others come as long as the model is open; see `serving`.
        cache_tokens: that the caches of sessions hold beside the riders.
        held_token_bytes: further memory of one token of a sweep, for results that wait to be written.
    Raises:
        InputError: these are no numbers of tokens.
    """

    num_tokens: int | None = None
    longest: int = ASSUMED_LENGTH
    repeated: bool = False
    forward_only: bool = False
    keeps_results: bool = True
    packing: tuple[int, int, int] | None = None
    num_passes: int = 1
    turns: bool = False
    first_stop: int = 0
    rider_tokens: int | None = None
    rows: tuple[tuple[ContinuedRow, int], ...] = ()
    serves: bool = False
    cache_tokens: int = 0
    held_token_bytes: int = 0

    @classmethod
    def serving(
        cls,
        *,
        cache_tokens: int,
        batch_tokens: int,
        max_batch_tokens: int,
        backward: bool,
        longest: int | None = None,
    ) -> Self:
        """Return the job of a server: hidden states in, hidden states out, with and without a session.

        Args:
            cache_tokens: in the caches of all sessions together; 0 where it has no sessions.
            batch_tokens: of one request.
            max_batch_tokens: of all requests under way at once.
            backward: whether it computes gradients as well, which needs whole blocks.
            longest: tokens of the longest sequence, those in its cache included; by default the most that the other
                numbers allow.
        Raises:
            InputError: these are no numbers of tokens.
        """
        least = {"batch_tokens": 1, "max_batch_tokens": batch_tokens, "cache_tokens": 0}
        given = {
            "batch_tokens": batch_tokens, "max_batch_tokens": max_batch_tokens, "cache_tokens": cache_tokens,
        }  # fmt: skip
        for name, number in given.items():
            if not isinstance(number, int) or number < least[name]:
                raise InputError(f"a server cannot have {name} of {number!r}; use {least[name]} at least")
        return cls(
            longest=max(cache_tokens, batch_tokens) if longest is None else longest,
            repeated=True,
            forward_only=not backward,
            keeps_results=False,
            packing=(batch_tokens, max_batch_tokens, 0),
            serves=True,
            cache_tokens=cache_tokens,
        )

    def __post_init__(self) -> None:
        if not isinstance(self.num_passes, int) or self.num_passes < 1:
            raise InputError(f"a sequence cannot take {self.num_passes!r} sweeps")
        if not isinstance(self.longest, int) or self.longest < 1:
            raise InputError(f"the longest sequence cannot have {self.longest!r} tokens")
        if self.num_tokens is not None and not (
            isinstance(self.num_tokens, int) and self.num_tokens >= self.longest
        ):
            raise InputError(f"a job cannot have {self.num_tokens!r} tokens and a sequence of {self.longest}")

    def covers(self, other: Job) -> bool:
        """Return whether a model that was opened for this job does another one in the same memory."""
        tokens = other.num_tokens or 0
        return (
            bool(self.rows) == bool(other.rows)
            and self.most_logits(tokens, tokens) >= other.most_logits(tokens, tokens)
            and self.keeps_results == other.keeps_results
            and self.held_token_bytes >= other.held_token_bytes
            and self.num_passes >= other.num_passes
            and self.longest >= other.longest
            and (self.num_tokens or 0) >= (other.num_tokens or 0)
        )

    def most_logits(self, rider_tokens: int, sweep_tokens: int) -> int:
        """Return the most copies of one position's logits that a sweep holds, one of whose riders chooses tokens.

        Args:
            rider_tokens: of a micro-batch, before the first new token.
            sweep_tokens: of all riders, at their end.
        """
        held = _most(((row.length, row.num_held, count) for row, count in self.rows), sweep_tokens)
        return held + _most(((row.width, row.num_scratch, count) for row, count in self.rows), rider_tokens)

    @property
    def planned_tokens(self) -> int:
        """Tokens of the job, assumed ones if their number is unknown."""
        return max(ASSUMED_TOKENS, self.longest) if self.num_tokens is None else self.num_tokens


def _most(rows: Iterable[tuple[int, int, int]], num_tokens: int) -> int:
    """Return the most copies that rows of so many tokens in all hold; each row is its tokens, copies and number."""
    total = 0
    for tokens, copies, count in sorted(rows, key=lambda row: -row[1] / row[0]):
        taken = min(count, ceil_div(num_tokens, tokens))
        total += taken * copies
        num_tokens -= taken * tokens
        if num_tokens <= 0:
            break
    return total


@dataclass(frozen=True)
class Rates:
    """Speed of a machine, assumed until it is measured.

    Attributes:
        disk: bytes a second that the reader gets.
        memory: bytes of weights a second in a matrix product with few rows.
        compute: floating-point operations a second of a block with many rows, work beside the products included.
        copy: bytes a second from RAM to where they are computed with; infinite where that is the processor.
        measured: whether any of them is.
        disk_measured: whether the disk's rate is.
        compute_measured: whether the rate with many rows is.
    """

    disk: float = 2e9
    memory: float = 12e9
    compute: float = 1e12
    copy: float = math.inf
    measured: bool = False
    disk_measured: bool = False
    compute_measured: bool = False


def with_smaller_weights(sizes: Sizes, factor: float) -> Sizes:
    """Return the sizes of a model whose weights take `factor` of the bytes on disk and in memory."""
    stops = tuple(
        replace(s, num_bytes=int(s.num_bytes * factor), largest_bytes=int(s.largest_bytes * factor))
        for s in sizes.stops
    )
    experts = sizes.experts
    if experts is not None:
        experts = replace(
            experts,
            unit_bytes=int(experts.unit_bytes * factor),
            largest_bytes=int(experts.largest_bytes * factor),
        )
    return replace(sizes, stops=stops, experts=experts)


def with_popularity(sizes: Sizes, popularity: tuple[float, ...]) -> Sizes:
    """Return sizes whose experts are as popular as earlier runs found; see `ExpertSizes`."""
    if sizes.experts is None or not popularity:
        return sizes
    return replace(sizes, experts=replace(sizes.experts, popularity=popularity))
