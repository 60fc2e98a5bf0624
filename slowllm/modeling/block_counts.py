"""How many blocks may a description of a model name? Asked before transformers makes a list of that length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slowllm.errors import CheckpointError

# A config that names more is damaged; making them all would take hours.
MAX_BLOCKS = 10_000
# As families call the number of blocks.
_NAMES = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Configs of several models hold those of the parts.
_DEEPEST = 3


def refuse_many_blocks(where: object, table: Mapping[str, Any], depth: int = 0) -> None:
    """Refuse a config with more than `MAX_BLOCKS` blocks: many configs make a list with an entry for each.

    Args:
        where: the file, for messages.
        table: the config as it is in the file, before transformers has read it; those of parts are in it.
        depth: of this table in that of the file.
    Raises:
        CheckpointError: it names more.
    """
    for name, value in table.items():
        if name in _NAMES and isinstance(value, int | float) and value > MAX_BLOCKS:
            raise CheckpointError(
                f"{where}: names {value:,} blocks ({name}); there are at most {MAX_BLOCKS:,}"
            )
        if isinstance(value, Mapping) and depth < _DEEPEST:
            refuse_many_blocks(where, value, depth + 1)
