"""The state of a job, kept in a folder, so that a killed process loses a minute of work and not a day.

Knows files and tensors; knows nothing of models or text. A state folder belongs to one job, which `job.json`
describes. `results.jsonl` has a line for every finished piece of work, and `riders/` the activations of each unfinished
rider at a stop that it passed. What a dying process wrote only in part is recognised by its checksum and done again.
`inputs.json`, where there is one, holds inputs that cannot be made again, such as prompts that name the time of day.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from slowllm.errors import OtherJobError, StateError
from slowllm.files import lock, part_of, replace_file, replacing, shown, system_errors
from slowllm.streaming.way import Way

log = logging.getLogger(__name__)

T = TypeVar("T")
# The most work that is lost when the process dies. Writing costs about as much as reading as many bytes.
SAVE_SECONDS = 30.0
# What stands for texts and files in the description of a job.
_HASH = re.compile("[0-9a-f]{64}")
_FREE_SPACE = "; free some space and run it again"


class State:
    """The folder of one job. Owns its lock; a context manager.

    Args:
        folder: made if it is missing.
        job: what the results depend on, from `run_identity`.
        save_seconds: least time between two saves of a rider's activations; infinity for none.
        inputs: of a new job, as JSON has them, for `read_inputs` of later processes.
        is_new: whether to begin anew, whatever job the folder belongs to.
    Attributes:
        job: as JSON has it.
        num_resumed: results of earlier processes.
    Raises:
        OtherJobError: the folder belongs to another job.
        StateError: another process uses the folder, or it cannot be written.
    """

    def __init__(
        self, folder: Path, job: Mapping[str, Any], save_seconds: float = SAVE_SECONDS, *,
        inputs: Any = None, is_new: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.save_seconds = folder, save_seconds
        with system_errors(StateError, folder):
            (folder / "riders").mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "ab")  # noqa: SIM115 (closed with the state)
        try:
            with system_errors(StateError, folder):
                lock(self._lock.fileno(), StateError(f"{folder}: another run is using this state"))
                self.job: Mapping[str, Any] = json.loads(json.dumps(job))
                # It is part of every checksum, so that files copied from another job's folder are never used.
                self._seed = zlib.crc32(json.dumps(self.job, sort_keys=True).encode())
                saved = read_job(folder)
                if saved is None or is_new:
                    self._begin(inputs)
                else:
                    self._compare(saved)
                self._results = open(folder / "results.jsonl", "ab+")  # noqa: SIM115 (closed with the state)
                self._places = self._read_results()
                self.num_resumed = len(self._places)
        except BaseException:
            self._lock.close()
            raise

    def _begin(self, inputs: Any) -> None:
        """Write `job.json`, and the inputs before it: a folder with a job has its inputs."""
        # First, because without a job.json it is unknown to which job the others belong.
        for name in ("job.json", "results.jsonl", "inputs.json"):
            (self.folder / name).unlink(missing_ok=True)
        for rider in (self.folder / "riders").iterdir():
            rider.unlink()
        with system_errors(StateError, self.folder, _FREE_SPACE):
            if inputs is not None:
                replace_file(self.folder / "inputs.json", json.dumps(inputs))
            replace_file(self.folder / "job.json", json.dumps(self.job, indent=1))

    def _compare(self, saved: Mapping[str, Any]) -> None:
        """Refuse another job than this one."""
        job = self.job
        other = next((key for key in {**saved, **job} if saved.get(key) != job.get(key)), None)
        if other is not None:
            key, was, now = _difference(other, saved.get(other), job.get(other))
            hashes = all(isinstance(value, str) and _HASH.fullmatch(value) for value in (was, now))
            raise OtherJobError(
                self.folder,
                f"other {key}" if hashes else f"{key} was {shown(was)} and is {shown(now)}",
                "name another folder, or delete this one",
            )

    def _read_results(self) -> dict[int, tuple[int, int]]:
        """Return the position and length of each result; truncate the file where a line is damaged."""
        places: dict[int, tuple[int, int]] = {}
        position = 0
        self._results.seek(0)
        for line in self._results:
            try:
                checksum, number = line[:8], json.loads(line[9:])["number"]
                is_whole = line.endswith(b"\n") and int(checksum, 16) == zlib.crc32(line[9:], self._seed)
            except (ValueError, KeyError, TypeError):
                is_whole = False
            if not is_whole:
                log.warning(
                    "%s: a result is damaged or cut short; it and those after it are done again", self.folder
                )
                break
            places[number] = (position, len(line))
            position += len(line)
        self._results.truncate(position)
        return places

    def result(self, number: int) -> Any:
        """Return the result of a piece of work, None if it is not finished."""
        if number not in self._places:
            return None
        position, length = self._places[number]
        return json.loads(os.pread(self._results.fileno(), length, position)[9:])["result"]

    def finish(self, number: int, result: Any) -> None:
        """Save the result of a piece of work, as JSON has it, unless it is saved already.

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
            self._path_of(number).unlink(missing_ok=True)

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Save contiguous tensors and a JSON object under a name, in place of those that were there.

        Raises:
            StateError: they cannot be written.
        """
        self._save_file(self._path_of(name), tensors, {"about": json.dumps(about)})

    def saved_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what is saved under a name; None if there is nothing, or it is damaged."""
        return self._load_file(
            self._path_of(name), lambda tensors, metadata: (tensors, dict(json.loads(metadata["about"])))
        )

    def forget(self, name: int | str) -> None:
        """Delete what is saved under a name, or of an unfinished rider, by its number."""
        self._path_of(name).unlink(missing_ok=True)

    def way(self, number: int) -> Way:
        """Return the way of a rider, resumed if an earlier process saved it."""
        return Way() if self.save_seconds == math.inf else ResumedWay(self, number)

    def delete(self) -> None:
        """Delete the folder, once the results are kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path_of(self, rider: int | str) -> Path:
        name = rider if isinstance(rider, str) else f"{rider:08d}"
        return self.folder / "riders" / f"{name}.safetensors"

    def _save_file(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        metadata = {**metadata, "checksum": self._checksum(path, metadata, tensors)}
        try:
            with replacing(path) as partial:
                save_file(dict(tensors), partial, metadata)
        except (OSError, safetensors.SafetensorError) as error:
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
            raise StateError(
                f"{self.folder}: a rider's state of {num_bytes:,} bytes cannot be saved ({error}){_FREE_SPACE}"
            ) from error

    def _load_file(
        self, path: Path, parse: Callable[[dict[str, Tensor], dict[str, str]], T], consequence: str = ""
    ) -> T | None:
        """Return what `parse` makes of a file's tensors and metadata; None if it is missing or damaged."""
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata())
            if metadata.pop("checksum") != self._checksum(path, metadata, tensors):
                raise ValueError("its checksum is another")
            return parse(tensors, metadata)
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be used (%s)%s", path, error, consequence)
            return None

    def _checksum(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
        checksum = zlib.crc32(json.dumps([path.name, sorted(metadata.items())]).encode(), self._seed)
        for _, tensor in sorted(tensors.items()):
            if tensor.numel():
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
                checksum = zlib.crc32(data, checksum)
        return f"{checksum:08x}"

    def close(self) -> None:
        """Release the folder to the next process."""
        self._results.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ResumedWay(Way):
    """The progress of one rider through the stops, saved in a `State` so that a later process continues from it.

    A block that the rider passed before returns the output of the last of them: a block's output is only the next
    block's input, so the outputs of those in between are not needed.
    """

    def __init__(self, state: State, number: int) -> None:
        self._state, self._path = state, state._path_of(number)
        self._block, self._chunk = -1, -1
        self._output: Any = None
        self._sums: tuple[Tensor, ...] = ()
        self._saved_at = time.monotonic()
        state._load_file(self._path, self._restore, "; this rider starts over")

    def output_of(self, block: int) -> Any:
        """Return the output of the last block passed, None if `block` is after it."""
        return self._output if block <= self._block else None

    def pass_block(self, block: int, output: Any) -> None:
        """Record the output of a block, and save it if a save is due."""
        self._block, self._output = block, output
        self._save_in_time()

    def sums_of(self, chunk: int) -> tuple[Tensor, ...]:
        """Return the sums over the chunks of the head that were passed, nothing if `chunk` is after them."""
        return self._sums if chunk <= self._chunk else ()

    def pass_chunk(self, chunk: int, sums: tuple[Tensor, ...]) -> None:
        """Record the sums over the chunks of the head up to this one, and save them if a save is due."""
        self._chunk, self._sums = chunk, sums
        self._save_in_time()

    def _save_in_time(self) -> None:
        if time.monotonic() - self._saved_at >= self._state.save_seconds:
            self._save()
            self._saved_at = time.monotonic()

    def _save(self) -> None:
        leaves, spec = tree_flatten(self._output)
        assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves), (
            "a block returns tensors or None"
        )
        tensors = {
            f"output.{i}": leaf.cpu().contiguous() for i, leaf in enumerate(leaves) if leaf is not None
        }
        tensors |= {f"sums.{i}": tensor.cpu().clone() for i, tensor in enumerate(self._sums)}
        metadata = {
            "block": str(self._block), "chunk": str(self._chunk), "spec": treespec_dumps(spec),
            "num_leaves": str(len(leaves)), "num_sums": str(len(self._sums)),
        }  # fmt: skip
        self._state._save_file(self._path, tensors, metadata)

    def _restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        leaves = [tensors.get(f"output.{i}") for i in range(int(metadata["num_leaves"]))]
        self._output = tree_unflatten(leaves, treespec_loads(metadata["spec"]))
        self._sums = tuple(tensors[f"sums.{i}"] for i in range(int(metadata["num_sums"])))
        self._block, self._chunk = int(metadata["block"]), int(metadata["chunk"])


