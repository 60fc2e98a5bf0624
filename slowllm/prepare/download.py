"""Download a checkpoint from the hub so that it can be streamed, and check every file's size and hash.

Counts the bytes first, and keeps incomplete files for the next run, under other names. Knows nothing of the files'
content.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers, tqdm  # type: ignore[attr-defined]  # public, but lazily so

from slowllm.errors import DownloadError, InputError
from slowllm.files import lock, put_in_place, replace_file
from slowllm.options import format_bytes
from slowllm.prepare.hub import HubFile, choose, list_files, one_sentence
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.gguf_files import SUFFIX

# The hub serves larger files by its Xet protocol only, which http_get does not implement.
MAX_FILE_BYTES = 50 * 1000**3
# One stream seldom saturates a fast connection; an interrupt should not leave many incomplete shards.
NUM_STREAMS = 4


def download(
    repo: str,
    *,
    revision: str = "main",
    to: str | os.PathLike[str] | None = None,
    verify: bool = True,
    blocks: str | None = None,
    ends: bool = False,
    gguf: str | None = None,
) -> Path:
    """Download the files of a checkpoint, or of a part of it, that streaming needs, and return its folder.

    Bytes that an earlier run has downloaded are not downloaded again. Progress goes to stderr.

    Args:
        repo: hub id, such as ``bigscience/bloom``.
        revision: branch, tag or commit.
        to: folder to write to; by default the Hugging Face cache, where `load` finds the checkpoint by its id.
        verify: compare the SHA-256 of LFS files with the hub's. Sizes and the git ids of other files are always
            compared; so are LFS files found in `to`, because their names do not include their revision.
        blocks: fetch only shards with tensors of these, such as ``8:16``.
        ends: fetch only shards with tensors outside the blocks, beside those of `blocks`.
        gguf: name of the GGUF file to fetch, of a set any; not needed where the repository has one GGUF model and no safetensors.
    Returns:
        the folder, or the first GGUF file.
    Raises:
        DownloadError: the hub does not answer or refuses, the disk is too small, or a file has a wrong size or hash.
        CheckpointError: the repository has no weights that can be streamed.
        InputError: the id or the folder cannot be used, or the model has no such blocks.
        ArchitectureError: this version of transformers does not know the model whose part is wanted.
    """
    with one_sentence(repo, revision):
        commit, listing = list_files(repo, revision)
        place: _Cache | _Folder = _Cache(repo, revision, commit)
        if to is not None:
            place = _Folder(Path(to).expanduser().resolve())
            if place.folder.exists() and not place.folder.is_dir():
                raise InputError(f"{place.folder}: is a file; name a folder")
        run = _Run(repo, commit, place, verify)
        files = choose(repo, listing, run.read, gguf)
        is_gguf = files[-1].name.endswith(SUFFIX)
        if is_gguf and (blocks is not None or ends):
            raise InputError("a GGUF model is fetched whole; leave out --blocks and --ends")
        what, part = f"{repo} {revision} ({commit[:8]})", None
        if blocks is not None or ends:
            from slowllm.prepare.part_files import files_of_part  # imports transformers

            whole_bytes = sum(file.size for file in files)
            part = files_of_part(repo, files, run.read, blocks=blocks, ends=ends)
            files = [*part.files]
            what = f"{what}, {format_bytes(whole_bytes)} in all, of which {part.name}"
        missing_bytes = _check_space(what, place, files)
        with run.progress(missing_bytes, files):
            _in_threads(run.fetch, files, run.stop)
        place.finish()
    if is_gguf:
        Checkpoint.open(place.folder / files[0].name).close()
        return place.folder / files[0].name
    if part is not None:
        part.check(place.folder)
    else:
        Checkpoint.open(place.folder).close()
    return place.folder


class _Cache:
    """The Hugging Face cache: files named by their hash, and snapshots that link to them."""

    names_content = True  # a file's name is its hash

    def __init__(self, repo: str, revision: str, commit: str) -> None:
        self._repo, self._revision, self._commit = repo, revision, commit
        self.root = Path(constants.HF_HUB_CACHE).expanduser().resolve()
        self._storage = self.root / repo_folder_name(repo_id=repo, repo_type="model")
        self.folder = self._storage / "snapshots" / commit

    def target(self, file: HubFile) -> Path:
        """Return the path of a complete file."""
        return self._storage / "blobs" / file.etag

    def partial(self, file: HubFile) -> Path:
        """Return its path until it is complete."""
        # Not "<etag>.incomplete": some versions of huggingface_hub leave files there that have holes.
        return self._storage / "blobs" / f"{file.etag}.slowllm.incomplete"

    def find(self, file: HubFile) -> Path | None:
        """Return the path of the complete file, if there is one."""
        # The snapshot first: on a disk without links it has the file itself.
        return next((path for path in (self.folder / file.name, self.target(file)) if path.is_file()), None)

    def discard(self, file: HubFile, problem: str) -> None:
        """Remove a damaged file."""
        for path in (self.folder / file.name, self.target(file)):
            real = path.resolve()
            path.unlink(missing_ok=True)
            if real.is_relative_to(self.root):
                real.unlink(missing_ok=True)
        tqdm.write(f"{file.name}: the cached copy {problem}; removed, and fetched again", file=sys.stderr)

    def keep(self, file: HubFile) -> None:
        """Link a complete file into the snapshot."""
        if not (self.folder / file.name).exists():
            hf_hub_download(self._repo, file.name, revision=self._commit)  # finds it under its hash

    def finish(self) -> None:
        """Make the revision's name refer to this snapshot; until it is complete, it refers to an earlier one."""
        if self._revision != self._commit:
            ref = self._storage / "refs" / self._revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            replace_file(ref, self._commit, is_shared=True)


