"""How long a job takes on a machine, by a simple model of a sweep: while a stop computes, the disk fills the ring.

Pure arithmetic on sizes in bytes and rates; knows nothing of files, models or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slowllm.errors import InputError

Granularity = Literal["blocks", "leaves"]


# What a model is planned for when nobody says what it will do: this many tokens at a time, again and again.
ASSUMED_TOKENS = 2048
ASSUMED_LENGTH = 512
REPEATS = 10


@dataclass(frozen=True)
class StopSize:
    """What one stop costs.

    Attributes:
        num_bytes: in a buffer.
        largest_bytes: of its largest tensor there.
        flops: of one token.
        decoded_bytes: further bytes through the processor for every micro-batch, where its tensors are decoded.
    """

    num_bytes: int
    largest_bytes: int
    flops: float = 0.0
    decoded_bytes: int = 0


@dataclass(frozen=True)
class Sizes:
    """What a model needs, cut into stops of one granularity.

    Attributes:
        granularity: whole blocks, or their leaves (linears, fused experts), which cannot run backward.
        stops: in order, the head's chunks last.
        kept_bytes: parameters that always stay, and the scratch buffers of the dtype swap.
        block_token_bytes: scratch memory of one token inside a block; one rider computes at a time.
        attention_token_bytes: the same again for every token of its sequence, where attention is written out.
        rider_token_bytes: what one token of a waiting rider holds.
        result_token_bytes: what it holds besides where a call of the model returns all: logits, and keys and values.
        checkpoint_token_bytes: what it holds besides where a gradient is asked for: the input of every block.
        replay_token_bytes: scratch memory of a token inside a block besides, where the block runs backward.
        replay_attention_bytes: the same again for every token of its sequence, where attention is written out.
        num_head_stops: how many of the stops are chunks of the head.
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

    @property
    def all_bytes(self) -> int:
        """Bytes of all stops."""
        return sum(stop.num_bytes for stop in self.stops)

    @property
    def smallest_ring_bytes(self) -> int:
        """The ring that never blocks: see `reader.smallest_ring`."""
        return max(stop.num_bytes for stop in self.stops) + max(stop.largest_bytes for stop in self.stops)


