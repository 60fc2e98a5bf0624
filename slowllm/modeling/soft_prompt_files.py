"""Soft prompts in folders: in PEFT's own format where PEFT has the kind, so that each can use the other's prompts.

A folder has adapter_config.json and adapter_model.safetensors, as PEFT writes them; for a deep prompt, which PEFT does
not have, soft_prompt.safetensors instead. Beside them slowllm.json says which model it was made for and how.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from slowllm.errors import InputError, first_line
from slowllm.files import lock, read_description, replace_file, shown, system_errors
from slowllm.modeling.soft_prompts import SoftPrompt

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEEP_WEIGHTS, ABOUT = "soft_prompt.safetensors", "slowllm.json"
FILES = (CONFIG, WEIGHTS, DEEP_WEIGHTS, ABOUT)
_KEY = "prompt_embeddings"  # PEFT's
# Values of PEFT's config that are used here, name things, or count only while a prompt is tuned.
_KNOWN_VALUES = {
    "peft_type", "task_type", "num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens", "inference_mode",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "tokenizer_name_or_path", "tokenizer_kwargs",
    "prompt_tuning_init", "prompt_tuning_init_text", "prefix_projection", "encoder_reparameterization_type",
    "encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "init_weights",
}  # fmt: skip
# What a damaged folder may raise.
_UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, RuntimeError, ArithmeticError)


def save_prompt(prompt: SoftPrompt, folder: Path, base_model: str, about: Mapping[str, Any]) -> None:
    """Write a prompt, each file as a whole; remove files of another kind of prompt.

    Args:
        prompt: in fp32.
        folder: made where it is missing.
        base_model: name or folder of the model, for PEFT.
        about: what else to write as JSON, the model's `fingerprint` among it.
    Raises:
        InputError: the folder cannot be written.
    """
    tensors, config = _as_files(prompt)
    with system_errors(InputError, folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / (WEIGHTS if config else DEEP_WEIGHTS), save(tensors))
        if config:
            config["base_model_name_or_path"] = base_model
            replace_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))
        for name in {DEEP_WEIGHTS} if config else {CONFIG, WEIGHTS}:
            (folder / name).unlink(missing_ok=True)
        about = {"kind": prompt.kind, "num_tokens": prompt.num_tokens, **about}
        replace_file(folder / ABOUT, json.dumps(about, indent=1))


@contextlib.contextmanager
def check_folder(folder: Path, *, is_shared: bool) -> Iterator[None]:
    """Lock a folder for prompts, and refuse one that cannot be used, before hours are spent.

    Args:
        folder: made where it is missing.
        is_shared: whether each prompt gets a folder of its own in it.
    Raises:
        InputError: it cannot be written to, another run writes to it, it holds another prompt, or PEFT is missing.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError("prompts are written in PEFT's format: pip install peft") from error
    if folder.is_file():
        raise InputError(f"{folder}: is a file; a prompt is a folder of files, so name a folder")
    with system_errors(InputError, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        locked = os.open(folder, os.O_RDONLY)
    try:
        with system_errors(InputError, folder):
            lock(locked, InputError(f"{folder}: another run writes its prompt there"))
        if not is_shared and any(
            (inner / name).exists() for inner in folder.iterdir() if inner.is_dir() for name in FILES
        ):
            raise InputError(
                f"{folder}: holds the prompts of several trials of an earlier run; name another folder"
            )
        if is_shared and any((folder / name).exists() for name in FILES):
            raise InputError(
                f"{folder}: holds a prompt of an earlier run, but of several trials each has a folder of its own; name "
                "another folder"
            )
        yield
    finally:
        os.close(locked)


def _as_files(prompt: SoftPrompt) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a prompt by name, and PEFT's config; an empty one where PEFT does not have the kind."""
    import peft

    if prompt.kind == "deep":
        assert prompt.embeddings is not None, "a deep prompt has embeddings"
        zeros = torch.zeros_like(prompt.embeddings)
        vectors = torch.stack([zeros if vector is None else vector.detach() for vector in prompt.vectors])
        return {"embeddings": prompt.embeddings.detach().contiguous(), "vectors": vectors}, {}
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "inference_mode": True, "num_virtual_tokens": prompt.num_tokens,
        "num_transformer_submodules": 1,
    }  # fmt: skip
    if prompt.kind == "shallow":
        assert prompt.embeddings is not None, "a shallow prompt has embeddings"
        weights = prompt.embeddings.detach()
        shallow = peft.PromptTuningConfig(**common, token_dim=weights.shape[1])
        return {_KEY: weights.contiguous()}, _as_json(shallow)
    _, heads, length, head_dim = prompt.pairs[0].shape
    # (N, 2, heads, P, head_dim) to (P, N, 2, heads, head_dim): PEFT keeps all blocks of a virtual token in one row.
    stacked = torch.stack([pair.detach() for pair in prompt.pairs]).permute(3, 0, 1, 2, 4)
    prefix = peft.PrefixTuningConfig(
        **common, num_layers=len(prompt.pairs), num_attention_heads=heads, token_dim=heads * head_dim
    )
    return {_KEY: stacked.reshape(length, -1).contiguous()}, _as_json(prefix)


