"""Open a client of a swarm for Petals' classes, and find what its blocks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from slowllm.modeling.remote_spans import Remote
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.client import open_client
from slowllm.swarm.petals.client_config import Call
from slowllm.swarm.petals.config import check_family


def open_ends(call: Call, kind: type[Any] | None = None) -> StreamedLM:
    """Open what is outside the blocks of a checkpoint, and join the swarm that has its blocks.

    Args:
        call: of `from_pretrained`.
        kind: a class for one family, which is refused for others before anything is opened.
    Raises:
        InputError: an option cannot be used, or the checkpoint is of another family.
        CheckpointError: the ends are not in the folder.
        NetworkError: the swarm cannot be joined, or lacks blocks.
    """
    options = call.client.swarm_options()
    info = ModelInfo(call.model)
    if kind is not None:
        check_family(kind, info.config)
    return open_client(StreamedLM, info, options, **call.load_options)


def remote_of(lm: StreamedLM) -> Remote:
    """Return what the remote blocks of a client share."""
    remote: Remote = lm.layout.blocks[0]._remote  # type: ignore[assignment]
    return remote


@contextlib.contextmanager
def closed_on_error(lm: StreamedLM) -> Iterator[None]:
    """Close a client where what is made of it fails."""
    try:
        yield
    except BaseException:
        lm.close()
        raise
