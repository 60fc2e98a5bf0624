"""Make a store of a checkpoint: one file a stop, encoded by several processes, resumed where it was stopped.

Knows models by their parts; the bytes are `encode`'s. Nothing of the source is changed. The folder tells from the
first moment which job it belongs to, and becomes a store when its manifest is written, last of all.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slowllm.errors import InputError, StoreError
from slowllm.files import replace_file, replacing, system_errors
from slowllm.modeling.layout import Layout, in_order_of_use, lay_out
from slowllm.modeling.parameter_map import place
from slowllm.modeling.skeleton import build_skeleton, read_config
from slowllm.options import format_bytes
from slowllm.prepare.encode import FileTask, TensorTask, finished, record_path, write_file
from slowllm.prepare.hub import INDEX, SMALL_FILES
from slowllm.storage import pickles
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.manifest import (
    FORMAT,
    MANIFEST,
    STORES,
    UNFINISHED,
    Manifest,
    StoredFile,
    is_store,
    open_checkpoint,
    read_manifest,
)
from slowllm.storage.spans import Placement

log = logging.getLogger(__name__)

# Smaller matrices gain nothing that can be noticed.
MIN_WEIGHTS = 4096
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is.

    Attributes:
        num_done, num_files: of this process's share.
        done_bytes, source_bytes: of the source.
        estimated_bytes: about as many as were to be written at the start.
        is_start: whether nothing has been done yet by this run.
    """

    num_done: int
    num_files: int
    done_bytes: int
    source_bytes: int
    estimated_bytes: int
    is_start: bool = False


@dataclass(frozen=True)
class Converted:
    """What became of a conversion.

    Attributes:
        folder: of the store.
        manifest: of the store; None while other processes still have shares to do.
        source_bytes: of the source's tensors.
        was_there: whether it was finished before.
    """

    folder: Path
    manifest: Manifest | None
    source_bytes: int
    was_there: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the store's files."""
        return 0 if self.manifest is None else sum(file.num_bytes for file in self.manifest.files.values())


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    store: str,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    name: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Converted:
    """Write a store of the checkpoint in the folder `source` to the folder `out`.

    Args:
        source: a Hugging Face folder of safetensors or `pytorch_model*.bin` files.
        out: new, empty, or left by an earlier run of the same conversion.
        store: ``bf16``, ``lossless``, ``int8`` or ``int4``.
        workers: processes that encode; by default one for each core.
        rank: which share of the files is done here; the run that ends last writes the manifest.
        world_size: number of shares.
        name: of the checkpoint, for messages; by default the folder's.
        on_progress: told at the start and after every file.
    Raises:
        CheckpointError: the source cannot be read, or is a store itself.
        StoreError: the folder has something else in it, another run is at work on the same files, or the disk is full.
        InputError: an option cannot be used.
    """
    if store not in STORES:
        raise InputError(f"store {store!r} is unknown; use one of {', '.join(STORES)}")
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} is not one of a world of {world_size}; ranks are counted from 0")
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers do nothing; use at least 1")
    try:
        source, out = Path(source).expanduser().resolve(), Path(out).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # no such home, links in a circle
        raise InputError(f"{out}: {getattr(error, 'strerror', None) or error}") from error
    if out == source or source in out.parents or out in source.parents:
        raise InputError(f"{out}: lies in the source, or around it; name another folder")
    with _open_source(source) as checkpoint:
        config: Any = read_config(source)
        model = build_skeleton(config, source, torch.bfloat16)
        placements = place(model, checkpoint.spans)
        if store == "lossless":
            _refuse_other_dtypes(placements)
        job = {
            "format": FORMAT,
            "store": store,
            "source_name": name or source.name,
            "source_hash": checkpoint.weights_hash(),
        }
        tasks = plan_files(model, placements, out, store, job)
        _begin(out, job)
        source_bytes = sum(task.source_bytes for task in tasks)
        was_there = (out / MANIFEST).is_file()
        if not was_there:
            _copy_small_files(source, out)
            own = tasks[rank::world_size]
            _check_space(out, own)
            _write_all(own, workers or os.cpu_count() or 1, on_progress)
        exact = _is_exact(store, placements)
    return Converted(out, _end(out, tasks, job, exact), source_bytes, was_there)


def _open_source(folder: Path) -> Checkpoint:
    if is_store(folder):
        raise StoreError(f"{folder}: is a store already; convert the checkpoint that it was made from")
    has_safetensors = any(folder.glob("*.safetensors"))
    if pickles.is_pickled(folder) and not has_safetensors:
        return pickles.open_pickled(folder)
    return open_checkpoint(folder)


