"""How do several processes write the files of a store?

Knows nothing of models, so that the processes start quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from slowllm.errors import StoreError
from slowllm.options import GIB
from slowllm.prepare.encode import finished, write_file
from slowllm.prepare.tasks import FileTask

# Weights that are worth a process of their own: it imports torch for several seconds before it encodes anything.
WORKER_BYTES = 2 * GIB


@dataclass(frozen=True)
class Progress:
    """The progress of a conversion.

    Attributes:
        num_done, num_files: of this rank's share.
        done_bytes, source_bytes: of the source.
        estimated_bytes: estimate, from the start of this run, of the bytes that it writes.
        is_start: whether this run has written no file yet.
    """

    num_done: int
    num_files: int
    done_bytes: int
    source_bytes: int
    estimated_bytes: int
    is_start: bool = False


def choose_workers(num_bytes: int, num_cores: int) -> int:
    """Return how many processes encode so many bytes of weights."""
    return max(1, min(num_cores, num_bytes // WORKER_BYTES))


def write_files(
    tasks: Sequence[FileTask], num_workers: int | None, on_progress: Callable[[Progress], None] | None
) -> None:
    """Write the files that are not finished yet, several at a time.

    Args:
        tasks: the files.
        num_workers: number of processes; None to choose it by the size of the source.
        on_progress: called at the start and after every file.
    Raises:
        StoreError: a file could not be written; those that other processes have begun are finished first.
    """
    left = [task for task in tasks if finished(task.path) is None]
    done = [task for task in tasks if task not in left]
    to_write = sum(task.estimated_bytes for task in left)
    source_bytes = sum(task.source_bytes for task in tasks)

    def report(*, is_start: bool = False) -> None:
        if on_progress is not None:
            done_bytes = sum(task.source_bytes for task in done)
            on_progress(Progress(len(done), len(tasks), done_bytes, source_bytes, to_write, is_start))

    if num_workers is None:
        num_workers = choose_workers(sum(task.source_bytes for task in left), os.cpu_count() or 1)
    report(is_start=True)
    for task in _written(left, min(num_workers, len(left))):
        done.append(task)
        report()


def _written(tasks: Sequence[FileTask], num_workers: int) -> Iterator[FileTask]:
    """Write files, and yield each when it is finished."""
    if num_workers <= 1:
        for task in tasks:
            write_file(task)
            yield task
        return
    # Not forked: this process has threads.
    context = multiprocessing.get_context("spawn")
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    with ProcessPoolExecutor(
        num_workers, context, initializer=_begin_worker, initargs=(num_threads, os.getpid())
    ) as pool:
        pending = {pool.submit(write_file, task): task for task in tasks}
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield pending.pop(future)
        except BrokenProcessPool as error:
            raise StoreError(
                "a process that encodes was killed (too little memory?); run the same command again, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(num_threads: int, parent: int) -> None:
    torch.set_num_threads(num_threads)
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end when the parent process dies
    if os.getppid() != parent:
        os._exit(1)
