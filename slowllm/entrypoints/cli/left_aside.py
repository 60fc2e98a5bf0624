"""Which settings of a checkpoint's generation_config.json are not used when its prompts are continued."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from slowllm.files import shown

if TYPE_CHECKING:
    from slowllm.runtime.description import ModelInfo

# Settings that are used, or that say nothing about tokens; and values without an effect.
_USED_SETTINGS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache",
}  # fmt: skip
_NEUTRAL: tuple[object, ...] = (None, False, 0, 1, "", [], {})


def name_settings_left_aside(info: ModelInfo) -> None:
    """Print which settings of the checkpoint's generation_config.json are not used, if there are any.

    Raises:
        CheckpointError: the file cannot be read.
    """
    from slowllm.storage.checkpoint import read_json

    file = info.folder / "generation_config.json"
    own = read_json(file) if file.is_file() else {}
    # True is equal to 1, but has an effect.
    aside = {
        name: value
        for name, value in sorted(own.items())
        if name not in _USED_SETTINGS and (value is True or value not in _NEUTRAL)
    }
    if aside:
        named = ", ".join(f"{name}={shown(value)}" for name, value in aside.items())
        print(f"{file.name} of {info.name} is left aside but for EOS and padding: {named}", file=sys.stderr)
