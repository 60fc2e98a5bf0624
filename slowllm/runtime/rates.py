"""Measure the rates of this machine's disk, memory and processor, and choose the compute dtype by them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from slowllm.malloc import give_back
from slowllm.options import DTypeName
from slowllm.planning.job import Rates
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.manifest import open_checkpoint
from slowllm.storage.spans import BYTES, Placement, Run, Span
from slowllm.streaming.read_requests import ring_bytes_of
from slowllm.streaming.reader import Reader

log = logging.getLogger(__name__)
PIECE_BYTES, RING_PIECES = 64 << 20, 4
# A smaller checkpoint is read in a moment, so that any rate will do.
WORTH_MEASURING_BYTES = 4 << 30
# Blocks take longer than their products, because of activations, norms and attention: 1.2 times as long for BLOOM
# without AMX, 1.6 times with it.
OTHER_WORK = 1.3
# Width of the matrix that is multiplied: smaller ones reach less of the processor's rate.
WIDTH = 8192
# Rows and width of a product that is tried first. Where torch has no kernel for a dtype, as for bf16 on processors
# without AVX-512, it multiplies in plain loops, 200 times slower than fp32 (0.3 GFLOP/s): a product of 256 x 2048 x
# 2048 then takes 7 s.
PROBE = (16, 512)
SECOND_PROBE = (64, 2048)
HOPELESS = 8
MOST_SECONDS = 5.0


def choose_dtype(name: str, checkpoint: Checkpoint, *, is_on_gpu: bool = False) -> torch.dtype:
    """Return the compute dtype; log the choice and its reason if `name` is ``auto``."""
    largest = max(checkpoint.spans.values(), key=lambda span: span.num_bytes)
    return dtype_for(name, largest.dtype, is_on_gpu=is_on_gpu)


def dtype_for(name: str, stored: str, *, is_on_gpu: bool = False) -> torch.dtype:
    """Return the compute dtype for weights stored in a dtype of safetensors' names; log an ``auto`` choice."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    # Makers' formats of 8 bits and fewer are of models in bfloat16.
    if stored != "BF16" and stored not in BYTES:
        log.info("compute dtype float32 (the checkpoint is %s)", stored)
        return torch.float32
    if is_on_gpu:
        log.info("compute dtype bfloat16 (that of the checkpoint)")
        return torch.bfloat16
    bf16, fp32 = _product_times()
    name = "bfloat16" if bf16 < fp32 else "float32"
    log.info(
        "compute dtype %s (measured: a matrix product takes %.1f ms in bfloat16 and %.1f ms in float32)",
        name, bf16 * 1e3, fp32 * 1e3,
    )  # fmt: skip
    return cast(torch.dtype, getattr(torch, name))


# The times are the machine's: cached, they are measured once a process, and all its models get the same compute dtype.
@functools.cache
def _product_times() -> tuple[float, float]:
    """Return the seconds that the same matrix product takes in bfloat16 and in float32."""
    dtypes = (torch.bfloat16, torch.float32)
    bf16, fp32 = _shortest_seconds([_product(*PROBE, dtype) for dtype in dtypes], num_rounds=3)
    if bf16 < HOPELESS * fp32:
        bf16, fp32 = _shortest_seconds([_product(256, 2048, dtype) for dtype in dtypes], num_rounds=6)
    return bf16, fp32