def read_job(folder: Path, kind: str | None = None) -> dict[str, Any] | None:
    """Return the description of a state folder's job, None if the folder is new.

    Args:
        folder: of the state.
        kind: of the job that is to be resumed.
    Raises:
        OtherJobError: the folder holds the state of a job of another kind.
        StateError: it holds something else.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise StateError(f"{folder}: is no folder")
        path = folder / "job.json"
        if not path.exists():
            inputs = folder / "inputs.json"
            own_names = {
                "riders", "lock", part_of(path).name, "results.jsonl", inputs.name, part_of(inputs).name,
            }  # fmt: skip
            names = {file.name for file in folder.iterdir()} if folder.exists() else set()
            if strangers := sorted(names - own_names):
                raise StateError(
                    f"{folder}: is no state of slowllm (it has {strangers[0]}); name an empty folder"
                )
            return None
        job = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateError(f"{folder}: its job.json cannot be read ({error}); delete the folder") from error
    if not isinstance(job, dict) or not job:
        raise StateError(f"{folder}: its job.json is damaged; delete the folder")
    if kind is not None and job.get("kind") != kind:
        raise OtherJobError(folder, f"slowllm {job.get('kind')}, not {kind}", "name another folder")
    return job


def read_inputs(folder: Path) -> Any:
    """Return the inputs that a state folder's job was begun with; None if there are none, or they are damaged."""
    try:
        return json.loads((folder / "inputs.json").read_bytes())
    except (OSError, ValueError):
        return None


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