class _Folder:
    """A folder of the user's, with the methods of `_Cache`. Deletes and replaces no file that was there before."""

    names_content = False

    def __init__(self, folder: Path) -> None:
        self.root = self.folder = folder

    def target(self, file: HubFile) -> Path:
        return self.folder / file.name

    def partial(self, file: HubFile) -> Path:
        return self.folder / f"{file.name}.{file.etag[:16]}.incomplete"

    def find(self, file: HubFile) -> Path | None:
        return self.target(file) if self.target(file).exists() else None

    def discard(self, file: HubFile, problem: str) -> None:
        raise DownloadError(
            f"{self.target(file)}: {problem}; move or delete it, then run the same command again"
        )

    def keep(self, file: HubFile) -> None:
        pass  # it is in its place

    def finish(self) -> None:
        pass  # a folder has no revisions


def _check_space(what: str, place: _Cache | _Folder, files: Sequence[HubFile]) -> int:
    """Print and return the number of bytes to download, and refuse it where they do not fit."""
    missing_bytes = 0
    for file in files:
        path, partial = place.find(file), place.partial(file)
        if path is not None:
            problem = file.wrong_size(path.stat().st_size)
            if problem is None:
                continue
            place.discard(file, problem)
        if file.size > MAX_FILE_BYTES:
            raise DownloadError(
                f"{file.name} has {format_bytes(file.size)}, but this command fetches no file above "
                f"{format_bytes(MAX_FILE_BYTES)}; fetch it with `hf download`, then run this command again"
            )
        partial_bytes = partial.stat().st_size if partial.exists() else 0
        missing_bytes += file.size - (partial_bytes if partial_bytes <= file.size else 0)
    num_bytes = sum(file.size for file in files)
    free_bytes = shutil.disk_usage(
        next(path for path in (place.root, *place.root.parents) if path.exists())
    ).free
    print(
        f"{what}: {len(files)} files, {format_bytes(num_bytes)}; {format_bytes(num_bytes - missing_bytes)} here, "
        f"{format_bytes(missing_bytes)} to fetch, {format_bytes(free_bytes)} free at {place.root}",
        file=sys.stderr,
    )
    if missing_bytes > free_bytes:
        raise DownloadError(
            f"{what} needs {format_bytes(missing_bytes)} more ({missing_bytes:,} bytes), but {place.root} has "
            f"{format_bytes(free_bytes)} free ({free_bytes:,} bytes); make room, or name another disk with --to"
        )
    return missing_bytes


