"""Pure arithmetic: what stays resident, how large the ring is, how many tokens ride a sweep.

Knows sizes in bytes; knows nothing of files, models or text. `Budget` alone keeps state: what several models of
one process have taken from the bytes allowed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from slowllm.errors import PlanError
from slowllm.options import MIB, format_binary

# 64 rows reach a third of the rate of a large matrix product; below this a rider wastes the processor.
MIN_RIDER_TOKENS = 512
# Beyond this a larger matrix product is no faster, and the scratch memory of a block grows with it.
MAX_RIDER_TOKENS = 1024
# A few times T*, the batch whose computing hides under the reading (about 1,000 tokens in bf16 on two cores):
# far above T* another sweep is free, and a result comes earlier.
MAX_SWEEP_TOKENS = 8192
# What the allocator, thread stacks and the interpreter take beyond what is counted here.
SLACK_BYTES = 192 * MIB


@dataclass(frozen=True)
class Sizes:
    """What a model needs, in bytes.

    Attributes:
        stop_bytes: in memory, for each stop.
        smallest_ring_bytes: the ring that never blocks when every stop streams.
        kept_bytes: parameters that always stay, and the scratch buffers of the dtype swap.
        block_token_bytes: scratch memory of one token inside a block; one rider computes at a time.
        rider_token_bytes: what one token of a waiting rider holds.
    """

    stop_bytes: tuple[int, ...]
    smallest_ring_bytes: int
    kept_bytes: int
    block_token_bytes: int
    rider_token_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a model is held.

    Attributes:
        resident: stops that stay in memory, spread evenly.
        ring_bytes: of the ring through which the others stream; 0 where all stay.
        rider_tokens: tokens of one micro-batch, padding included.
        sweep_tokens: tokens of all riders of one sweep.
        peak_bytes: what the model takes of the budget.
    """

    resident: frozenset[int]
    ring_bytes: int
    rider_tokens: int
    sweep_tokens: int
    peak_bytes: int


class Budget:
    """Bytes of memory that the models of one process may take together.

    Args:
        total_bytes: for the whole process, the interpreter included.
        used_bytes: what the process holds already.
    """

    def __init__(self, total_bytes: int, used_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = used_bytes
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """What is left to take."""
        return self.total_bytes - self.used_bytes

    def take(self, num_bytes: int) -> None:
        """Take a part of the budget.

        Raises:
            PlanError: less is left.
        """
        with self._lock:
            if num_bytes > self.free_bytes:
                raise PlanError(
                    f"{format_binary(num_bytes)} are needed but only {format_binary(max(self.free_bytes, 0))} "
                    f"of the budget of {format_binary(self.total_bytes)} are left"
                )
            self.used_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Return what was taken."""
        with self._lock:
            self.used_bytes -= num_bytes


def make_plan(sizes: Sizes, *, free_bytes: int, total_bytes: int, keep_resident: bool = True) -> Plan:
    """Divide the budget: first what must be, then tokens, then resident stops.

    Args:
        free_bytes: what this model may take.
        total_bytes: the whole budget, for the error's numbers.
        keep_resident: whether stops may stay in memory.
    Raises:
        PlanError: the model cannot run in the budget; the message names the smallest that would do.
    """
    all_bytes = sum(sizes.stop_bytes)

    def working(rider_tokens: int, sweep_tokens: int) -> int:
        return rider_tokens * sizes.block_token_bytes + sweep_tokens * sizes.rider_token_bytes

    # A model smaller than the ring is better kept than streamed.
    floor_stops = min(sizes.smallest_ring_bytes, all_bytes) if keep_resident else sizes.smallest_ring_bytes
    fixed = sizes.kept_bytes + SLACK_BYTES
    floor = fixed + floor_stops + working(MIN_RIDER_TOKENS, MIN_RIDER_TOKENS)
    if free_bytes < floor:
        smallest = total_bytes - free_bytes + floor
        raise PlanError(
            f"a budget of {format_binary(total_bytes)} is too small for this model: "
            f"the smallest that would do is {format_binary(-(-smallest // MIB) * MIB)} "
            f"({format_binary(total_bytes - free_bytes)} for the process as it is, "
            f"{format_binary(fixed)} always in memory, {format_binary(floor_stops)} for the weights passing "
            f"through and {format_binary(working(MIN_RIDER_TOKENS, MIN_RIDER_TOKENS))} for {MIN_RIDER_TOKENS} tokens)"
        )

    everything = fixed + all_bytes + working(MIN_RIDER_TOKENS, MIN_RIDER_TOKENS)
    stays = keep_resident and everything <= free_bytes
    # Tokens come before resident stops, up to half of what is free: a sweep's cost is shared by its tokens.
    spare = free_bytes - (everything if stays else floor)
    allowance = spare if stays else spare // 2
    rider_tokens = min(
        MAX_RIDER_TOKENS,
        MIN_RIDER_TOKENS + allowance // 2 // (sizes.block_token_bytes + sizes.rider_token_bytes),
    )
    allowance -= working(rider_tokens, rider_tokens) - working(MIN_RIDER_TOKENS, MIN_RIDER_TOKENS)
    sweep_tokens = min(MAX_SWEEP_TOKENS, rider_tokens + allowance // sizes.rider_token_bytes)
    used = fixed + working(rider_tokens, sweep_tokens)
    if stays:
        return Plan(frozenset(range(len(sizes.stop_bytes))), 0, rider_tokens, sweep_tokens, used + all_bytes)
    used += sizes.smallest_ring_bytes
    resident = spread(sizes.stop_bytes, free_bytes - used) if keep_resident else frozenset()
    used += sum(sizes.stop_bytes[stop] for stop in resident)
    return Plan(resident, sizes.smallest_ring_bytes, rider_tokens, sweep_tokens, used)


def spread(stop_bytes: Sequence[int], room_bytes: int) -> frozenset[int]:
    """Choose as many stops as fit in `room_bytes`, at even distances.

    A fixed set, because an LRU would evict each stop just before it is needed again; spread evenly, so that the
    reader gains on the computation at every one of them.
    """
    num_stops = len(stop_bytes)
    for count in range(num_stops, 0, -1):
        chosen = frozenset((2 * k + 1) * num_stops // (2 * count) for k in range(count))
        if sum(stop_bytes[stop] for stop in chosen) <= room_bytes:
            return chosen
    return frozenset()
