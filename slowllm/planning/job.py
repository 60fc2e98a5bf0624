"""What the plan is given: the job, the sizes of the stops and the rates of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slowllm.errors import InputError

Granularity = Literal["blocks", "leaves"]


# What a model is planned for when nobody says what it will do: this many tokens at a time, again and again.
ASSUMED_TOKENS = 2048


ASSUMED_LENGTH = 512


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
        kept_bytes: parameters that always stay, and the buffers that weights are cast into.
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


def tokens_of(job: Job) -> int:
    """Return the tokens of a job, assumed ones where nobody said."""
    return max(ASSUMED_TOKENS, job.longest) if job.num_tokens is None else job.num_tokens
