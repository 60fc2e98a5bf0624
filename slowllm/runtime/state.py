"""What a job has done so far, kept in a folder, so that a killed process loses a minute and not a day.

Knows files and tensors; knows nothing of models or text. A state folder belongs to one job, which `job.json`
describes. `results.jsonl` has a line for every piece of work that is done, and `riders/` what each rider aboard had
in hand at a stop it passed. Whatever was being written when the process died is recognised and done again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from slowllm.errors import StateError
from slowllm.files import lock, replace_file, replacing, shown, system_errors

log = logging.getLogger(__name__)


# What is lost at most when the process dies; writing costs about as much as reading as many bytes.
SAVE_SECONDS = 30.0
_FREE_SPACE = "; free some space and run it again"


class State:
    """The folder of one job. Owns its lock; a context manager.

    Args:
        folder: made where it is missing.
        job: what the results depend on, as JSON has it.
        save_seconds: how long a rider goes on before what it has in hand is saved again.
    Raises:
        StateError: the folder belongs to another job, another process uses it, or it cannot be written.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], save_seconds: float = SAVE_SECONDS) -> None:
        self.folder, self.save_seconds = folder, save_seconds
        self.num_resumed = 0
        with system_errors(StateError, folder):
            (folder / "riders").mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "ab")  # noqa: SIM115 (closed with the state)
        try:
            with system_errors(StateError, folder):
                lock(self._lock.fileno(), StateError(f"{folder}: another run is using this state"))
                found = json.loads(json.dumps(job))
                # In every checksum: what belongs to another job is never taken for this one's, whatever was copied.
                self._seed = zlib.crc32(json.dumps(found, sort_keys=True).encode())
                self._own(found)
                self._results = open(folder / "results.jsonl", "ab+")  # noqa: SIM115 (closed with the state)
                self._places = self._read_results()
        except BaseException:
            self._lock.close()
            raise

    def _own(self, job: dict[str, Any]) -> None:
        """Write `job.json`, or compare it."""
        saved = read_job(self.folder)
        if saved is None:
            # Without a job.json nobody knows whose these are.
            (self.folder / "results.jsonl").unlink(missing_ok=True)
            for rider in (self.folder / "riders").iterdir():
                rider.unlink()
            with system_errors(StateError, self.folder, _FREE_SPACE):
                replace_file(self.folder / "job.json", json.dumps(job, indent=1))
            return
        other = [key for key in {**saved, **job} if saved.get(key) != job.get(key)]
        if other:
            key, was, now = _difference(other[0], saved.get(other[0]), job.get(other[0]))
            raise StateError(
                f"{self.folder}: is the state of another job ({key} was {shown(was)} and is {shown(now)}); "
                "name another folder, or delete this one"
            )

    def _read_results(self) -> dict[int, tuple[int, int]]:
        """Find where each result lies; cut off what was not written to its end."""
        places: dict[int, tuple[int, int]] = {}
        position = 0
        self._results.seek(0)
        for line in self._results:
            try:
                checksum, number = line[:8], json.loads(line[9:])["number"]
                good = line.endswith(b"\n") and int(checksum, 16) == zlib.crc32(line[9:], self._seed)
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                log.warning(
                    "%s: a result is damaged or cut short; it and those after it are done again", self.folder
                )
                break
            places[number] = (position, len(line))
            position += len(line)
        self._results.truncate(position)
        self.num_resumed = len(places)
        return places

    def result(self, number: int) -> Any:
        """Return the result of a piece of work that is done, None where it is not."""
        if number not in self._places:
            return None
        position, length = self._places[number]
        return json.loads(os.pread(self._results.fileno(), length, position)[9:])["result"]

    def finish(self, number: int, result: Any) -> None:
        """Keep a result, as JSON has it, unless an earlier process did.

        Raises:
            StateError: it cannot be written.
        """
        if number in self._places:
            return
        line = json.dumps({"number": number, "result": result}).encode() + b"\n"
        line = b"%08x " % zlib.crc32(line, self._seed) + line
        with system_errors(StateError, self.folder, _FREE_SPACE):
            position = os.fstat(self._results.fileno()).st_size
            os.write(self._results.fileno(), line)
            if os.fstat(self._results.fileno()).st_size != position + len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._results.fileno())
            self._places[number] = (position, len(line))
            self._file_of(number).unlink(missing_ok=True)

    def keep(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep tensors under a name, in the place of those that were there.

        Args:
            name: of a file in `riders/`.
            tensors: contiguous.
            about: what JSON has of them.
        Raises:
            StateError: they cannot be written.
        """
        path = self.folder / "riders" / f"{name}.safetensors"
        metadata = {"about": json.dumps(about)}
        _save_tensors(
            path, tensors, {**metadata, "checksum": _checksum(path, metadata, tensors, self._seed)}, self
        )

    def kept(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what is kept under a name; None where nothing is, or it is damaged."""
        path = self.folder / "riders" / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            tensors, metadata = _load_tensors(path)
            if metadata.pop("checksum") != _checksum(path, metadata, tensors, self._seed):
                raise ValueError("its checksum is another")
            return tensors, dict(json.loads(metadata["about"]))
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be used (%s)", path, error)
            return None

    def journal(self, number: int) -> Journal:
        """Return the journal of a rider, with what an earlier process saved of it."""
        return Journal(self, number)

    def _file_of(self, number: int) -> Path:
        return self.folder / "riders" / f"{number:08d}.safetensors"

    def close(self) -> None:
        """Let the next process have the folder."""
        self._results.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Journal:
    """What one rider has passed.

    A stop that it has passed before returns what came of the last of them: a block's output is only the next
    block's input, so those between the first and the last need not be known.
    """

    num_frozen = 0

    def __init__(self, state: State, number: int) -> None:
        self._state, self._path = state, state._file_of(number)
        self._block, self._chunk = -1, -1
        self._output: Any = None
        self._sums: tuple[Tensor, ...] = ()
        self._saved_at = time.monotonic()
        self._load()

    def output_of(self, block: int) -> Any:
        """Return the output of a block that was passed, None where it is still to come."""
        return self._output if block <= self._block else None

    def pass_block(self, block: int, output: Any) -> None:
        """Note the output of a block; it is saved where it is time."""
        self._block, self._output = block, output
        self._save_in_time()

    def sums_of(self, chunk: int) -> tuple[Tensor, ...]:
        """Return what a chunk of the head, which was passed, left; nothing where it is still to come."""
        return self._sums if chunk <= self._chunk else ()

    def pass_chunk(self, chunk: int, sums: tuple[Tensor, ...]) -> None:
        """Note what a chunk of the head left."""
        self._chunk, self._sums = chunk, sums
        self._save_in_time()

    def _save_in_time(self) -> None:
        if time.monotonic() - self._saved_at >= self._state.save_seconds:
            self._save()
            self._saved_at = time.monotonic()

    def _save(self) -> None:
        leaves, spec = tree_flatten(self._output)
        tensors = {
            f"output.{i}": leaf.cpu().contiguous()
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
        }
        tensors |= {f"sums.{i}": tensor.cpu().clone() for i, tensor in enumerate(self._sums)}
        assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves), (
            "a block returns tensors or None"
        )
        metadata = {
            "block": str(self._block), "chunk": str(self._chunk), "spec": treespec_dumps(spec),
            "num_leaves": str(len(leaves)), "num_sums": str(len(self._sums)),
        }  # fmt: skip
        metadata["checksum"] = _checksum(self._path, metadata, tensors, self._state._seed)
        _save_tensors(self._path, tensors, metadata, self._state)

    def _load(self) -> None:
        if not self._path.exists():
            return
        try:
            tensors, metadata = _load_tensors(self._path)
            if metadata.pop("checksum") != _checksum(self._path, metadata, tensors, self._state._seed):
                raise ValueError("its checksum is another")
            leaves = [tensors.get(f"output.{i}") for i in range(int(metadata["num_leaves"]))]
            self._output = tree_unflatten(leaves, treespec_loads(metadata["spec"]))
            self._sums = tuple(tensors[f"sums.{i}"] for i in range(int(metadata["num_sums"])))
            self._block, self._chunk = int(metadata["block"]), int(metadata["chunk"])
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be used (%s); this rider starts over", self._path, error)
            self._block = self._chunk = -1


