"""lm-eval's generation options as `Settings`, and its model arguments of a swarm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slowllm.entrypoints.cli.swarm_options import choice_of
from slowllm.errors import InputError, first_line
from slowllm.inference.generation_types import Settings
from slowllm.swarm.weights import WEIGHTS_LETTERS

if TYPE_CHECKING:
    from slowllm.swarm.client import SwarmOptions

# Options of transformers' generation that `Settings` has as well.
OPTIONS = (
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "min_new_tokens",
)  # fmt: skip
# Model arguments of a swarm, with the names of the command line's options.
_SWARM_ARGUMENTS = (
    "allowed_peers", "blocked_peers", "timeout", "step_timeout", "replay", "token_file", "identity", "weights", "spot_check",
)  # fmt: skip


def swarm_options(swarm: str | Sequence[str] | None, arguments: dict[str, Any]) -> SwarmOptions | None:
    """Return how a swarm is used; None where none is named.

    Args:
        swarm: multiaddresses of peers, with + between them or as a list.
        arguments: of the model, as lm-eval reads them: what looks like a number is one. Those of a swarm are taken out; several
            ids have + between them.
    Raises:
        InputError: an argument cannot be used.
    """
    values = {name: arguments.pop(name) for name in _SWARM_ARGUMENTS if name in arguments}
    for name in ("token_file", "identity"):
        if name in values:
            values[name] = Path(str(values[name]))
    if isinstance(word := values.get("weights"), int):  # a word of decimal digits only
        values["weights"] = str(word).zfill(WEIGHTS_LETTERS)
    for name, texts in (
        ("swarm", swarm),
        *((name, values.get(name)) for name in ("allowed_peers", "blocked_peers")),
    ):
        if texts:
            values[name] = texts.split("+") if isinstance(texts, str) else list(texts)
    return choice_of(values, "").to_options()


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
