"""Which list of a model is the list of its blocks?

Knows transformers' models by their parts; reads no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slowllm.errors import ArchitectureError


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's blocks.

    Raises:
        ArchitectureError: there is not one list of blocks, or blocks share weights.
    """
    family = type(model).__name__
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Lists inside a block (experts, per-head norms) may be as long.
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) > 1:  # a vision tower may be as deep as the text model
        outer = [(n, m) for n, m in outer if type(_config_above(model, n)) is type(config)] or outer
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise ArchitectureError(
            f"{family}: its {count} blocks should stand in one ModuleList, but the lists of that length are: {names}"
        )
    name, blocks = outer[0]
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise ArchitectureError(
                    f"{family}: blocks {owners[id(parameter)]} and {index} share weights, so a block is no stop of its own"
                )
    return name, blocks


def _config_above(model: PreTrainedModel, name: str) -> Any:
    """Return the config of the innermost model that a module is in."""
    modules = (model, *map(model.get_submodule, prefixes_of(name)))
    return [module.config for module in modules if hasattr(module, "config")][-1]


def prefixes_of(name: str) -> Iterator[str]:
    """Yield the names of the modules that a module is in, the outermost first."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])
