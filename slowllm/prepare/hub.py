"""List a repository's files on the hub, with sizes and hashes, and choose those that streaming needs.

huggingface_hub does the requests and the authentication. Writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from slowllm.errors import CheckpointError, DownloadError, InputError, SlowLLMError
from slowllm.storage.checkpoint import INDEX
from slowllm.storage.gguf_files import SUFFIX, names_of_set

SINGLE = "model.safetensors"
SMALL_FILES = (
    "config.json", "hf_quant_config.json", "generation_config.json", INDEX,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# The base of the errors of httpx or httpx2, whichever this huggingface_hub uses.
_TransportError: type[BaseException] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub.

    Attributes:
        name: in the repository, with ``/`` between folders.
        size: in bytes.
        etag: the SHA-256 of a file stored with LFS (64 digits), the git id of any other (40).
    """

    name: str
    size: int
    etag: str

    @property
    def is_lfs(self) -> bool:
        """Whether it is stored with LFS, as shards are."""
        return len(self.etag) == 64

    def wrong_size(self, num_bytes: int) -> str | None:
        """Return what is wrong with a file of this size, if anything is."""
        return None if num_bytes == self.size else f"has {num_bytes:,} bytes, but the hub says {self.size:,}"


def list_files(repo: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """Return the commit of a revision, and its files by name.

    Raises:
        InputError: this cannot be the id of a model.
        DownloadError: the answer is not that of a hub.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
        commit, listing = info.sha or "", {}
        for entry in info.siblings or []:
            etag = (entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""
            size = entry.lfs.size if entry.lfs else entry.size
            # Hashes become file names: anything else could be a path to elsewhere.
            if size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
                raise ValueError(f"no size or no hash of {entry.rfilename}")
            listing[entry.rfilename] = HubFile(entry.rfilename, size, etag)
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError("no commit")
    except HFValidationError as error:
        raise InputError(f"{repo!r} is not the id of a model; write it like bigscience/bloom") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DownloadError(
            f"{constants.ENDPOINT}: does not answer as the hub does ({error}); is a login page or a proxy between?"
        ) from error
    return commit, listing


def choose(
    repo: str, listing: Mapping[str, HubFile], read: Callable[[HubFile], bytes], gguf: str | None = None
) -> list[HubFile]:
    """Return the files that streaming needs, small ones first.

    Args:
        repo: its id, for messages.
        listing: every file of the repository, by name.
        read: returns the content of a file; called only for the index of the shards.
        gguf: name of the GGUF file that is wanted, of a set any.
    Raises:
        CheckpointError: the repository has no model in safetensors, and no GGUF file or several models of which none is named.
    """
    if gguf is not None or (INDEX not in listing and SINGLE not in listing and _gguf_models(listing)):
        return _choose_gguf(repo, listing, gguf)
    if "config.json" not in listing:
        raise CheckpointError(f"{repo}: has no config.json, so it is not a transformers model")
    shards = [SINGLE]
    if INDEX in listing:
        shards = _shard_names(repo, read(listing[INDEX]))
    elif SINGLE not in listing:
        if any(fnmatchcase(name, pattern) for name in listing for pattern in PICKLES):
            raise CheckpointError(
                f"{repo}: has only pickled weights, which are never loaded here because a pickle can run code; "
                "name a --revision that has safetensors, or convert it with save_pretrained()"
            )
        raise CheckpointError(f"{repo}: has neither {SINGLE} nor {INDEX}")
    for name in shards:
        if name not in listing or "/" in name:
            raise CheckpointError(f"{repo}: {INDEX} names {name!r}, which is not a file beside it")
    small = [file for name, file in sorted(listing.items()) if is_small(name)]
    return small + [listing[name] for name in shards]


def _gguf_models(listing: Mapping[str, HubFile]) -> dict[str, list[str]]:
    """Return the names of each GGUF model's files, by the first of them, without those of vision towers."""
    models: dict[str, list[str]] = {}
    for name in sorted(name for name in listing if name.endswith(SUFFIX)):
        if not PurePosixPath(name).name.startswith("mmproj"):
            names = names_of_set(name)
            models[names[0]] = names
    return models


def _choose_gguf(repo: str, listing: Mapping[str, HubFile], gguf: str | None) -> list[HubFile]:
    """Return the files of one GGUF model."""
    models = _gguf_models(listing)
    chosen = [names for names in models.values() if gguf in (*names, None)]
    if len(chosen) != 1:
        there = ", ".join([*models][:8]) + (" and others" if len(models) > 8 else "")
        if gguf is not None:
            raise CheckpointError(f"{repo}: has no GGUF file {gguf!r}; there are {there or 'none'}")
        raise CheckpointError(f"{repo}: has {len(models)} GGUF models ({there}); choose one with --gguf FILE")
    if missing := [name for name in chosen[0] if name not in listing]:
        raise CheckpointError(f"{repo}: has no {missing[0]}, which belongs to {chosen[0][0]}")
    return [listing[name] for name in chosen[0]]


def is_small(name: str) -> bool:
    """Whether a file is one of those beside the weights that streaming needs: config, tokenizer and so on."""
    # The star of fnmatch does not stop at a slash.
    return any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in SMALL_FILES)


def _shard_names(repo: str, index: bytes) -> list[str]:
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names = set(json.loads(index)["weight_map"].values())
        if names and all(isinstance(name, str) for name in names):
            return sorted(names)
    raise CheckpointError(f"{repo}: {INDEX} has no weight_map of tensor names to file names")


@contextlib.contextmanager
def one_sentence(repo: str, revision: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub and the system during a download into a sentence that says what to do.

    Raises:
        DownloadError: the hub cannot be reached or refuses, or a file cannot be written.
    """
    hub = constants.ENDPOINT
    try:
        yield
    except SlowLLMError:
        raise
    except KeyboardInterrupt:
        print(
            "slowllm: interrupted; what has arrived is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        raise
    except (_TransportError, OSError) as error:
        problem = f"no connection to {hub} ({error}); what has arrived is kept, run the same command again"
        if isinstance(error, GatedRepoError):  # also a RepositoryNotFoundError, and both are HfHubHTTPErrors
            problem = (
                f"is gated: ask for access at {hub}/{repo}, then log in with `hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, RepositoryNotFoundError):
            problem = (
                f"no such model at {hub}, or a private one; check the name, or log in with `hf auth login`"
            )
        elif isinstance(error, RevisionNotFoundError):
            problem = f"has no revision {revision!r}"
        elif isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
            problem = (
                f"{hub} answered with error {status}; {login if status in (401, 403) else 'try again later'}"
            )
        elif isinstance(error, OfflineModeIsEnabled):
            problem = "HF_HUB_OFFLINE is set, so nothing can be fetched; unset it"
        elif not isinstance(error, _TransportError):
            where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            reason = getattr(error, "strerror", None) or error
            problem = f"{where}{reason}; what has arrived is kept, run the same command again"
        raise DownloadError(f"{repo}: {problem}") from error
