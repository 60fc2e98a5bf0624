"""Make a store of a checkpoint: one file a stop, encoded by several processes, resumed where it was stopped.

Leaves the source as it is. The folder says from the first moment which job it belongs to, and becomes a store when
its manifest is written, last of all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slowllm.errors import InputError, StoreError
from slowllm.files import replace_file, system_errors
from slowllm.modeling.parameter_map import place
from slowllm.modeling.skeleton import build_skeleton, read_config
from slowllm.options import format_bytes
from slowllm.prepare.decoded import is_quantised, num_matrices
from slowllm.prepare.encode import finished, record_path
from slowllm.prepare.pickle_check import check_against_torch
from slowllm.prepare.small_files import copy_small_files, hashes_of_small_files
from slowllm.prepare.store_plan import plan_files, refuse_other_dtypes
from slowllm.prepare.tasks import FileTask
from slowllm.prepare.workers import Progress, write_files
from slowllm.storage import pickles
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.gguf_files import gguf_files
from slowllm.storage.manifest import (
    FORMAT,
    MANIFEST,
    STORES,
    UNFINISHED,
    Manifest,
    is_store,
    open_checkpoint,
    read_manifest,
)
from slowllm.storage.spans import Placement
from slowllm.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        folder: of the store.
        manifest: of the store; None while other ranks still have files to write.
        source_bytes: size of the source's tensors.
        num_kept: number of matrices that the source has quantised, and the store as well, byte for byte.
        num_requantised: number of those that were rounded again.
        was_there: whether an earlier run had finished the store.
    """

    folder: Path
    manifest: Manifest | None
    source_bytes: int
    num_kept: int = 0
    num_requantised: int = 0
    was_there: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of the store's files."""
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
    requantise: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Converted:
    """Write a store of the checkpoint in the folder `source` to the folder `out`.

    Matrices that are quantised already are kept as they are, whatever the store.

    Args:
        source: a Hugging Face folder of safetensors or `pytorch_model*.bin` files, or a GGUF file or its folder.
        out: new, empty, or left by an earlier run of the same conversion.
        store: ``bf16``, ``lossless``, ``int8`` or ``int4``.
        workers: number of processes that encode; by default one for each 2 GiB of weights, at most one for each core.
        rank: which share of the files this run writes; the run that ends last writes the manifest.
        world_size: number of shares.
        name: of the checkpoint, for messages; by default the folder's.
        requantise: whether matrices of blocks that are quantised already are decoded and rounded again, as the store has it.
        on_progress: called at the start and after every file.
    Raises:
        CheckpointError: the source cannot be read, or is a store itself.
        StoreError: the folder holds something else, another run writes the same files, the disk is full, or pickled
            weights were read otherwise than torch.load reads them.
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
    with _open_source(source, checks=rank == 0) as checkpoint:
        config: Any = read_config(source)
        model = build_skeleton(config, source, torch.bfloat16)
        placements = place(model, checkpoint.spans)
        if requantise:
            _refuse_requantising(source, store, placements)
        if store == "lossless":
            refuse_other_dtypes(placements)
        job = {
            "format": FORMAT,
            "store": store,
            "source_name": name or source.name,
            "source_hash": checkpoint.weights_hash(),
            "requantised": requantise,
        }
        tasks = plan_files(model, placements, out, store, job, requantise=requantise)
        _begin(out, job)
        source_bytes = sum(task.source_bytes for task in tasks)
        was_there = (out / MANIFEST).is_file()
        if not was_there:
            copy_small_files(source, out, config)
            share = tasks[rank::world_size]
            _check_space(out, share)
            write_files(share, workers, on_progress)
            if _has_only_pickles(source):
                check_against_torch(share)
        manifest = _end(out, tasks, job)
    counts = {True: 0, False: 0}
    for task in (tensor for file in tasks for tensor in file.tensors):
        if task.placement.coding is not None and is_quantised(task.placement.coding):
            counts[task.is_kept] += num_matrices(task.placement)
    return Converted(out, manifest, source_bytes, counts[True], counts[False], was_there)


def _refuse_requantising(source: Path, store: str, placements: Mapping[str, Placement]) -> None:
    """Refuse the option where there is nothing to round again."""
    if store == "lossless":
        raise InputError(
            "a lossless store rounds nothing, so it cannot requantise; use --store int8, int4 or bf16"
        )
    if not any(p.coding is not None and is_quantised(p.coding) for p in placements.values()):
        raise InputError(
            f"{source}: none of its matrices is quantised, so none can be rounded again; leave out --requantise"
        )


def _open_source(folder: Path, *, checks: bool) -> Checkpoint:
    if is_store(folder):
        raise StoreError(f"{folder}: is a store already; convert the checkpoint that it was made from")
    if not gguf_files(folder) and _has_only_pickles(folder):
        checkpoint = pickles.open_pickled(folder)
        if checks:
            pickles.check_crcs(checkpoint)
        return checkpoint
    return open_checkpoint(folder)


def _has_only_pickles(folder: Path) -> bool:
    return pickles.is_pickled(folder) and not any(folder.glob("*.safetensors"))


def _begin(out: Path, job: Mapping[str, Any]) -> None:
    """Claim the folder for this job, or check that it is claimed for it.

    Raises:
        StoreError: the folder holds something else, or belongs to another conversion.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / MANIFEST).is_file():
            done = read_manifest(out)
            if (done.store, done.source_hash) != (job["store"], job["source_hash"]):
                raise StoreError(
                    f"{out}: is a finished {done.store} store of {done.source_name}; name another folder"
                )
            if done.requantised != job["requantised"]:
                how = "with" if done.requantised else "without"
                raise StoreError(f"{out}: is a store that was made {how} --requantise; name another folder")
            open_checkpoint(out).close()  # refuses a store with a missing file or another store's
            return
        if not (out / UNFINISHED).is_file():
            has_strangers = any(not entry.name.startswith(UNFINISHED) for entry in out.iterdir())
            # Checked again: another rank may have begun in between.
            if has_strangers and not (out / UNFINISHED).is_file():
                raise StoreError(f"{out}: is not empty; name a new folder, or empty this one")
            # Several ranks may begin at once; they write the same content.
            replace_file(out / UNFINISHED, json.dumps(job), is_shared=True)
        begun = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
        if not isinstance(begun, dict):
            raise ValueError("it is no object")
    except NotADirectoryError as error:
        raise StoreError(f"{out}: is no folder") from error
    except FileExistsError as error:
        raise StoreError(f"{out}: is a file; name a folder") from error
    except OSError as error:
        raise StoreError(f"{out}: {error.strerror or error}") from error
    except ValueError as error:
        raise StoreError(f"{out}: its {UNFINISHED} is damaged; empty the folder and begin again") from error
    begun.setdefault("requantised", False)  # of an earlier version
    for key, what in (
        ("format", "format"), ("store", "store"), ("source_hash", "model"), ("requantised", "choice of --requantise"),
    ):  # fmt: skip
        if begun.get(key) != job[key]:
            raise StoreError(
                f"{out}: was begun for another {what} ({begun.get('store')} of {begun.get('source_name')}); "
                "name another folder, or empty this one"
            )


