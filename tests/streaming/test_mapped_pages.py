"""The pages of the next stops are in memory before they are computed with."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.spans import Placement, Run, Span
from slowllm.streaming import mapped_pages
from slowllm.streaming.buffers import PAGE
from slowllm.streaming.mapped_pages import MappedPages
from slowllm.streaming.mapped_stops import MappedStops

NUM_BYTES = 4 << 20


def share_in_memory(tensor: Tensor) -> float:
    """Return the share of a map's pages that the page cache holds."""
    begin = tensor.data_ptr() // PAGE * PAGE
    num_bytes = tensor.data_ptr() + tensor.nbytes - begin
    pages = (ctypes.c_ubyte * (-(-num_bytes // PAGE)))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(num_bytes), pages) == 0
    return float(np.frombuffer(pages, np.uint8).__and__(1).mean())


@pytest.fixture
def stops(tmp_path: Path) -> Iterator[MappedStops]:
    """Six stops of 4 MiB, none of which is in the page cache."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(os.urandom(6 * NUM_BYTES))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    placements = []
    for number in range(6):
        name, shape = f"{number}.weight", (NUM_BYTES // 2,)
        span = Span(name, path, "BF16", shape, number * NUM_BYTES, NUM_BYTES)
        placements.append([Placement(name, shape, torch.bfloat16, (Run(span, 0, 0, NUM_BYTES),))])
    with closing(MappedStops(Checkpoint(tmp_path, {}), placements)) as source:
        yield source


def mapped(stops: MappedStops) -> list[Tensor]:
    return [stop[f"{number}.weight"] for number, stop in enumerate(stops._mapped)]


def shares(tensors: Sequence[Tensor]) -> list[float]:
    return [share_in_memory(tensor) for tensor in tensors]


def test_the_next_stops_are_there_before_they_are_visited(stops: MappedStops) -> None:
    tensors = mapped(stops)
    if any(shares(tensors)):
        pytest.skip("this file system keeps its pages")
    with stops.visit(1, (2, 3, 4)):
        stops._pages.wait()
        # Beyond what is asked for the kernel may read ahead a little.
        found = shares(tensors)
        assert found[1:4] == [1, 1, 1]
        assert max(found[0], found[5]) < 0.5
    assert stops.held_weights(4) is not None
    stops._pages.wait()
    assert shares(tensors)[4:] == [1, 1]


def test_no_page_faults_wait_for_the_disk_in_the_next_stop(stops: MappedStops) -> None:
    tensors = mapped(stops)
    if any(shares(tensors)):
        pytest.skip("this file system keeps its pages")
    with stops.visit(0, (1,)):
        stops._pages.wait()
    before = _faults()
    with stops.visit(1, (2,)) as weights:
        float(weights["1.weight"].view(torch.int16).sum())
    minor, major = (now - then for now, then in zip(_faults(), before, strict=True))
    assert major == 0
    assert minor < NUM_BYTES // PAGE // 4, "the pages were mapped as well"


def _faults() -> tuple[int, int]:
    """Return the minor and major page faults of this thread so far."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt, usage.ru_majflt


def num_threads() -> int:
    return sum(thread.name == "slowllm-pages" for thread in threading.enumerate())


def test_a_stop_is_asked_for_once_and_none_after_the_end(stops: MappedStops) -> None:
    for _ in range(3):
        with stops.visit(0, (1, 2)):
            pass
    assert stops._pages._asked == {0, 1, 2}
    assert num_threads() == 1
    stops.close()
    assert not num_threads()
    stops._pages.fetch([5])
    assert stops._pages._asked == {0, 1, 2}


def test_few_bytes_are_not_worth_a_thread() -> None:
    with closing(MappedPages([[torch.zeros(10)], [torch.zeros(0)]])) as pages:
        pages.fetch([0, 1])
        assert not num_threads()


def test_where_the_kernel_knows_no_such_advice_nothing_happens(
    stops: MappedStops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_pages, "_POPULATE_READ", 12345)
    monkeypatch.setattr(mapped_pages, "_WILL_NEED", 12346)
    with stops.visit(0, (1, 2)) as weights:
        stops._pages.wait()
        assert weights["0.weight"].shape == (NUM_BYTES // 2,)


@given(
    start=st.integers(1, 3 * PAGE),
    row_bytes=st.integers(1, 3 * PAGE),
    rows=st.sets(st.integers(0, 60), max_size=20),
)
def test_single_rows_are_asked_for_with_their_pages_and_no_others(
    start: int, row_bytes: int, rows: set[int]
) -> None:
    ranges = list(mapped_pages._ranges_of(start, row_bytes, sorted(rows)))
    wanted = {(start + row * row_bytes + byte) // PAGE for row in rows for byte in range(row_bytes)}
    asked = [page for begin, end in ranges for page in range(begin // PAGE, -(-end // PAGE))]
    assert sorted(set(asked)) == asked == sorted(wanted)
    assert all(begin % PAGE == 0 for begin, _ in ranges)
    # Neighbouring pages come in one request.
    assert all(after // PAGE > -(-end // PAGE) for (_, end), (after, _) in itertools.pairwise(ranges))


def test_rows_that_are_asked_for_come_from_the_file(tmp_path: Path) -> None:
    matrix = torch.arange(200 * 3000, dtype=torch.int32).view(200, 3000)
    path = tmp_path / "matrix"
    path.write_bytes(matrix.numpy().tobytes())
    with open(path, "rb") as file:
        found = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.int32)
    found = found.view(200, 3000)
    mapped_pages.fetch_rows(found, 12_000, [0, 1, 7, 199])
    mapped_pages.fetch_rows(found, 12_000, [])
    assert torch.equal(found, matrix)