def _shortest_seconds(products: Sequence[Callable[[], Any]], num_rounds: int) -> list[float]:
    """Return the shortest time of each product.

    The products take turns, and the shortest of several runs counts, because on a busy machine one slow run would change
    the compute dtype, and with it the results.
    """
    seconds = [math.inf] * len(products)
    for _ in range(num_rounds):
        for number, product in enumerate(products):
            started = time.perf_counter()
            product()
            seconds[number] = min(seconds[number], time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class DiskRate:
    """The rate and the cost of reading.

    Attributes:
        bytes_per_second: of direct reads.
        core_seconds_per_gb: processor time of all threads of the process for 1e9 bytes.
    """

    bytes_per_second: float
    core_seconds_per_gb: float


def disk_rate(checkpoint: Checkpoint, num_bytes: int) -> DiskRate:
    """Measure direct reads of about `num_bytes` of a checkpoint's largest tensors, by the engine's own reader.

    The first touch of the buffer is not counted, because the engine touches its buffers once. The measured rate is too
    high if the page cache holds parts of the files.
    """
    return read_rate(checkpoint.spans.values(), num_bytes)


def read_rate(spans: Iterable[Span], num_bytes: int) -> DiskRate:
    """Measure direct reads of about `num_bytes` of the largest of some spans, of which there is one at least."""
    pieces = itertools.islice(_pieces(spans), num_bytes // PIECE_BYTES + RING_PIECES)
    stops = [[Placement("probe", (run.num_bytes,), torch.uint8, (run,))] for run in pieces]
    ring = RING_PIECES * max(ring_bytes_of(stop[0]) for stop in stops)
    with contextlib.closing(Reader(stops, ring_bytes=ring)) as reader:
        first = min(RING_PIECES, len(stops) - 1)
        for number in range(first):  # without prefetch
            with reader.visit(number):
                pass
        before = reader.stats.read_bytes
        started, core_started = time.perf_counter(), time.process_time()
        for number in range(first, len(stops)):
            with reader.visit(number, range(number + 1, len(stops))):
                pass
        seconds, core_seconds = time.perf_counter() - started, time.process_time() - core_started
        read_bytes = reader.stats.read_bytes - before
    return DiskRate(read_bytes / seconds, core_seconds / read_bytes * 1e9)


def _pieces(spans: Iterable[Span]) -> Iterator[Run]:
    """Yield pieces of tensors, the largest tensor first."""
    for span in sorted(spans, key=lambda span: -span.num_bytes):
        piece = min(PIECE_BYTES, span.num_bytes)
        for start in range(0, span.num_bytes - piece + 1, piece) if piece else ():
            yield Run(span, start, 0, piece)


def quick_rates(folder: Path, dtype: DTypeName) -> Rates:
    """Return this machine's rates, measured on a checkpoint in less than a second; assumed ones if it is small.

    Shards may be absent, because the caller may need a part of the model only.
    """
    with open_checkpoint(folder, may_lack_shards=True) as checkpoint:
        if sum(span.num_bytes for span in checkpoint.spans.values()) < WORTH_MEASURING_BYTES:
            return Rates()
        disk = disk_rate(checkpoint, 8 * PIECE_BYTES).bytes_per_second
        compute_dtype = choose_dtype(dtype, checkpoint)
    return replace(processor_rates(compute_dtype), disk=disk, disk_measured=True)


def processor_rates(dtype: torch.dtype) -> Rates:
    """Return this machine's rates with the processor's measured in a moment, and the disk's assumed."""
    few, many = _product_seconds(1, dtype), _product_seconds(512, dtype)
    give_back()  # or the plan would count these matrices as memory of the process
    weights = WIDTH * WIDTH
    return Rates(
        memory=weights * dtype.itemsize / few,
        compute=2 * 512 * weights / many / OTHER_WORK,
        measured=True,
        compute_measured=True,
    )


def _product(rows: int, width: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a function that multiplies (rows, width) by a square matrix."""
    pair = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    return functools.partial(nn.functional.linear, *pair)


def _product_seconds(rows: int, dtype: torch.dtype) -> float:
    # Where the rate of a small product says that the large one would take too long, it is not measured. The smallest
    # one looks as slow where another process takes a core from it for a moment; the next one has 64 times the work.
    expected = _expected_seconds(PROBE, rows, dtype)
    if MOST_SECONDS < expected <= MOST_SECONDS * _work(rows, WIDTH) / _work(*SECOND_PROBE):
        expected = _expected_seconds(SECOND_PROBE, rows, dtype)
    if expected > MOST_SECONDS:
        return expected
    return _shortest_seconds([_product(rows, WIDTH, dtype)], num_rounds=3)[0]


def _expected_seconds(probe: tuple[int, int], rows: int, dtype: torch.dtype) -> float:
    """Return how long a product of the full width would take at the rate of a smaller one."""
    (seconds,) = _shortest_seconds([_product(*probe, dtype)], num_rounds=3)
    return seconds * _work(rows, WIDTH) / _work(*probe)


def _work(rows: int, width: int) -> int:
    return rows * width**2
