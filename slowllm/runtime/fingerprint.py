"""What is one model's and no other's: a hash of its config and of its weights, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slowllm.storage.checkpoint import Checkpoint


def fingerprint_of(
    config: Any, checkpoint: Checkpoint, hashes: Mapping[int, str] | None = None, *, of_source: bool = False
) -> str:
    """Return a hash of a checkpoint: its config, every span, and samples of every shard.

    Args:
        config: transformers' config of the model.
        checkpoint: whose weights they are.
        hashes: of blocks that other machines hold, and whose shards are not here.
        of_source: hash the checkpoint that a store was made from. An exact store has its source's hash anyway.
    Returns:
        64 hexadecimal digits.
    """
    # The compute dtype and the folder are no part of the checkpoint.
    values = {**config.to_dict(), "dtype": None, "_name_or_path": None}
    # Which a store of it has not.
    if (values.get("quantization_config") or {}).get("quant_method") == "gguf":
        del values["quantization_config"]
    if hashes is not None:
        values["hashes of blocks"] = sorted(hashes.items())
    return checkpoint.fingerprint(json.dumps(values, sort_keys=True, default=str), of_source=of_source)