class _Run:
    """One download, shared by its threads: the place it goes to, and its progress bars."""

    def __init__(self, repo: str, commit: str, place: _Cache | _Folder, verify: bool) -> None:
        self._repo, self._commit, self._place, self._verify = repo, commit, place, verify
        # A compressed response has no known size, and cannot be resumed.
        self._headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        self.stop = threading.Event()
        self._fetched = self._checked = cast(Any, tqdm)(disable=True)

    @contextlib.contextmanager
    def progress(self, missing_bytes: int, files: Sequence[HubFile]) -> Iterator[None]:
        """Show the progress of downloading and checking these files, if stderr is a terminal."""
        check_bytes = sum(file.size for file in files if self._is_hashed(file, self._place.find(file)))
        bar = functools.partial(cast(Any, tqdm), unit="B", unit_scale=True, disable=None)
        with (
            bar(desc="fetched", total=missing_bytes) as self._fetched,
            bar(desc="checked", total=check_bytes) as self._checked,
        ):
            yield

    def _is_hashed(self, file: HubFile, path: Path | None) -> bool:
        return self._verify or not file.is_lfs or (path is not None and not self._place.names_content)

    def read(self, file: HubFile) -> bytes:
        """Return the content of a small file, from disk if it is there."""
        path = self._place.find(file)
        if path is not None and path.stat().st_size == file.size and self._problem(path, file) is None:
            return path.read_bytes()
        buffer = io.BytesIO()
        self._get(file, buffer, 0)
        return buffer.getvalue()

    def fetch(self, file: HubFile) -> None:
        """Make sure that a file is in its place and equals the hub's.

        Raises:
            DownloadError: it does not, or another process is downloading it.
        """
        place = self._place
        path = place.find(file)
        if path is not None:
            problem = self._problem(path, file) if self._is_hashed(file, path) else None
            if problem is None:
                place.keep(file)
                return
            place.discard(file, problem)
            self._fetched.total += file.size
            self._checked.total += file.size
        partial, target = place.partial(file), place.target(file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as out:
            lock(out.fileno(), DownloadError(f"{file.name}: another run is fetching it"))
            if out.tell() > file.size:
                out.truncate(0)
            problem = self._get(file, out, have=out.seek(0, os.SEEK_END))
            if problem is None and self._is_hashed(file, None):
                problem = self._problem(partial, file)
            if problem is not None:
                partial.unlink()
                raise DownloadError(f"{file.name}: what came {problem}; removed, run the same command again")
            put_in_place(out, partial, target)
        place.keep(file)

    def _get(self, file: HubFile, out: BinaryIO, have: int) -> str | None:
        """Append the rest of a file to `out`, which has its first `have` bytes; return what is wrong with its size.

        hf_hub_download would not do: its version 2 deletes what an interrupted process has downloaded. http_get, which
        it calls, requests only the rest, and retries a few times when the connection breaks.
        """
        url = hf_hub_url(self._repo, file.name, revision=self._commit)
        bar = cast(Any, _bar_class(self._fetched, self.stop))
        try:
            http_get(
                url, out, resume_size=have, headers=self._headers, expected_size=file.size, tqdm_class=bar,
                displayed_filename=file.name,
            )  # fmt: skip
        except HfHubHTTPError as error:
            if error.response.status_code != 416:
                raise
            return f"ends before byte {have:,}, but the hub says {file.size:,}"
        except OSError as error:
            if error.errno is not None:  # without a number: the response was too short or too long
                raise
        out.flush()
        return file.wrong_size(out.seek(0, os.SEEK_END))

    def _problem(self, path: Path, file: HubFile) -> str | None:
        """Return how a file's content differs from the hub's, if it does."""
        digest = hashlib.sha256() if file.is_lfs else hashlib.sha1(b"blob %d\0" % file.size)
        with open(path, "rb") as content:
            while data := content.read(1 << 22):
                if self.stop.is_set():
                    raise _Stopped
                digest.update(data)
                self._checked.update(len(data))
        if digest.hexdigest() == file.etag:
            return None
        kind = "SHA-256" if file.is_lfs else "git id"
        return f"has the {kind} {digest.hexdigest()[:16]}…, but the hub says {file.etag[:16]}…"


def _bar_class(bar: Any, stop: threading.Event) -> type:
    """Return a progress bar class for http_get that adds a file's progress to the bar of all files."""

    class _Part(contextlib.ExitStack):  # which does nothing on exit
        def __init__(self, **_: Any) -> None:
            super().__init__()

        def update(self, num_bytes: int) -> None:
            if stop.is_set():
                raise _Stopped
            bar.update(num_bytes)

    return _Part


class _Stopped(Exception):
    """Ends a thread after another's error or an interrupt."""


def _in_threads(fetch: Callable[[HubFile], None], files: Sequence[HubFile], stop: threading.Event) -> None:
    """Fetch all files, a few at a time; the first error ends the other threads and is raised.

    An interrupt is raised at once: the threads are daemons, and an incomplete file is a prefix of the whole.
    """
    todo: queue.SimpleQueue[list[HubFile]] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    # Files of equal content are one file in the cache, so one thread fetches them.
    twins: dict[str, list[HubFile]] = {}
    for file in files:
        twins.setdefault(file.etag, []).append(file)
    for group in twins.values():
        todo.put(group)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                group = todo.get_nowait()
                try:
                    for file in group:
                        fetch(file)
                    done.put(None)
                except BaseException as error:  # handed to the caller
                    done.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    try:
        errors = (done.get() for _ in twins)
        first = next((error for error in errors if error is not None), None)
    except KeyboardInterrupt:
        stop.set()
        raise
    stop.set()
    for thread in threads:
        thread.join()
    if first is not None:
        raise first
