"""Whatever is guessed, dropped, cut short or refused, a stop has the bytes of its files, and nobody waits for ever."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import gc
import itertools
import math
import os
import random
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slowllm.errors import CheckpointError, PlanError, RideError
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.shard import read_header
from slowllm.storage.spans import Placement, Run, Span
from slowllm.streaming import reader as reader_module
from slowllm.streaming.buffers import PAGE
from slowllm.streaming.mapped_stops import MappedStops
from slowllm.streaming.read_requests import ring_bytes_of
from slowllm.streaming.reader import Reader
from slowllm.streaming.ring import smallest_ring
from slowllm.streaming.stops import StopRead
from tests.support.properties import num_examples

Stop = tuple[Placement, ...]
DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
FILE_BYTES = [50_000, 12 * PAGE, 3 * PAGE + 1]

fuzz = num_examples(
    60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _hang_fails(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Show every thread and end the process where a test hangs."""
    with capfd.disabled():
        terminal = os.dup(2)
    faulthandler.dump_traceback_later(60, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(terminal)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_files(tmp_path_factory.mktemp("shards"))


def make_files(folder: Path) -> list[Path]:
    paths = []
    for number, num_bytes in enumerate(FILE_BYTES):
        path = folder / f"part-{number}.safetensors"
        # No byte is 0xFF, so that none is mistaken for poison.
        path.write_bytes(bytes(random.Random(number).choices(range(255), k=num_bytes)))
        paths.append(path)
    return paths


def tensor_at(
    name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Sequence[tuple[Path, int, int]]
) -> Placement:
    """A parameter made of pieces: file, first byte and length of each."""
    runs, target = [], 0
    for number, (path, offset, num_bytes) in enumerate(pieces):
        # The span begins before the piece: what is read is a part of a tensor on disk.
        before = min(offset, 3 * number)
        span = Span(
            f"{name}.{number}",
            path,
            DTYPES[dtype],
            (num_bytes + before,),
            offset - before,
            num_bytes + before,
        )
        runs.append(Run(span, before, target, num_bytes))
        target += num_bytes
    placement = Placement(name, tuple(shape), dtype, tuple(runs))
    assert target == placement.num_bytes
    return placement


def some_tensor(rng: random.Random, name: str, files: Sequence[Path]) -> Placement:
    dtype = rng.choice([*DTYPES])
    shape = rng.choice([(), (1,), (7,), (0, 3), (5, 11), (1024,), (4096,), (33, 100), (1000,)])
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return Placement(name, shape, dtype, ())
    # Cut where the elements end or in the middle of one, anywhere in any file, at its very end as well.
    cuts = sorted({0, num_bytes, *(rng.randrange(num_bytes) for _ in range(rng.choice([0, 0, 1, 3])))})
    pieces = []
    for low, high in itertools.pairwise(cuts):
        path = rng.choice([path for path in files if path.stat().st_size >= high - low])
        last = path.stat().st_size - (high - low)
        aligned = last // PAGE * PAGE
        pieces.append(
            (
                path,
                rng.choice([rng.randint(0, last), rng.randint(0, last) // 4 * 4, aligned, last]),
                high - low,
            )
        )
    return tensor_at(name, dtype, shape, pieces)


def some_stops(seed: int, files: Sequence[Path], num_stops: int = 6) -> list[Stop]:
    rng = random.Random(seed)
    return [
        tuple(some_tensor(rng, f"h.{stop}.{number}", files) for number in range(rng.choice([0, 1, 2, 3, 5])))
        for stop in range(num_stops)
    ]


def bytes_of(placement: Placement) -> bytes:
    parts = []
    for run in placement.runs:
        begin = run.span.offset + run.source
        parts.append(run.span.path.read_bytes()[begin : begin + run.num_bytes])
    return b"".join(parts)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check(weights: Mapping[str, Tensor], stop: Stop) -> None:
    assert weights.keys() == {placement.name for placement in stop}
    for placement in stop:
        tensor = weights[placement.name]
        assert (tuple(tensor.shape), tensor.dtype) == (placement.shape, placement.dtype)
        assert raw(tensor) == bytes_of(placement), placement


def smallest_of(stops: Sequence[Stop], resident: frozenset[int] = frozenset()) -> int:
    return smallest_ring([stop for index, stop in enumerate(stops) if index not in resident])


def cost_of(stop: Stop) -> int:
    """Bytes that are read for one stop, when it is read once."""
    with closing(
        Reader([stop], ring_bytes=smallest_ring([stop]), request_bytes=PAGE, num_threads=1)
    ) as reader:
        with reader.visit(0):
            pass
        cost = reader.stats.read_bytes
    least = sum(placement.num_bytes for placement in stop)
    assert least <= cost <= least + PAGE * len(stop)
    return cost


class closing:
    """Close a reader, and see that its threads end."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __enter__(self) -> Any:
        return self.reader

    def __exit__(self, *error: object) -> None:
        self.reader.close()
        threads = getattr(self.reader, "_threads", None) or self.reader._rest._threads
        assert not any(thread.is_alive() for thread in threads)


def open_files() -> int:
    gc.collect()  # maps of earlier tests that are garbage hold files too
    return len(os.listdir("/proc/self/fd"))


# The right bytes, whatever is guessed


def test_each_stop_that_was_read_is_told_with_its_time_and_bytes(files: list[Path]) -> None:
    stops = some_stops(3, files)
    assert any(stops)
    told: list[StopRead] = []
    with closing(
        Reader(stops, ring_bytes=smallest_of(stops), request_bytes=PAGE, resident=frozenset({1}))
    ) as reader:
        reader.on_read = told.append
        started = time.perf_counter()
        for _ in range(2):
            for stop in range(len(stops)):
                with reader.visit(stop, range(stop + 1, len(stops))):
                    pass
    # Only once the threads have ended is the last one told for certain.
    assert sum(read.read_bytes for read in told) == reader.stats.read_bytes
    streamed = {n for n, stop in enumerate(stops) if any(p.num_bytes for p in stop)}
    assert {read.stop for read in told} == streamed
    assert [read.stop for read in told].count(1) == (1 in streamed)
    assert all(started <= read.began_at <= read.ended_at for read in told)


@fuzz
@given(
    seed=st.integers(0, 10_000),
    visits=st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), max_size=8), st.booleans()), max_size=20
    ),
    resident=st.frozensets(st.integers(0, 5)),
    num_threads=st.sampled_from([1, 2, 5]),
    request_bytes=st.sampled_from([1, 4096, 12_288, 1 << 20]),
    poison=st.booleans(),
)
def test_visits_in_any_order_after_any_guess_have_the_right_bytes(
    files: list[Path],
    seed: int,
    visits: list[tuple[int, list[int], bool]],
    resident: frozenset[int],
    num_threads: int,
    request_bytes: int,
    poison: bool,
) -> None:
    stops = some_stops(seed, files)
    reader = Reader(
        stops,
        ring_bytes=smallest_of(stops, resident),
        resident=resident,
        num_threads=num_threads,
        request_bytes=request_bytes,
        poison=poison,
    )
    with closing(reader):
        for stop, upcoming, again in visits:
            with reader.visit(stop, upcoming) as weights:
                check(weights, stops[stop])
                # Read ahead meanwhile, as far as there is room: it must not touch what is held.
                if again:
                    check(weights, stops[stop])


@pytest.mark.parametrize("num_threads", [1, 3, 16])
@pytest.mark.parametrize("poison", [False, True])
def test_thousands_of_visits_never_hang(files: list[Path], num_threads: int, poison: bool) -> None:
    rng = random.Random(num_threads)
    for seed in range(6):
        stops = some_stops(seed, files, num_stops=rng.choice([1, 2, 5, 9]))
        expected = [{p.name: bytes_of(p) for p in stop} for stop in stops]
        resident = frozenset(rng.sample(range(len(stops)), rng.randrange(len(stops))))
        reader = Reader(
            stops,
            ring_bytes=smallest_of(stops, resident) + rng.choice([0, 0, PAGE, 5 * PAGE]),
            resident=resident,
            num_threads=num_threads,
            request_bytes=PAGE,
            poison=poison,
        )
        with closing(reader):
            order = [rng.randrange(len(stops)) for _ in range(100)]
            for place, stop in enumerate(order):
                right = order[place + 1 : place + 1 + rng.randrange(7)]
                wrong = [rng.randrange(len(stops)) for _ in range(rng.randrange(7))]
                upcoming = rng.choice([right, right, wrong, right + wrong, wrong + right])
                with reader.visit(stop, upcoming) as weights:
                    assert {name: raw(tensor) for name, tensor in weights.items()} == expected[stop]


def test_a_sweep_up_and_down_has_the_right_bytes(files: list[Path]) -> None:
    stops = some_stops(3, files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops), request_bytes=PAGE)) as reader:
        order = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0] * 3
        for place, stop in enumerate(order):
            with reader.visit(stop, order[place + 1 :]) as weights:
                check(weights, stops[stop])


def test_empty_tensors_come_first_and_take_no_room(files: list[Path]) -> None:
    # As extents of the ring they would make it look full.
    empty = Placement("empty", (0, 4), torch.bfloat16, ())
    stops = [
        (empty, tensor_at("a", torch.float32, (2000,), [(files[0], 17, 8000)]), empty_of("e")),
        (empty_of("b"),),
    ]
    with closing(Reader(stops, ring_bytes=smallest_of(stops), num_threads=1)) as reader:
        for stop in (0, 1, 0, 1, 1, 0):
            with reader.visit(stop, (0, 1)) as weights:
                check(weights, stops[stop])


def empty_of(name: str) -> Placement:
    return Placement(name, (3, 0), torch.float32, ())


def test_stops_without_weights_are_served(files: list[Path]) -> None:
    with closing(Reader([(), ()], ring_bytes=PAGE)) as reader, reader.visit(1, (0, 1)) as weights:
        assert weights == {}
        assert reader.stats.read_bytes == 0


@pytest.mark.parametrize("later", [0, 1, 2])
def test_runs_that_share_a_page_leave_each_other_alone(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    # Each keeps its place in the page, so that whole pages are read straight into place but for those at the seams.
    lengths = [5000, 9000, 6000]
    pieces = [(path, sum(lengths[:place]) % PAGE, lengths[place]) for place, path in enumerate(files)]
    stop = (tensor_at("a", torch.uint8, (20_000,), pieces),)
    others, done = threading.Event(), 0

    def wait(true: Any, number: int, views: Any, offset: int) -> int:
        nonlocal done
        if path_of(number).endswith(f"part-{later}.safetensors"):
            others.wait(5)
            return int(true(number, views, offset))
        count = int(true(number, views, offset))
        done += 1
        if done == 7 - (2, 3, 2)[later]:  # requests of each file
            others.set()
        return count

    preadv_as(monkeypatch, wait)
    reader = Reader([stop], ring_bytes=smallest_of([stop]), num_threads=8)
    with closing(reader), reader.visit(0) as weights:
        check(weights, stop)


def test_a_tensor_keeps_its_place_in_the_page_so_that_nothing_is_copied(files: list[Path]) -> None:
    stops = [(tensor_at("a", torch.float32, (2000,), [(files[0], 5 * 4096 + 40, 8000)]),)]
    with closing(Reader(stops, ring_bytes=smallest_of(stops))) as reader, reader.visit(0) as weights:
        assert weights["a"].data_ptr() % PAGE == 40


def test_a_ring_that_is_too_small_is_refused(files: list[Path]) -> None:
    stops = some_stops(1, files)
    with pytest.raises(AssertionError, match="the ring cannot hold the largest stop"):
        Reader(stops, ring_bytes=smallest_of(stops) - 1)


def test_a_stop_that_does_not_exist_is_refused(files: list[Path]) -> None:
    with closing(Reader([()], ring_bytes=PAGE)) as reader:
        for stop, upcoming in ((1, ()), (-1, ()), (0, (1,)), (0, (-1,))):
            with pytest.raises(AssertionError, match="there is no such stop"), reader.visit(stop, upcoming):
                pass


# What is kept, and what is read again


def alike(files: list[Path], num_stops: int = 5) -> list[Stop]:
    """Stops of three tensors each, of which a smallest ring holds one."""
    return [
        tuple(
            tensor_at(
                f"h.{stop}.{part}", torch.float32, (1024,), [(files[part % 2], 700 * stop + 13 * part, PAGE)]
            )
            for part in range(3)
        )
        for stop in range(num_stops)
    ]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_right_guess_reads_every_stop_once(files: list[Path], num_threads: int) -> None:
    stops = alike(files)
    order = [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2]
    with closing(
        Reader(stops, ring_bytes=smallest_of(stops), num_threads=num_threads, request_bytes=PAGE)
    ) as reader:
        for place, stop in enumerate(order):
            with reader.visit(stop, order[place + 1 :]):
                pass
        assert reader.stats.read_bytes == sum(cost_of(stops[stop]) for stop in order)


@fuzz
@given(
    visits=st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=5)), max_size=12),
    num_threads=st.sampled_from([1, 3]),
)
def test_resident_stops_are_read_once_whatever_is_guessed(
    files: list[Path], visits: list[tuple[int, list[int]]], num_threads: int
) -> None:
    stops = alike(files)
    everything = frozenset(range(5))
    reader = Reader(stops, ring_bytes=PAGE, resident=everything, num_threads=num_threads, request_bytes=PAGE)
    with closing(reader):
        places: dict[str, int] = {}
        for stop, upcoming in [*visits, *((stop, []) for stop in range(5))]:
            with reader.visit(stop, upcoming) as weights:
                check(weights, stops[stop])
                for name, tensor in weights.items():
                    assert places.setdefault(name, tensor.data_ptr()) == tensor.data_ptr()
        assert reader.stats.read_bytes == sum(map(cost_of, stops))


@fuzz
@given(visits=st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=5)), max_size=12))
def test_what_is_still_in_the_ring_is_not_read_again(
    files: list[Path], visits: list[tuple[int, list[int]]]
) -> None:
    stops = alike(files)
    roomy = sum(ring_bytes_of(tensor) for stop in stops for tensor in stop)
    with closing(Reader(stops, ring_bytes=roomy, num_threads=2)) as reader:
        for stop in range(5):
            with reader.visit(stop):
                pass
        before = reader.stats.read_bytes
        for stop, upcoming in visits:
            with reader.visit(stop, upcoming) as weights:
                check(weights, stops[stop])
        assert reader.stats.read_bytes == before == sum(map(cost_of, stops))


def test_the_smallest_ring_holds_the_largest_stop_and_one_more_tensor(files: list[Path]) -> None:
    def pages(name: str, num_pages: int) -> Placement:
        # Begins inside its first page, so it takes a page more.
        return tensor_at(name, torch.uint8, (num_pages * PAGE,), [(files[0], 100, num_pages * PAGE)])

    stops = [(pages("a", 2), pages("b", 1)), (pages("c", 3),), (empty_of("d"),)]
    assert smallest_ring(stops) == (3 + 2 + 4) * PAGE
    assert smallest_ring([(), ()]) == PAGE
    with closing(Reader(stops, ring_bytes=smallest_ring(stops))) as reader, reader.visit(0, (1,)) as weights:
        check(weights, stops[0])


def test_the_next_stop_is_read_while_this_one_is_held(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = alike(files)
    next_offset = stops[1][0].runs[0].span.offset // PAGE * PAGE
    seen = threading.Event()

    def watch(true: Any, number: int, views: Any, offset: int) -> int:
        if offset == next_offset:
            seen.set()
        return int(true(number, views, offset))

    preadv_as(monkeypatch, watch)
    with (
        closing(Reader(stops, ring_bytes=smallest_of(stops), num_threads=1)) as reader,
        reader.visit(0, (1,)),
    ):
        # It may have been read before anybody came to this line, but not after this stop was given back.
        assert seen.wait(20), "there is room for a tensor more"


@pytest.mark.parametrize("num_head", [1, 2, 3])
def test_the_stop_at_which_a_sweep_turns_is_kept_while_others_pass(files: list[Path], num_head: int) -> None:
    stops = [
        tuple(
            tensor_at(f"{n}.{part}", torch.float32, (1024,), [(files[part % 2], PAGE * (n % 2), PAGE)])
            for part in range(3)
        )
        for n in range(3 + num_head)
    ]
    blocks, head = [0, 1, 2], list(range(3, 3 + num_head))
    way = [*blocks, *head, 2, 1, 0]
    # Room for a stop and most of another: the turning one stays, and those of the head take each other's places.
    room = 2 * sum(map(ring_bytes_of, stops[0])) + ring_bytes_of(stops[0][0])
    with closing(Reader(stops, ring_bytes=room, num_threads=2)) as reader:
        for place, stop in enumerate(way):
            with reader.visit(stop, list(dict.fromkeys(way[place + 1 :]))) as weights:
                check(weights, stops[stop])
        read = reader.stats.read_bytes
    once, again = (
        [sum(p.num_bytes for p in stops[stop]) for stop in part] for part in ([*blocks, *head], [1, 0])
    )
    # The edges of pages cost a little more.
    assert read <= 1.1 * (sum(once) + sum(again)), "the turning stop is read once"


def test_a_stop_that_was_served_is_not_read_again_unasked(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = threading.Event()

    def watch(true: Any, *args: Any) -> int:
        if served:
            again.set()
        return int(true(*args))

    served = False
    preadv_as(monkeypatch, watch)
    stops = alike(files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops), poison=True)) as reader:
        with reader.visit(0):
            served = True
        assert not again.wait(0.1)


def test_a_wrong_guess_costs_a_read_and_no_more(files: list[Path]) -> None:
    stops = alike(files)
    cost = cost_of(stops[0])
    with closing(Reader(stops, ring_bytes=smallest_of(stops), num_threads=3, request_bytes=PAGE)) as reader:
        order = [0, 3, 1, 4, 2, 0, 3]
        for stop in order:
            with reader.visit(stop, [(stop + 1) % 5]) as weights:
                check(weights, stops[stop])
        assert reader.stats.read_bytes <= 2 * len(order) * (cost + 3 * PAGE)


def test_bytes_that_were_read_for_nobody_are_counted_when_their_room_is_taken(files: list[Path]) -> None:
    stops, arrived = alike(files), threading.Event()
    costs = [cost_of(stop) for stop in stops]
    with closing(Reader(stops, ring_bytes=smallest_of(stops), num_threads=2)) as reader:
        reader.on_read = lambda read: arrived.set()
        reader.prefetch([1])
        assert arrived.wait(60)
        assert reader.dropped_bytes == 0
        for stop in (2, 3, 2):  # what somebody held is not read in vain
            with reader.visit(stop):
                pass
            assert reader.dropped_bytes == costs[1]
    assert reader.stats.read_bytes == costs[1] + costs[2] + costs[3] + costs[2]


def test_a_read_that_ends_when_its_stop_has_been_given_up_is_counted(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops, begun, may_end = alike(files), threading.Event(), threading.Event()
    cost, inner = cost_of(stops[2]), reader_module.Reader._fill

    def fill(self: Any, *args: Any) -> None:
        if not begun.is_set():
            begun.set()
            assert may_end.wait(60)
        inner(self, *args)

    monkeypatch.setattr(reader_module.Reader, "_fill", fill)
    roomy = sum(ring_bytes_of(tensor) for stop in stops for tensor in stop)
    with closing(Reader(stops, ring_bytes=roomy, num_threads=2)) as reader:
        reader.prefetch([1])
        assert begun.wait(60)
        with reader.visit(2):  # the stop before is given up
            pass
        may_end.set()
    assert 0 < reader.dropped_bytes == reader.stats.read_bytes - cost


def test_nothing_is_read_before_a_visit_nor_without_a_guess(files: list[Path]) -> None:
    stops = alike(files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops), resident=frozenset([4]))) as reader:
        assert reader.stats.read_bytes == 0
        with reader.visit(2):
            pass
        assert reader.stats.read_bytes == cost_of(stops[2])
        assert reader.stats.wait_seconds > 0


def test_what_is_given_back_is_poisoned(files: list[Path]) -> None:
    stops = alike(files)
    reader = Reader(stops, ring_bytes=smallest_of(stops), resident=frozenset([1]), poison=True)
    with closing(reader):
        for stop in (0, 1, 2, 0):
            with reader.visit(stop) as weights:
                kept = dict(weights)
            for tensor in kept.values():
                assert bool(tensor.isnan().all()) == (stop != 1)
            if stop == 1:
                check(kept, stops[1])


def test_without_poison_the_weights_stay_until_their_place_is_needed(files: list[Path]) -> None:
    stops = alike(files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops))) as reader:
        with reader.visit(0) as weights:
            kept = dict(weights)
        check(kept, stops[0])
    check(kept, stops[0])  # closed: still readable


def test_an_error_inside_a_visit_gives_the_stop_back(files: list[Path]) -> None:
    stops = alike(files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops), poison=True)) as reader:
        with pytest.raises(ZeroDivisionError), reader.visit(0, (1, 2)):
            raise ZeroDivisionError
        for stop in (1, 0, 2):
            with reader.visit(stop) as weights:
                check(weights, stops[stop])


# Disks that fail


def preadv_as(monkeypatch: pytest.MonkeyPatch, change: Callable[..., int]) -> None:
    """Replace the system call: `change` has the true one as its first argument."""
    true = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: change(true, *args))


def path_of(number: int) -> str:
    return os.readlink(f"/proc/self/fd/{number}")


def is_direct(number: int) -> bool:
    return bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT)


def in_three_files(files: Sequence[Path]) -> list[Stop]:
    return [
        (tensor_at(f"h.{stop}.weight", torch.bfloat16, (2, 3000), [(path, 261, 12_000)]),)
        for stop, path in enumerate(files)
    ]


@pytest.mark.parametrize("size", [0, 261, 4096, 8192, 12_260])
def test_a_file_cut_short_while_open_is_told_and_the_others_still_serve(tmp_path: Path, size: int) -> None:
    files = make_files(tmp_path)
    stops = in_three_files(files)
    expected = [bytes_of(stop[0]) for stop in stops]
    with closing(Reader(stops, ring_bytes=smallest_of(stops), request_bytes=PAGE, num_threads=3)) as reader:
        for stop in (1, 2, 0):  # the ring holds two, so the first is gone again
            with reader.visit(stop):
                pass
        sound = files[1].read_bytes()
        os.truncate(files[1], size)
        words = (
            r"^part-1\.safetensors: h\.1\.weight\.0 ends at byte 12,261 but the file has "
            rf"{size:,} by now; it was cut short while it was open$"
        )
        for guess in ((1,), ()):
            with pytest.raises(CheckpointError, match=words), reader.visit(1, (0, 2)):
                pass
            for stop in (0, 2):
                with reader.visit(stop, guess) as weights:
                    assert raw(weights[f"h.{stop}.weight"]) == expected[stop]
        files[1].write_bytes(sound)
        with reader.visit(1) as weights:
            assert raw(weights["h.1.weight"]) == expected[1]


def test_a_file_that_is_gone_is_told_by_name(tmp_path: Path) -> None:
    stops = in_three_files(make_files(tmp_path))
    with closing(Reader(stops, ring_bytes=smallest_of(stops))) as reader:
        (tmp_path / "part-1.safetensors").unlink()
        words = r"reading h\.1\.weight\.0 at byte .*part-1\.safetensors"
        with pytest.raises(FileNotFoundError, match=words), reader.visit(1, (0,)):
            pass
        with reader.visit(0) as weights:
            check(weights, stops[0])


def test_a_disk_that_fails_is_told_with_file_tensor_and_byte(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = in_three_files(files)
    broken = True

    def fail(true: Any, number: int, views: Any, offset: int) -> int:
        if broken and offset == 8192 and path_of(number).endswith("part-1.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return int(true(number, views, offset))

    preadv_as(monkeypatch, fail)
    words = r"Input/output error \(reading h\.1\.weight\.0 at byte 8,192\): '.*part-1\.safetensors'"
    with closing(Reader(stops, ring_bytes=smallest_of(stops), request_bytes=PAGE, num_threads=4)) as reader:
        for _ in range(3):
            with pytest.raises(OSError, match=words) as caught, reader.visit(1, (0,)):
                pass
            assert caught.value.errno == errno.EIO
            read = reader.stats.read_bytes
            for stop in (0, 2):
                with reader.visit(stop) as weights:
                    check(weights, stops[stop])
        assert reader.stats.read_bytes > read
        broken = False
        with reader.visit(1) as weights:
            check(weights, stops[1])


def test_a_failed_stop_is_not_read_again_before_it_is_visited_again(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, gate, again = threading.Event(), threading.Event(), threading.Event()
    failed = 0

    def fail(true: Any, number: int, views: Any, offset: int) -> int:
        nonlocal failed
        if not path_of(number).endswith("part-1.safetensors"):
            under_way.set()
            gate.wait()
            return int(true(number, views, offset))
        under_way.wait()
        failed += 1
        if failed > 1:
            again.set()
        raise OSError(errno.EIO, "Input/output error")

    preadv_as(monkeypatch, fail)
    stops = in_three_files(files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops), num_threads=2)) as reader:
        with pytest.raises(OSError, match="Input/output error"), reader.visit(1, (0,)):
            pass
        # The end of the other read wakes everybody.
        gate.set()
        too_early = again.wait(0.1)
        with reader.visit(0) as weights:
            check(weights, stops[0])
        assert not too_early
        for reads in (2, 3):
            with pytest.raises(OSError, match="Input/output error"), reader.visit(1):
                pass
            assert failed == reads


def test_what_failed_ahead_of_need_is_read_again_for_whoever_comes_for_it(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(true: Any, number: int, views: Any, offset: int) -> int:
        if path_of(number).endswith("part-1.safetensors") and not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return int(true(number, views, offset))

    preadv_as(monkeypatch, fail)
    stops = in_three_files(files)
    with closing(Reader(stops, ring_bytes=3 * smallest_of(stops), num_threads=1)) as reader:
        with reader.visit(0, (1, 2)):
            assert failed.wait(10)
        # The one thread has put the failure down before it reads on, so this visit finds it.
        with reader.visit(2, (0, 1)) as weights:
            check(weights, stops[2])
        with reader.visit(1) as weights:
            check(weights, stops[1])


def test_a_read_that_nobody_waits_for_any_more_writes_over_no_other_stop(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, late = threading.Event(), threading.Event()

    def wait(true: Any, number: int, views: Any, offset: int) -> int:
        if not path_of(number).endswith("part-0.safetensors"):
            return int(true(number, views, offset))
        gate.wait()
        count = int(true(number, views, offset))
        late.set()
        return count

    preadv_as(monkeypatch, wait)
    stops = in_three_files(files)
    # A smaller one, in whose place the others do not fit.
    stops[2] = (tensor_at("h.2.weight", torch.bfloat16, (2, 2000), [(files[2], 261, 8_000)]),)

    def visit_again() -> None:
        with reader.visit(1) as weights:
            assert late.wait(20), "the slow read has written to wherever it belongs"
            check(weights, stops[1])

    # Room for two of the three: the slow one and another.
    reader = Reader(stops, ring_bytes=smallest_of(stops), num_threads=3)
    with closing(reader), ThreadPoolExecutor(1) as pool:
        with reader.visit(1, (0,)):
            pass
        with reader.visit(2):
            pass
        again = pool.submit(visit_again)
        gate.set()
        again.result()


def test_what_is_left_of_a_short_direct_read_comes_from_the_page_cache(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short = 0

    def cut(true: Any, number: int, views: Any, offset: int) -> int:
        nonlocal short
        count = int(true(number, views, offset))
        if is_direct(number) and count > 100:
            short += 1
            views[0][100:] = b"\xff" * (len(views[0]) - 100)
            return 100
        return count

    preadv_as(monkeypatch, cut)
    caplog.set_level("INFO", logger="slowllm.streaming.direct_io")
    stops = in_three_files(files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops), request_bytes=PAGE)) as reader:
        for stop in range(3):
            with reader.visit(stop) as weights:
                check(weights, stops[stop])
    # No request was unaligned, and direct reads went on.
    assert "refused" not in caplog.text
    assert short == 9 or not short


def test_memory_that_the_machine_has_not_is_refused_at_once(files: list[Path]) -> None:
    with pytest.raises(PlanError, match=r"this machine has no 1,125,899,906,842,624 bytes left"):
        Reader(in_three_files(files), ring_bytes=1 << 50)


def test_no_memory_for_a_bounce_buffer_is_told_to_the_visitor(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = reader_module.Buffer

    def small(num_bytes: int) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise PlanError("no memory")
        return true(num_bytes)

    monkeypatch.setattr(reader_module, "Buffer", small)
    with closing(Reader(in_three_files(files), ring_bytes=PAGE, resident=frozenset([0, 1, 2]))) as reader:
        for _ in range(2):
            with pytest.raises(PlanError, match="no memory"), reader.visit(0):
                pass


def test_closing_gives_the_memory_back(files: list[Path]) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    reader = Reader(in_three_files(files), ring_bytes=256 << 20)
    assert process.memory_info().rss - before > 200 << 20
    reader.close()
    assert process.memory_info().rss - before < 100 << 20


@pytest.mark.parametrize("most", [1, 100, PAGE, 5000])
def test_short_reads_are_continued(files: list[Path], monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    preadv_as(
        monkeypatch,
        lambda true, number, views, offset: true(number, [shortened(views[0], most, number)], offset),
    )
    stops = [
        (tensor_at("a", torch.uint8, (300,), [(files[0], 4000, 300)]),),
        *in_three_files(files)[: most > 1],
    ]
    with closing(Reader(stops, ring_bytes=smallest_of(stops), request_bytes=2 * PAGE)) as reader:
        for stop in range(len(stops)):
            with reader.visit(stop) as weights:
                check(weights, stops[stop])


def shortened(view: memoryview, most: int, number: int) -> memoryview:
    # A direct read of less than a block would be refused.
    return view[: max(most // PAGE, 1) * PAGE] if is_direct(number) else view[:most]


def test_direct_reads_bypass_the_page_cache_where_they_work(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        os.close(os.open(files[0], os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct reads")
    buffered = 0

    def count(true: Any, number: int, views: Any, offset: int) -> int:
        nonlocal buffered
        buffered += not is_direct(number)
        return int(true(number, views, offset))

    preadv_as(monkeypatch, count)
    stops = some_stops(5, files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops))) as reader:
        for stop in range(len(stops)):
            with reader.visit(stop) as weights:
                check(weights, stops[stop])
    assert buffered == 0


@pytest.mark.parametrize("num_threads", [1, 8])
def test_where_direct_reads_are_refused_the_page_cache_serves(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_threads: int
) -> None:
    refused = 0

    def refuse(true: Any, number: int, views: Any, offset: int) -> int:
        nonlocal refused
        if is_direct(number):
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(true(number, views, offset))

    before = open_files()
    preadv_as(monkeypatch, refuse)
    stops = some_stops(5, files)
    caplog.set_level("INFO", logger="slowllm.streaming.direct_io")
    with closing(Reader(stops, ring_bytes=smallest_of(stops), num_threads=num_threads)) as reader:
        for stop in (*range(len(stops)), *range(len(stops))):
            with reader.visit(stop) as weights:
                check(weights, stops[stop])
    assert "direct reads are refused here" in caplog.text
    assert 3 <= refused <= 3 * num_threads
    assert open_files() == before


def test_a_file_system_in_memory_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("this machine has no /dev/shm")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        stops = some_stops(7, make_files(folder))
        with closing(Reader(stops, ring_bytes=smallest_of(stops), request_bytes=PAGE)) as reader:
            for stop in (*range(len(stops)), 2, 0):
                with reader.visit(stop, range(len(stops))) as weights:
                    check(weights, stops[stop])
    finally:
        shutil.rmtree(folder)


def test_where_no_file_opens_for_direct_reads_the_page_cache_serves(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT")  # as on macOS
    monkeypatch.delattr(os, "posix_fadvise")
    stops = some_stops(5, files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops))) as reader:
        for stop in range(len(stops)):
            with reader.visit(stop) as weights:
                check(weights, stops[stop])


# Files that are not what they were


def saved(folder: Path) -> tuple[list[Path], list[Stop]]:
    """Three shards, each with the one tensor of a stop, and their stops as their headers have them."""
    files, stops = [], []
    for number in range(3):
        files.append(folder / f"part-{number}.safetensors")
        save_file({f"h.{number}": torch.full((3000,), float(number))}, files[-1])
        span = read_header(files[-1])[f"h.{number}"]
        stops.append((Placement(span.name, (3000,), torch.float32, (Run(span, 0, 0, span.num_bytes),)),))
    return files, stops


def replace(file: Path, num_values: int = 3000) -> None:
    """Put another shard in a file's place, of the same age and, by default, of the same size."""
    state = file.stat()
    other = file.with_suffix(".new")
    save_file({"h.1": torch.full((num_values,), -1.0)}, other)
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(other, file)


def rewrite(file: Path) -> None:
    """Write other bytes of the same number over a file."""
    age = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    os.utime(file, ns=(age + 1, age + 1))


CHANGES = {
    "same size and age": replace,
    "another size": lambda file: replace(file, 2000),
    "rewritten": rewrite,
    "cut short": lambda file: os.truncate(file, 5000),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_shard_that_changed_between_its_header_and_its_first_read_is_refused(
    tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    files, stops = saved(tmp_path)
    before = open_files()
    words = r"^part-1\.safetensors: was replaced or changed since its header was read; load the model again$"
    with closing(Reader(stops, ring_bytes=smallest_of(stops))) as reader:
        change(files[1])
        for _ in range(2):
            with pytest.raises(CheckpointError, match=words), reader.visit(1, (0, 2)):
                pass
            for stop in (0, 2):
                with reader.visit(stop) as weights:
                    check(weights, stops[stop])
    assert open_files() == before
    with pytest.raises(CheckpointError, match=words):
        mapped_stops(stops, files)


@pytest.mark.parametrize("num_values", [3000, 2000])
@pytest.mark.parametrize("kind", ["read", "mapped"])
def test_a_shard_replaced_while_it_is_open_goes_on_with_its_old_bytes(
    tmp_path: Path, kind: str, num_values: int
) -> None:
    files, stops = saved(tmp_path)
    if kind == "read":
        source: Any = Reader(stops, ring_bytes=smallest_of(stops))
    else:
        source = mapped_stops(stops, files)
    with closing(source):
        for stop in (1, 2, 0):  # the ring holds two, so the first is gone again
            with source.visit(stop):
                pass
        replace(files[1], num_values)
        with source.visit(1) as weights:
            assert torch.equal(weights["h.1"], torch.ones(3000))


@pytest.mark.parametrize("size", [0, 4096, 12_000])
def test_a_shard_cut_short_under_its_map_is_refused_before_it_kills_the_process(
    tmp_path: Path, size: int
) -> None:
    files, stops = saved(tmp_path)
    with closing(mapped_stops(stops, files)) as source:
        with source.visit(1) as weights:
            check(weights, stops[1])
        sound = files[1].read_bytes()
        os.truncate(files[1], size)
        words = (
            rf"^part-1\.safetensors: h\.1 ends at byte {len(sound):,} but the file has {size:,} by now; "
            r"it was cut short while it was open$"
        )
        with pytest.raises(CheckpointError, match=words), source.visit(1, (0, 2)):
            pass
        with pytest.raises(CheckpointError, match=words):
            source.held_weights(1)
        for stop in (0, 2):
            with source.visit(stop) as weights:
                check(weights, stops[stop])
        files[1].write_bytes(sound)
        with source.visit(1) as weights:
            check(weights, stops[1])


# The end


class Gate:
    """Reads that wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()

        def wait(true: Any, *args: Any) -> int:
            self.arrived.set()
            self.open.wait()
            return int(true(*args))

        preadv_as(monkeypatch, wait)


def test_closing_ends_a_waiting_visit_at_once_and_the_reads_under_way(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    before = open_files()
    stops = in_three_files(files)
    reader = Reader(stops, ring_bytes=smallest_of(stops), num_threads=4, request_bytes=PAGE)

    def visit() -> None:
        with reader.visit(0, (1, 2)):
            pytest.fail("no read was let through")

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(visit)
        gate.arrived.wait()
        closed = pool.submit(reader.close)
        # The visitor hears of it while the disk still does not answer.
        with pytest.raises(RideError, match="the model was closed"):
            waiting.result()
        gate.open.set()
        closed.result()
    assert not any(thread.is_alive() for thread in reader._threads)
    assert open_files() == before
    # Not one read was begun after closing.
    assert reader.stats.read_bytes <= 4 * PAGE


def test_a_read_that_never_returns_is_left_with_its_file_and_its_buffer(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(reader_module, "CLOSE_PATIENCE_SECONDS", 0.0)
    before = open_files()
    stops = in_three_files(files)
    reader = Reader(stops, ring_bytes=smallest_of(stops), num_threads=1)
    (thread,), buffer = reader._threads, weakref.ref(reader._ring.buffer.bytes)

    def visit(reader: Reader) -> None:
        with reader.visit(0, (1, 2)):
            pytest.fail("no read was let through")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(visit, reader)
        gate.arrived.wait()
        reader.close()
        with pytest.raises(RideError, match="the model was closed"):
            waiting.result()
    assert caplog.messages == [
        "closing without 1 read(s) that have not returned after 0 s; what they write to stays in memory"
    ]
    del reader, waiting
    gc.collect()
    assert thread.is_alive()
    assert buffer() is not None, "the read may still write there"
    assert open_files() > before
    # The disk answers after all.
    gate.open.set()
    thread.join()
    gc.collect()
    assert buffer() is None
    assert open_files() == before


def test_closing_on_a_thread_of_its_own_waits_for_the_others_only(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(true: Any, *args: Any) -> int:
        reader.close()
        closed.set()
        return int(true(*args))

    closed = threading.Event()
    before = open_files()
    preadv_as(monkeypatch, close)
    stops = in_three_files(files)
    reader = Reader(stops, ring_bytes=smallest_of(stops), num_threads=1)
    with closing(reader), pytest.raises(RideError, match="the model was closed"), reader.visit(0):
        pass
    assert closed.is_set()
    assert open_files() == before


def test_a_visit_after_closing_is_refused_even_where_the_weights_are_still_there(files: list[Path]) -> None:
    stops = in_three_files(files)
    with closing(Reader(stops, ring_bytes=smallest_of(stops), resident=frozenset([1]))) as reader:
        for stop in (0, 1):
            with reader.visit(stop):
                pass
    for stop in range(3):
        with pytest.raises(RideError, match="the model was closed"), reader.visit(stop):
            pass
    reader.close()  # twice does no harm


def test_closing_inside_a_visit_leaves_its_weights(files: list[Path]) -> None:
    stops = in_three_files(files)
    reader = Reader(stops, ring_bytes=smallest_of(stops))
    with reader.visit(0, (1, 2)) as weights:
        reader.close()
        check(weights, stops[0])


def test_no_file_stays_open(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    before, threads = open_files(), threading.active_count()
    for seed in range(4):
        stops = some_stops(seed, files)
        with closing(Reader(stops, ring_bytes=smallest_of(stops), num_threads=2)) as reader:
            for stop in range(len(stops)):
                with reader.visit(stop):
                    pass
    os.truncate(files[0], 0)
    stops = in_three_files(files)
    short = closing(Reader(stops, ring_bytes=smallest_of(stops)))
    with short as reader, pytest.raises(CheckpointError, match="cut short"), reader.visit(0, (1, 2)):
        pass
    assert open_files() == before
    assert threading.active_count() == threads


# Maps


def mapped_stops(stops: Sequence[Stop], files: Sequence[Path]) -> MappedStops:
    return MappedStops(Checkpoint(files[0].parent, {}), stops)


@fuzz
@given(seed=st.integers(0, 10_000), visits=st.lists(st.integers(0, 5), max_size=8))
def test_mapped_stops_have_the_right_bytes(files: list[Path], seed: int, visits: list[int]) -> None:
    stops = some_stops(seed, files)
    with closing(mapped_stops(stops, files)) as source:
        assert source.num_stops == 6
        for stop in visits:
            with source.visit(stop, visits) as weights:
                check(weights, stops[stop])


def test_only_what_no_map_can_hold_is_read(files: list[Path]) -> None:
    aligned = tensor_at("aligned", torch.float32, (1000,), [(files[0], 444, 4000)])
    odd = tensor_at("odd", torch.float32, (1000,), [(files[0], 445, 4000)])
    fused = tensor_at("fused", torch.bfloat16, (1000,), [(files[0], 0, 500), (files[1], 8192, 1500)])
    stops = [(aligned, empty_of("empty")), (odd, aligned), (fused,)]
    with closing(mapped_stops(stops, files)) as source:
        places = {}
        for stop in (0, 0, 1, 2, 1, 2, 0):
            with source.visit(stop, (1, 2)) as weights:
                check(weights, stops[stop])
                for name, tensor in weights.items():
                    assert places.setdefault(name, tensor.data_ptr()) == tensor.data_ptr()
        assert source.held_weights(1) is source.held_weights(2) is None, "a reader holds what was read"
        held = source.held_weights(0)
        assert held is not None
        check(held, stops[0])
        assert source.stats.read_bytes == cost_of((odd,)) + cost_of((fused,))


def test_mapped_stops_end_as_readers_do(files: list[Path]) -> None:
    before = open_files()
    stops = some_stops(2, files)
    checkpoint = Checkpoint(files[0].parent, {})
    with closing(MappedStops(checkpoint, stops)) as source, source.visit(1) as weights:
        check(weights, stops[1])
    for stop in range(6):
        with pytest.raises(RideError, match="the model was closed"), source.visit(stop):
            pass
        assert source.held_weights(stop) is None
    checkpoint.close()
    check(weights, stops[1])  # what was handed out keeps its map
    del weights, source, checkpoint
    assert open_files() <= before
