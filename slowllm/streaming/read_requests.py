"""Cut the bytes of a tensor into aligned read requests. Pure functions: no files are touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slowllm.storage.spans import Placement, Run, Span
from slowllm.streaming.buffers import PAGE, page_up

# A tensor of at least this size takes the same number of bytes wherever in a page it begins.
LARGE_BYTES = 1 << 18


@dataclass(frozen=True)
class ReadRequest:
    """One read of a part of a tensor.

    Attributes:
        span: in whose file the bytes lie.
        begin: first byte in the file.
        end: byte behind the last.
        at: where they go in the tensor's region of memory.
        needed: bytes that must arrive; the last page of a file may be short.
        bounce: whether they must go through another buffer, because file and memory are not aligned alike, or other
            tensors' bytes would be overwritten.
    """

    span: Span
    begin: int
    end: int
    at: int
    needed: int
    bounce: bool


def lead_of(placement: Placement) -> int:
    """Return the bytes between the start of a tensor's page and its first byte, so that file and memory agree modulo a page.

    Where the parts of a tensor lie in several places, as codes and their scales do, that is so for the largest of them.
    """
    if not placement.runs:
        return 0
    largest = max(placement.runs, key=lambda run: run.num_bytes)
    lead = (largest.span.offset + largest.source - largest.target) % PAGE
    # torch cannot view bf16 at an odd address; such a tensor goes through a bounce buffer instead.
    return lead if lead % placement.unit == 0 else 0


def ring_bytes_of(placement: Placement) -> int:
    """Return the bytes that a tensor takes in a buffer: whole pages, the bytes around it included.

    Where it is large, as many wherever it begins in a page, so that tensors of one size fit in each other's places.
    """
    is_large = placement.num_bytes >= LARGE_BYTES
    return page_up(placement.num_bytes + (PAGE - 1 if is_large else lead_of(placement)))


def in_file_order(stop: Sequence[Placement]) -> list[Placement]:
    """Return the tensors of a stop in the order of their bytes on disk."""
    return sorted(
        stop, key=lambda p: (str(p.runs[0].span.path), p.runs[0].span.offset) if p.runs else ("", 0)
    )


def requests_of(placement: Placement, request_bytes: int) -> Iterator[ReadRequest]:
    """Yield the reads that fill a tensor's region, whose first byte is `lead_of` behind the start of a page."""
    lead = lead_of(placement)
    for number, run in enumerate(placement.runs):
        begin = run.span.offset + run.source
        end, shift = begin + run.num_bytes, lead + run.target - begin
        first, last = number == 0, number == len(placement.runs) - 1
        if shift % PAGE:
            yield from _cut(run, request_bytes, shift, begin, end, bounce=True)
            continue
        # Pages at the edges also hold the bytes of other tensors. They may be written around the first and
        # the last byte of this one, which has whole pages to itself, but not over its neighbouring runs.
        low = begin // PAGE * PAGE if first else page_up(begin)
        high = page_up(end) if last else end // PAGE * PAGE
        if low >= high:
            yield from _cut(run, request_bytes, shift, begin, end, bounce=True)
            continue
        if low > begin:
            yield from _cut(run, request_bytes, shift, begin, low, bounce=True)
        yield from _cut(run, request_bytes, shift, low, high, bounce=False)
        if high < end:
            yield from _cut(run, request_bytes, shift, high, end, bounce=True)


def _cut(
    run: Run, request_bytes: int, shift: int, begin: int, end: int, *, bounce: bool
) -> Iterator[ReadRequest]:
    run_begin = run.span.offset + run.source
    for low in range(begin, end, request_bytes):
        high = min(low + request_bytes, end)
        needed = min(high, run_begin + run.num_bytes) - low
        at = shift + low
        yield ReadRequest(run.span, low, high, at, needed, bounce)
