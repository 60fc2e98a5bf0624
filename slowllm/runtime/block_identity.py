"""Hashes by which machines that hold parts of a model find out whether these are parts of the same model.

A block's hash is that of its parameters under their names in the model, so it depends neither on shards nor on the
names in a checkpoint; an exact store has the hashes of its source. It costs a few reads of 512 bytes a tensor.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from slowllm.errors import InputError
from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.parameter_map import place
from slowllm.modeling.parts import Part, block_of
from slowllm.modeling.skeleton import build_skeleton, read_config
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.samples import hash_tensors
from slowllm.storage.spans import Placement

# Of a config: where it lies, who wrote it, and how it is computed with.
_NO_IDENTITY = {
    "_name_or_path",
    "architectures",
    "dtype",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}


def block_hash(source: StreamedLM | Checkpoint, number: int) -> str:
    """Return the hash of one block; see `block_hashes`."""
    return block_hashes(source, [number])[number]


def block_hashes(source: StreamedLM | Checkpoint, numbers: Iterable[int]) -> dict[int, str]:
    """Return the hash of each of some blocks, hexadecimal.

    Two blocks have the same hash if their parameters have the same names in the model, shapes and dtypes as stored, and
    the same values where these are sampled. A store with loss has other hashes than its source.

    Args:
        source: a model that is open, the whole or a part, or a checkpoint, some of whose shards may be absent.
        numbers: of the blocks.
    Raises:
        InputError: the source does not have one of them.
        CheckpointError: a parameter is missing, or a shard has changed since it was opened.
    """
    wanted = sorted(set(numbers))
    if not wanted:
        return {}
    if wanted[0] < 0:
        raise InputError(f"{wanted[0]} is no number of a block; they are counted from 0")
    checkpoint, blocks_name, placements = _placed(source, wanted)
    hashes = {}
    for number in wanted:
        block = {name: p for name, p in placements.items() if block_of(name, blocks_name) == number}
        if not block:
            raise InputError(f"block {number} is not in this part of the model")
        hashes[number] = hash_tensors(checkpoint, block)
    return hashes


def ends_hash(source: StreamedLM | Checkpoint) -> str:
    """Return the hash of a model's config and of all tensors outside its blocks, hexadecimal.

    Args:
        source: a model that is open, the whole or its ends, or a checkpoint that has the ends.
    Raises:
        InputError: the source does not have the ends.
        CheckpointError: a tensor is missing, or a shard has changed since it was opened.
    """
    if isinstance(source, StreamedLM):
        if not source.part.has_ends:
            raise InputError(
                f"{source.name}: this part of the model has {source.part}, but not what is outside"
            )
        model: PreTrainedModel = source.model
        blocks_name, placements, checkpoint = (
            source.layout.blocks_name,
            source.layout.placements,
            source.checkpoint,
        )
    else:
        model, checkpoint = _skeleton(source), source
        blocks_name, blocks = find_blocks(model)
        placements = place(model, source.spans, Part.ends(len(blocks)), source.absent)
    outside: dict[str, Placement] = {}
    tied = model.all_tied_weights_keys
    # A checkpoint may have tied tensors under either name, or both.
    for name, placement in sorted(placements.items(), key=lambda item: item[0] in tied):
        if block_of(name, blocks_name) is None:
            outside.setdefault(tied.get(name, name), placement)
    config = json.dumps(_identity(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(f"{config}\n{hash_tensors(checkpoint, outside)}".encode()).hexdigest()


def config_hash(config: Any) -> str:
    """Return the hash of a model's config, hexadecimal, without where it lies and how it is computed with."""
    text = json.dumps(_identity(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _placed(
    source: StreamedLM | Checkpoint, wanted: Sequence[int]
) -> tuple[Checkpoint, str, Mapping[str, Placement]]:
    """Return the checkpoint, the name of the list of blocks, and where the tensors of some of them lie."""
    if isinstance(source, StreamedLM):
        Part.span(wanted[0], wanted[-1] + 1).check(len(source.layout.blocks))
        return source.checkpoint, source.layout.blocks_name, source.layout.placements
    model = _skeleton(source)
    placements: dict[str, Placement] = {}
    # Neighbours together: each call of `place` goes through all names of the checkpoint.
    for _, group in itertools.groupby(enumerate(wanted), lambda item: item[1] - item[0]):
        numbers = [number for _, number in group]
        placements |= place(model, source.spans, Part.span(numbers[0], numbers[-1] + 1), source.absent)
    return source, find_blocks(model)[0], placements


def _skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    return build_skeleton(read_config(checkpoint.folder), checkpoint.folder, torch.bfloat16)


def _identity(config: Any) -> Any:
    """Return what of a config, or of one inside it, tells one model from another."""
    if isinstance(config, dict):
        return {str(key): _identity(value) for key, value in config.items() if key not in _NO_IDENTITY}
    return config
