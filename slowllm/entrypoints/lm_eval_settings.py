"""lm-eval's generation options as `Settings`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slowllm.errors import InputError, first_line
from slowllm.inference.generation_types import Settings

# Options of transformers' generation that `Settings` has as well.
OPTIONS = (
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "min_new_tokens",
)  # fmt: skip


def checkpoint_options(folder: Path) -> dict[str, Any]:
    """Return the options that a checkpoint's generation_config.json sets."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)})") from error
    return {name: config[name] for name in OPTIONS if config.get(name) is not None}


def settings_of(
    options: Mapping[str, Any], defaults: Mapping[str, Any], max_new_tokens: int, until: list[str]
) -> Settings:
    """Return the settings of a request.

    Args:
        options: of the request, apart from its limit and its stop strings.
        defaults: from `checkpoint_options`, for what the request leaves open.
        max_new_tokens: the limit.
        until: the stop strings.
    """
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise InputError(
            f"generation option {', '.join(unknown)} is not supported; there are until, max_gen_toks, "
            f"{', '.join(OPTIONS)}"
        )
    given = {**defaults, **options}
    if not given.get("do_sample"):
        for name in ("temperature", "top_k", "top_p"):
            given.pop(name, None)
    else:
        # From torch's generator, which lm-eval seeds: repeated requests get other tokens, repeated runs the same.
        given["seed"] = int(torch.randint(1 << 62, ()))
    return Settings(max_new_tokens=max_new_tokens, stop=tuple(stop for stop in until if stop), **given)
