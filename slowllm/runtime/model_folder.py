"""Find the folder of a checkpoint by what a user calls it: a path, a hub id in the local cache, an embedded model.

Imports neither torch nor transformers, so that a wrong name is refused before they are loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from slowllm.errors import CheckpointError, InputError
from slowllm.storage.gguf_files import SUFFIX

# Before the name of a model that comes with the package; no hub id has a colon.
EMBEDDED = "embedded:"
# What the command line opens where no model is named.
DEFAULT = f"{EMBEDDED}tiny-bloom"


def find_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint, or its GGUF file: as given, or a hub id's snapshot in the local cache.

    Behind a hub id, ``@`` and a revision may stand: a branch, a tag or a commit. ``embedded:`` stands before the name of
    a model that comes with the package.

    Raises:
        CheckpointError: neither is there.
        InputError: this is no name.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise InputError(
            f"a model is given by its folder or hub id, not as {type(path_or_hub_id).__name__}; the embedded one is "
            f"called {DEFAULT}"
        )
    text = str(path_or_hub_id)
    if not text:
        raise CheckpointError("the name of the model is empty")
    try:
        folder = Path(path_or_hub_id).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, a folder without permission, no such home
        raise CheckpointError(f"{text}: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        return folder
    if exists and folder.suffix == SUFFIX:
        return folder
    if exists:
        raise CheckpointError(
            f"{text}: is a file; give the folder that holds config.json and the safetensors, or a GGUF file, whose name ends "
            f"in {SUFFIX}"
        )
    if folder.suffix == SUFFIX:
        target = (
            f"is a link to {os.readlink(folder)}, which is not there"
            if folder.is_symlink()
            else "no such file"
        )
        raise CheckpointError(f"{text}: {target}")
    if text.startswith(EMBEDDED):
        return _embedded_folder(text.removeprefix(EMBEDDED))
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text}: no such folder")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    hub_id, _, revision = text.partition("@")
    try:
        # Without a pattern, the hub's client refuses a snapshot that was fetched in part, such as one without pickles.
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision or None, local_files_only=True, allow_patterns=["config.json"]
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError) as error:
        commit = _commit_of(hub_id, revision or "main")
        if commit is not None:
            return commit
        if others := _revisions(hub_id):
            raise CheckpointError(
                f"{text}: this revision is not in the Hugging Face cache, which has {', '.join(others)}; name one of "
                f"them as {hub_id}@REVISION"
            ) from error
        raise CheckpointError(
            f"{text}: no such folder, and no such model in the Hugging Face cache; "
            f"if it is a hub id, fetch it with `slowllm download {hub_id}`"
        ) from error


def _embedded_folder(name: str) -> Path:
    """Return the folder of a small model that comes with the package."""
    package = Path(__file__).resolve().parents[1]
    for weights in (package / "weights", package.parent / "weights"):
        if weights.is_dir():
            names = sorted(folder.name for folder in weights.iterdir() if (folder / "config.json").is_file())
            if name in names:
                return weights / name
            raise CheckpointError(f"{EMBEDDED}{name}: no such embedded model; there are {', '.join(names)}")
    raise CheckpointError(f"{EMBEDDED}{name}: this installation has no embedded models; name another one")


def _cached(hub_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"


def _commit_of(hub_id: str, name: str) -> Path | None:
    """Return the snapshot of a branch or tag whose file was written by hand, with a newline at its end."""
    try:
        commit = (_cached(hub_id) / "refs" / name).read_text(encoding="utf-8").strip()
        folder = _cached(hub_id) / "snapshots" / commit
        return folder if commit and (folder / "config.json").exists() else None
    except (OSError, ValueError):
        return None


def _revisions(hub_id: str) -> list[str]:
    """Return the branches, tags and commits of a model that the Hugging Face cache has."""
    snapshots, refs = _cached(hub_id) / "snapshots", _cached(hub_id) / "refs"
    try:
        commits = sorted(path.name for path in snapshots.iterdir() if (path / "config.json").exists())
        names = sorted(
            str(path.relative_to(refs))
            for path in (refs.rglob("*") if refs.is_dir() else ())
            if path.is_file() and path.read_text().strip() in commits
        )
    except (OSError, ValueError):
        return []
    return [*names, *commits][:9]