def _save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], state: State
) -> None:
    try:
        with replacing(path) as partial:
            save_file(dict(tensors), partial, dict(metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise StateError(
            f"{state.folder}: a rider's state of "
            f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes cannot be saved ({error}){_FREE_SPACE}"
        ) from error


def _load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def _checksum(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], seed: int) -> str:
    text = json.dumps([path.name, sorted(metadata.items())])
    found = zlib.crc32(text.encode(), seed)
    for name in sorted(tensors):
        if tensors[name].numel():
            found = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def read_job(folder: Path, kind: str | None = None) -> dict[str, Any] | None:
    """Return what a state folder says of its job, None where it is new.

    Args:
        folder: of the state.
        kind: of the job that is to go on.
    Raises:
        StateError: the folder holds something else, or the state of a job of another kind.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise StateError(f"{folder}: is no folder")
        path = folder / "job.json"
        if not path.exists():
            strangers = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
            strangers = [
                n for n in strangers if n not in ("riders", "lock", "job.json.part", "results.jsonl")
            ]
            if strangers:
                raise StateError(
                    f"{folder}: is no state of slowllm (it has {strangers[0]}); name an empty folder"
                )
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateError(f"{folder}: its job.json cannot be read ({error}); delete the folder") from error
    if not isinstance(found, dict) or not found:
        raise StateError(f"{folder}: its job.json is damaged; delete the folder")
    if kind is not None and found.get("kind") != kind:
        raise StateError(
            f"{folder}: is the state of another job (slowllm {found.get('kind')}, not {kind}); name another folder"
        )
    return found


def _difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the innermost key whose values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        inner = next((k for k in {**was, **now} if was.get(k) != now.get(k)), None)
        return (key, was, now) if inner is None else _difference(inner, was.get(inner), now.get(inner))
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for a, b in zip(was, now, strict=True):
            if a != b:
                return _difference(key, a, b)
    return key, was, now
