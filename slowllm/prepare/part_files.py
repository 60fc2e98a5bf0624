"""Which of a repository's shards does a part of its model need?

Knows the model by its config and its tensors by the index; downloads nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from slowllm.errors import CheckpointError, InputError, SlowLLMError, counted
from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.parameter_map import names_of_part, place
from slowllm.modeling.parts import Part, parse_blocks
from slowllm.modeling.skeleton import build_skeleton, read_config
from slowllm.prepare.hub import HubFile
from slowllm.storage.checkpoint import INDEX, Checkpoint, read_weight_map


@dataclass(frozen=True)
class PartFiles:
    """The files of a part.

    Attributes:
        part: of the model.
        name: of the part, in words.
        files: that it needs, small ones first.
        model: its skeleton.
    """

    part: Part
    name: str
    files: tuple[HubFile, ...]
    model: PreTrainedModel

    def check(self, folder: Path) -> None:
        """Check that a folder has everything that the part needs.

        Raises:
            CheckpointError: a parameter is missing, or a shard is damaged.
        """
        with Checkpoint.open(folder, may_lack_shards=True) as checkpoint:
            place(self.model, checkpoint.spans, self.part, checkpoint.absent)


def files_of_part(
    repo: str,
    files: Sequence[HubFile],
    read: Callable[[HubFile], bytes],
    *,
    blocks: str | None,
    ends: bool,
) -> PartFiles:
    """Choose from the files of a whole model those of a part.

    Args:
        repo: its id, for messages.
        files: from `hub.choose`.
        read: returns the content of a file; called for the config and the index.
        blocks: such as ``8:16``, None for no blocks.
        ends: whether what is outside the blocks is wanted.
    Raises:
        InputError: these are no blocks of the model.
        CheckpointError: its config or index cannot be used.
        ArchitectureError: this version of transformers does not know the model type, or it has no list of blocks.
    """
    by_name = {file.name: file for file in files}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("config.json", INDEX):
            if name in by_name:
                (folder / name).write_bytes(read(by_name[name]))
        try:
            weight_map = read_weight_map(folder / INDEX)
            model = build_skeleton(read_config(folder), folder, torch.bfloat16)
        except SlowLLMError as error:
            raise type(error)(str(error).replace(made, repo)) from error
    num_blocks = len(find_blocks(model)[1])
    part = _part(blocks, num_blocks, ends=ends)
    name = f"{part} (of {counted(num_blocks, 'block')})"
    if weight_map is None:  # one file has everything
        return PartFiles(part, name, tuple(files), model)
    shards = {weight_map[tensor] for tensor in names_of_part(model, weight_map, part)}
    if not shards:
        raise CheckpointError(f"{repo}: {INDEX} names no tensor of {part}")
    others = set(weight_map.values()) - shards
    return PartFiles(part, name, tuple(file for file in files if file.name not in others), model)


def _part(blocks: str | None, num_blocks: int, *, ends: bool) -> Part:
    if blocks is None:
        return Part.ends(num_blocks)
    span = parse_blocks(blocks, num_blocks)
    if not isinstance(span, Part):
        raise InputError(
            f"--blocks {blocks} is a number of blocks; say which, such as 0:{blocks}"
            if isinstance(span, int)
            else f"--blocks {blocks} is for servers; say which blocks, such as 0:8"
        )
    return Part(span.first, span.end, has_ends=ends)
