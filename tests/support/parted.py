"""Checkpoints with a shard for each block and one for the rest, and ways of calls that cross a part of a model."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from slowllm.storage.checkpoint import INDEX, read_weight_map
from slowllm.streaming.way import StopForward, Way

OUTSIDE = "outside.safetensors"
_IN_BLOCK = re.compile(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    shards = set((read_weight_map(folder / INDEX) or {"": "model.safetensors"}).values())
    return {name: tensor for shard in sorted(shards) for name, tensor in load_file(folder / shard).items()}


def shard_of(block: int) -> str:
    """The name of a block's shard."""
    return f"block-{block}.safetensors"


def write(folder: Path, out: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors beside a copy of a checkpoint's small files, a shard for each block and one for the rest."""
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, out / path.name)
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        # A tower has blocks of its own, which are outside those of the text model.
        block = None if "vision" in name else _IN_BLOCK.search(name)
        groups[shard_of(int(block[1])) if block else OUTSIDE][name] = tensor
    for shard, group in groups.items():
        save_file(group, out / shard, {"format": "pt"})
    weight_map = {name: shard for shard, group in groups.items() for name in group}
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def parted(folder: Path, out: Path, *keep: str) -> Path:
    """Copy a checkpoint with a shard for each block, and keep only the shards named; all where none is named."""
    write(folder, out, tensors_of(folder))
    for path in out.glob("*.safetensors"):
        if keep and path.name not in keep:
            path.unlink()
    return out


class Inside(Way):
    """Blocks below `first` return a known output; nothing behind `end - 1` is computed."""

    def __init__(self, first: int, end: int, known: Any) -> None:
        self.first, self.end, self.known, self.output = first, end, known, None

    def output_of(self, block: int) -> Any:
        return self.known if block < self.first else None

    def pass_block(self, block: int, output: Any) -> None:
        if block == self.end - 1:
            self.output = output
            raise StopForward


class Known(Way):
    """All blocks have been computed elsewhere."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def output_of(self, block: int) -> Any:
        return self.output