def _refuse_other_dtypes(placements: Mapping[str, Placement]) -> None:
    largest = max(placements.values(), key=lambda placement: placement.num_bytes)
    if largest.dtype != torch.bfloat16:
        name = str(largest.dtype).removeprefix("torch.")
        raise StoreError(
            f"{largest.name}: is {name}, but the lossless store is for bfloat16; use --store bf16, int8 or int4"
        )


def _is_exact(store: str, placements: Mapping[str, Placement]) -> bool:
    if store == "bf16":
        return all(p.dtype == torch.bfloat16 or not p.dtype.is_floating_point for p in placements.values())
    return store == "lossless"


def plan_files(
    model: PreTrainedModel,
    placements: Mapping[str, Placement],
    out: Path,
    store: str,
    job: Mapping[str, Any],
) -> list[FileTask]:
    """Return the files of a store: what stands outside the blocks, each block in order of use, and the head."""
    blocks = lay_out(model, placements)
    order = {name: number for number, name in enumerate(in_order_of_use(model, placements))}
    coded = _coded_names(model, placements, blocks, _FLOATS if store != "lossless" else (torch.bfloat16,))
    codec = None if store == "bf16" else store
    in_blocks = {p.name for stop in blocks.stops[: len(blocks.blocks)] for p in stop}

    def task(name: str) -> TensorTask:
        placement = placements[name]
        cast = store == "bf16" and placement.dtype in _FLOATS
        return TensorTask(
            placement, codec if name in coded else None, torch.bfloat16 if cast else placement.dtype
        )

    def file(name: str, tensors: Sequence[str]) -> FileTask:
        # By the hash in its header a file is told from that of another model of the same shape.
        metadata = (
            ("format", "pt"),
            ("slowllm_store", str(job["store"])),
            ("source", str(job["source_hash"])),
        )
        return FileTask(out / name, tuple(map(task, tensors)), metadata)

    head_name = blocks.chunks[0].name.rpartition("[")[0]
    has_head = head_name != blocks.embedding_placement.name
    outside = [name for name in placements if name not in in_blocks and not (has_head and name == head_name)]
    files = [file("outside.safetensors", outside)]
    for number, stop in enumerate(blocks.stops[: len(blocks.blocks)]):
        names = sorted((p.name for p in stop), key=lambda name: order.get(name, len(order)))
        files.append(file(f"block-{number:05d}.safetensors", names))
    if has_head:
        files.append(file("head.safetensors", [head_name]))
    return files


def _coded_names(
    model: PreTrainedModel,
    placements: Mapping[str, Placement],
    layout: Layout,
    dtypes: Sequence[torch.dtype],
) -> frozenset[str]:
    """Return the parameters that a codec may take: the linear maps of blocks, and fused experts; no routers."""
    config = model.config.get_text_config()
    counts = {
        getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
    }
    found = set()
    for number, block in enumerate(layout.blocks):
        for name, module in block.named_modules():
            for own, parameter in module._parameters.items():
                full = ".".join(filter(None, (layout.blocks_name, str(number), name, own)))
                if parameter is None or full not in placements:
                    continue
                is_linear = isinstance(module, nn.Linear | Conv1D) and parameter.dim() == 2
                is_router = is_linear and parameter.shape[0] in counts
                if (is_linear and not is_router) or parameter.dim() == 3:
                    placement = placements[full]
                    if placement.dtype in dtypes and parameter.numel() >= MIN_WEIGHTS:
                        found.add(full)
    return frozenset(found)