def _check_space(out: Path, tasks: Sequence[FileTask]) -> None:
    needed = sum(task.estimated_bytes for task in tasks if finished(task.path) is None)
    free = shutil.disk_usage(out).free
    for path in out.glob("*.part"):  # a killed run left these; they are overwritten
        with contextlib.suppress(FileNotFoundError):  # another rank has just finished it
            free += path.stat().st_size
    if needed * 1.01 > free:
        raise StoreError(
            f"{out}: {format_bytes(needed)} are to be written, but {format_bytes(free)} are free; make room"
        )


def _end(out: Path, tasks: Sequence[FileTask], job: Mapping[str, Any]) -> Manifest | None:
    """Write the manifest, if the files of all ranks are finished."""
    if (out / MANIFEST).is_file():
        return read_manifest(out)
    files = {task.path.name: finished(task.path) for task in tasks}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        if (out / MANIFEST).is_file():  # another rank has just written it, and removed the records
            return read_manifest(out)
        log.info("%d of %d files are for other ranks to write", len(missing), len(files))
        return None
    manifest = Manifest(
        str(job["store"]), __version__, str(job["source_name"]), str(job["source_hash"]),
        all(tensor.is_exact for task in tasks for tensor in task.tensors),
        {name: file for name, file in files.items() if file is not None}, hashes_of_small_files(out), job["requantised"] is True,
    )  # fmt: skip
    with system_errors(StoreError, out / MANIFEST, "; run the same command again"):
        replace_file(out / MANIFEST, manifest.to_json(), is_shared=True)
    for path in (out / UNFINISHED, *(record_path(task.path) for task in tasks)):
        path.unlink(missing_ok=True)
    return manifest