@dataclass(frozen=True)
class Job:
    """What a model is opened for.

    Attributes:
        num_tokens: of the whole job, prefixes included; None where it is not known.
        longest: tokens of the longest sequence.
        repeated: whether as much will be done again and again (a session in Python, steps of tuning).
        forward_only: whether no gradient will be asked for.
        keeps_results: whether calls of the model return logits and caches, as they do by default.
        packing: tokens of a micro-batch, of a sweep and of padding that are given, because the job was begun with
            them.
        num_passes: sweeps that a sequence takes: after the first, each computes one token of it beside what it holds.
        turns: whether each sweep comes down again from the last block, as in tuning.
        first_stop: the lowest stop that it comes to.
        rider_tokens: of a micro-batch, where they are given: what the rounding depends on.
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

    def __post_init__(self) -> None:
        if not isinstance(self.num_passes, int) or self.num_passes < 1:
            raise InputError(f"a sequence cannot take {self.num_passes!r} sweeps")
        if not isinstance(self.longest, int) or self.longest < 1:
            raise InputError(f"the longest sequence cannot have {self.longest!r} tokens")
        if self.num_tokens is not None and not (
            isinstance(self.num_tokens, int) and self.num_tokens >= self.longest
        ):
            raise InputError(f"a job cannot have {self.num_tokens!r} tokens and a sequence of {self.longest}")


@dataclass(frozen=True)
class Rates:
    """How fast a machine is; these are assumed until measured.

    Attributes:
        disk: bytes a second that the reader gets.
        memory: bytes of weights a second that a product of a few rows passes through.
        compute: floating-point operations a second of a block with many rows, what is no product included.
        measured: whether they were.
    """

    disk: float = 2e9
    memory: float = 12e9
    compute: float = 1e12
    measured: bool = False


@dataclass(frozen=True)
class Forecast:
    """How long a job takes by the plan.

    Attributes:
        num_sweeps: of the job.
        first_seconds: of the first sweep.
        later_seconds: of each sweep after it, on average.
        seconds: of the job.
        read_seconds: of a later sweep's bytes at the disk's rate.
        compute_seconds: of a later sweep's tokens, on weights already in memory.
        read_bytes: of a later sweep.
    """

    num_sweeps: int
    first_seconds: float
    later_seconds: float
    seconds: float
    read_seconds: float
    compute_seconds: float
    read_bytes: int


def tokens_of(job: Job) -> int:
    """Return the tokens of a job, assumed ones where nobody said."""
    return max(ASSUMED_TOKENS, job.longest) if job.num_tokens is None else job.num_tokens


def compute_seconds(stop: StopSize, rates: Rates, rider: int, sweep: int) -> float:
    """Return how long a stop computes a sweep's tokens, in micro-batches of `rider` tokens."""
    # Each rider takes the weights through the processor once.
    passing_bytes = stop.num_bytes + stop.decoded_bytes
    return -(-sweep // rider) * passing_bytes / rates.memory + sweep * stop.flops / rates.compute


def forecast_of(
    sizes: Sizes,
    resident: frozenset[int],
    ring_bytes: int,
    rider_tokens: int,
    sweep_tokens: int,
    job: Job,
    rates: Rates,
) -> Forecast:
    """Foretell a job's time: while a stop computes, the disk fills what is free in the ring, and no more."""
    total = tokens_of(job)
    sweep = min(sweep_tokens, total)
    num_riders, num_loads = -(-sweep // min(rider_tokens, sweep)), -(-total // sweep)
    full = [compute_seconds(stop, rates, min(rider_tokens, sweep), sweep) for stop in sizes.stops]
    way = _way(sizes, job)
    first, later = _sweep_seconds(sizes, way, resident, ring_bytes, full, rates)
    # A load's later passes compute one token of each sequence, and each rider still takes the weights through.
    rows = max(num_riders, sweep // job.longest)
    one_each = [compute_seconds(stop, rates, -(-rows // num_riders), rows) for stop in sizes.stops]
    _, short = _sweep_seconds(sizes, way, resident, ring_bytes, one_each, rates)
    reads = reads_of(sizes, job)
    read_bytes = sum(s.num_bytes * reads[n] for n, s in enumerate(sizes.stops) if n not in resident)
    computing = math.fsum(full[stop] * times for stop, times in way)
    times = REPEATS if job.repeated else 1
    num_full, num_short = times * num_loads - 1, times * num_loads * (job.num_passes - 1)
    seconds = first + num_full * later + num_short * short
    if num_short:
        later = (num_full * later + num_short * short) / (num_full + num_short)
        computing = (num_full * computing + num_short * math.fsum(one_each)) / (num_full + num_short)
    return Forecast(
        num_sweeps=num_loads * job.num_passes,
        first_seconds=first,
        later_seconds=later,
        seconds=seconds / times,
        read_seconds=read_bytes / rates.disk,
        compute_seconds=computing,
        read_bytes=read_bytes,
    )


def reads_of(sizes: Sizes, job: Job) -> list[int]:
    """Return how often a sweep among others reads each stop that is not kept.

    Where the sweep turns, at its lower end, the next one begins with the stop that is still there.
    """
    reads = [0] * len(sizes.stops)
    for stop, _ in _way(sizes, job):
        reads[stop] += 1
    if job.turns:
        reads[job.first_stop] -= 1
    return reads


def _way(sizes: Sizes, job: Job) -> list[tuple[int, float]]:
    """Return the stops of a sweep, each with the work there: 1 for a forward pass.

    Going down a block is computed again, and its gradient takes about as long; the head's is made on the way up.
    """
    if not job.turns:
        return [(stop, 1.0) for stop in range(job.first_stop, len(sizes.stops))]
    num_body = len(sizes.stops) - sizes.num_head_stops
    blocks = range(job.first_stop, num_body)
    up = [(stop, 1.0) for stop in blocks]
    return [
        *up,
        *((stop, 2.0) for stop in range(num_body, len(sizes.stops))),
        *((s, 2.0) for s in reversed(blocks)),
    ]


def _sweep_seconds(
    sizes: Sizes,
    way: Sequence[tuple[int, float]],
    resident: frozenset[int],
    ring_bytes: int,
    computing: Sequence[float],
    rates: Rates,
) -> tuple[float, float]:
    """Return the seconds of a first sweep and of a later one, each stop computing for so long."""
    ahead, seconds, last = 0.0, [0.0, 0.0], -1
    there: set[int] = set()
    for number in range(2):
        for index, times in way:
            stop, is_kept = sizes.stops[index], index in resident
            # A resident stop has room of its own and is read once.
            to_read = 0 if index in there or index == last else stop.num_bytes
            if is_kept:
                there.add(index)
            wait = max(0.0, to_read - ahead) / rates.disk
            room = ring_bytes - (0 if is_kept else stop.num_bytes)
            work = times * computing[index]
            ahead = min(max(room, 0), max(0.0, ahead - to_read) + work * rates.disk)
            seconds[number] += wait + work
            last = index
    return seconds[0], seconds[1]