def _begin(out: Path, job: Mapping[str, Any]) -> None:
    """See that the folder is this job's, or make it so.

    Raises:
        StoreError: it has something else in it, or belongs to another conversion.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / MANIFEST).is_file():
            done = read_manifest(out)
            if (done.store, done.source_hash) != (job["store"], job["source_hash"]):
                raise StoreError(
                    f"{out}: is a finished {done.store} store of {done.source_name}; name another folder"
                )
            # A file that is missing, or another's, is not mended by saying that all is done.
            open_checkpoint(out).close()
            return
        if not (out / UNFINISHED).is_file():
            has_strangers = any(not entry.name.startswith(UNFINISHED) for entry in out.iterdir())
            # Asked again: another rank may have begun between the two looks.
            if has_strangers and not (out / UNFINISHED).is_file():
                raise StoreError(f"{out}: is not empty; name a new folder, or empty this one")
            # Several ranks may begin at once; they write the same.
            replace_file(out / UNFINISHED, json.dumps(job), is_shared=True)
        begun = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
    except NotADirectoryError as error:
        raise StoreError(f"{out}: is no folder") from error
    except FileExistsError as error:
        raise StoreError(f"{out}: is a file; name a folder") from error
    except OSError as error:
        raise StoreError(f"{out}: {error.strerror or error}") from error
    except ValueError as error:
        raise StoreError(f"{out}: its {UNFINISHED} is damaged; empty the folder and begin again") from error
    if not isinstance(begun, dict):
        raise StoreError(f"{out}: its {UNFINISHED} is damaged; empty the folder and begin again")
    for key, what in (("format", "format"), ("store", "store"), ("source_hash", "model")):
        if begun.get(key) != job[key]:
            raise StoreError(
                f"{out}: was begun for another {what} ({begun.get('store')} of {begun.get('source_name')}); "
                "name another folder, or empty this one"
            )


def _copy_small_files(source: Path, out: Path) -> None:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if name == INDEX or not path.is_file():
            continue
        if any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in SMALL_FILES):
            target = out / name
            target.parent.mkdir(exist_ok=True)
            with system_errors(StoreError, target), replacing(target, is_shared=True) as partial:
                shutil.copyfile(path, partial)


def _hashes_of_small_files(out: Path) -> dict[str, str]:
    names = [p.relative_to(out).as_posix() for p in sorted(out.rglob("*")) if p.is_file()]
    small = [n for n in names if any(fnmatchcase(n, p) and n.count("/") == p.count("/") for p in SMALL_FILES)]
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in small}


def _check_space(out: Path, tasks: Sequence[FileTask]) -> None:
    needed = sum(task.estimated_bytes for task in tasks if finished(task.path) is None)
    # What a killed run left in part is written anew in its place.
    there = 0
    for path in out.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # another rank has just finished it
            there += path.stat().st_size
    free = shutil.disk_usage(out).free + there
    if needed * 1.01 > free:
        raise StoreError(
            f"{out}: {format_bytes(needed)} are to be written, but {format_bytes(free)} are free; make room"
        )


def _write_all(
    tasks: Sequence[FileTask], workers: int, on_progress: Callable[[Progress], None] | None
) -> None:
    """Write files, several at a time.

    Raises:
        StoreError: one could not be written; the others under way are finished first.
    """
    left = [task for task in tasks if finished(task.path) is None]
    done = [task for task in tasks if task not in left]
    to_write = sum(task.estimated_bytes for task in left)
    source_bytes = sum(task.source_bytes for task in tasks)

    def tell(*, is_start: bool = False) -> None:
        if on_progress is not None:
            done_bytes = sum(task.source_bytes for task in done)
            on_progress(Progress(len(done), len(tasks), done_bytes, source_bytes, to_write, is_start))

    tell(is_start=True)
    workers = min(workers, len(left))
    if workers <= 1:
        for task in left:
            write_file(task)
            done.append(task)
            tell()
        return
    for task, future in _in_processes(left, workers):
        try:
            future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                "a process that encodes was killed (too little memory?); run the same command again, with fewer --workers"
            ) from error
        done.append(task)
        tell()


def _begin_worker(num_threads: int, parent: int) -> None:
    torch.set_num_threads(num_threads)
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody is left to write for
    if os.getppid() != parent:
        os._exit(1)


def _in_processes(tasks: Sequence[FileTask], workers: int) -> Iterator[tuple[FileTask, Future[StoredFile]]]:
    # Not forked: this process has threads by now.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, context, initializer=_begin_worker, initargs=(threads, os.getpid())
    ) as pool:
        pending = {pool.submit(write_file, task): task for task in tasks}
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end(out: Path, tasks: Sequence[FileTask], job: Mapping[str, Any], is_exact: bool) -> Manifest | None:
    """Write the manifest, if every file of every share is finished."""
    from slowllm.version import __version__

    if (out / MANIFEST).is_file():
        return read_manifest(out)
    files = {task.path.name: finished(task.path) for task in tasks}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        if (out / MANIFEST).is_file():  # another rank was faster, and has tidied up
            return read_manifest(out)
        log.info("%d of %d files are for other ranks to write", len(missing), len(files))
        return None
    manifest = Manifest(
        str(job["store"]), __version__, str(job["source_name"]), str(job["source_hash"]), is_exact,
        {name: file for name, file in files.items() if file is not None}, _hashes_of_small_files(out),
    )  # fmt: skip
    with system_errors(StoreError, out / MANIFEST, "; run the same command again"):
        replace_file(out / MANIFEST, manifest.to_json(), is_shared=True)
    for path in (out / UNFINISHED, *(record_path(task.path) for task in tasks)):
        path.unlink(missing_ok=True)
    return manifest