def _as_json(config: Any) -> dict[str, Any]:
    as_json: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    return as_json


def load_prompt(folder: str | os.PathLike[str]) -> tuple[SoftPrompt, dict[str, Any]]:
    """Read a prompt, ours or PEFT's, and what slowllm.json says about it.

    Raises:
        InputError: the folder has none, or one that is damaged or of an unknown kind.
    """
    if not str(folder):
        raise InputError("the name of the soft prompt is empty; --prompt takes its folder")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; --prompt takes the folder of a soft prompt")
    about = _read_json(path / ABOUT) if (path / ABOUT).is_file() else {}
    try:
        if (path / CONFIG).is_file():
            return _finite(_from_peft(_read_json(path / CONFIG), path)), about
        if (path / DEEP_WEIGHTS).is_file():
            tensors = load_file(path / DEEP_WEIGHTS)
            embeddings, vectors = tensors["embeddings"].float(), tensors["vectors"].float()
            if embeddings.dim() != 2 or not len(embeddings) or vectors.shape[1:] != embeddings.shape:
                raise ValueError("its tensors do not go together")
            return _finite(SoftPrompt("deep", embeddings, tuple(vectors))), about
    except KeyError as error:
        raise InputError(f"{path}: is no soft prompt that can be read (it has no {error})") from error
    except _UNREADABLE as error:
        raise InputError(f"{path}: is no soft prompt that can be read ({first_line(error)})") from error
    inside = sorted(child.name for child in path.iterdir() if any((child / name).is_file() for name in FILES))
    more = f"; the folders in it have: {', '.join(inside[:4])}" if inside else ""
    raise InputError(f"{path}: has no soft prompt; there is neither {CONFIG} nor {DEEP_WEIGHTS}{more}")


def _finite(prompt: SoftPrompt) -> SoftPrompt:
    if not all(bool(tensor.isfinite().all()) for tensor in prompt.tensors):
        raise ValueError("it has numbers that are NaN or infinite")
    return prompt


def _from_peft(config: Mapping[str, Any], path: Path) -> SoftPrompt:
    kind = config.get("peft_type")
    if kind not in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        raise ValueError(
            f"it is an adapter of PEFT's type {kind}; prompt tuning, p-tuning and prefix tuning work here"
        )
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"there is no {WEIGHTS}")
    tensors = load_file(path / WEIGHTS)
    weights = tensors[_KEY].float()
    ignored = [
        f"{name}={shown(value)}" for name, value in config.items() if value and name not in _KNOWN_VALUES
    ]
    ignored = [text for text in ignored if text != "num_transformer_submodules=1"]
    if ignored or len(tensors) > 1:
        ignored += [f"the tensor {name}" for name in tensors if name != _KEY]
        log.warning("%s: is used without what slowllm does not know: %s", path, ", ".join(ignored))
    if weights.dim() != 2 or not len(weights):
        raise ValueError(f"{_KEY} has shape {tuple(weights.shape)}")
    if kind != "PREFIX_TUNING":
        return SoftPrompt("shallow", weights)
    blocks, heads = int(config["num_layers"]), int(config["num_attention_heads"])
    stacked = weights.view(len(weights), blocks, 2, heads, int(config["token_dim"]) // heads)
    return SoftPrompt("prefix", pairs=tuple(stacked.permute(1, 2, 3, 0, 4).contiguous()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(read_description(path, InputError))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(table, dict):
        raise InputError(f"{path}: is no JSON object")
    return table
