"""The arguments of lm-eval's command line, and the hub shut off, before anything of lm-eval is imported.

huggingface_hub and datasets read whether they are offline as they are imported, so nothing heavy is imported here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from slowllm.errors import InputError

ALLOW_DOWNLOADS = "--allow-downloads"
MODEL = "slowllm"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def stay_offline(arguments: Sequence[str]) -> list[str]:
    """Shut off the hub for this process, unless the arguments allow downloads; return them without that switch.

    To be called before transformers, datasets or lm-eval are imported.
    """
    if ALLOW_DOWNLOADS not in arguments:
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    return [argument for argument in arguments if argument != ALLOW_DOWNLOADS]


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of lm-eval's command line with slowllm's model among them.

    Raises:
        InputError: they name another model, or none for slowllm to open.
    """
    arguments = list(arguments)
    names = {argument.partition("=")[0] for argument in arguments}
    has_config = bool(names & {"--config", "-C"})
    runs = bool(names & {"--tasks", "-t"}) or has_config
    if not runs or arguments[0] in ("ls", "validate") or names & {"-h", "--help"}:
        return arguments
    models = list(values_of(arguments, "--model", "-M"))
    for model in models:
        if model != MODEL:
            raise InputError(
                f"--model {model}: `slowllm eval lm` runs slowllm's own model only; leave --model out, or run other "
                "backends with lm-eval itself"
            )
    given = [*values_of(arguments, "--model_args", "-a")]
    if not has_config and not any(
        re.search(r"(^|[,{\s\"'])pretrained[\"']?\s*[=:]", value) for value in given
    ):
        raise InputError("no model is named; give its folder with --model_args pretrained=DIR")
    if not models:
        arguments += ["--model", MODEL]
        if "--device" not in names and not has_config:
            arguments += ["--device", "cpu"]  # lm-eval would name a GPU by itself
    return arguments


def values_of(arguments: Sequence[str], name: str, letter: str) -> Iterator[str]:
    """Yield what follows an option, up to the next one: lm-eval takes several values behind some."""
    is_inside = False
    for argument in arguments:
        if argument.startswith(f"{name}="):
            yield argument.partition("=")[2]
        elif argument in (name, letter):
            is_inside = True
            continue
        elif is_inside and not argument.startswith("-"):
            yield argument
            continue
        elif argument.startswith(letter) and not argument.startswith("--"):
            yield argument[len(letter) :].removeprefix("=")
        is_inside = False
