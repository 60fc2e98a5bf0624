"""What a checkpoint says of itself before any weight is read: config, tokenizer, soft prompt."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer

from slowllm.errors import CheckpointError, InputError, first_line
from slowllm.modeling.skeleton import read_config
from slowllm.modeling.soft_prompt_files import load_prompt
from slowllm.modeling.soft_prompts import SoftPrompt, check_fits


class ModelInfo:
    """The description of a checkpoint, made without reading any weight.

    Args:
        path_or_hub_id: as for `load`.
        prompt: a soft prompt that stands before every text, or its folder.
    Attributes:
        name: a hub id, or the folder's name.
        folder: of the checkpoint.
        config: transformers' config.
        soft_prompt: stands before every text, if there is one.
    Raises:
        CheckpointError: there is no such checkpoint, or its config cannot be used.
        ArchitectureError: this version of transformers does not know the model type.
        InputError: the prompt cannot be read, or was made for another model.
    """

    def __init__(
        self,
        path_or_hub_id: str | os.PathLike[str],
        prompt: str | os.PathLike[str] | SoftPrompt | None = None,
    ) -> None:
        self.folder = find_folder(path_or_hub_id)
        is_path = Path(path_or_hub_id).expanduser() == self.folder
        self.name = self.folder.resolve().name if is_path else str(path_or_hub_id)
        self.config: Any = read_config(self.folder)
        self.soft_prompt = prompt if isinstance(prompt, SoftPrompt) else None
        self._made_for, self._prompt_name = None, "the soft prompt"
        if prompt is not None and not isinstance(prompt, SoftPrompt):
            self.soft_prompt, about = load_prompt(prompt)
            self._made_for, self._prompt_name = about.get("fingerprint"), str(prompt)
        if self.soft_prompt is not None:
            check_fits(self.soft_prompt, self.config, self._prompt_name)

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of the soft prompt before every text."""
        return 0 if self.soft_prompt is None else self.soft_prompt.num_tokens

    def check_prompt(self, fingerprint: str) -> None:
        """Refuse a soft prompt that says it was made for weights with another fingerprint.

        Raises:
            InputError: it was.
        """
        if self._made_for not in (None, fingerprint):
            raise InputError(
                f"{self._prompt_name}: was made for another model, whose weights are not those of {self.name}"
            )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: the folder has none that transformers can load.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a damaged tokenizer may raise anything
            raise CheckpointError(
                f"{self.folder}: its tokenizer cannot be loaded ({first_line(error)})"
            ) from error


def find_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint: as given, or a hub id's snapshot in the local cache.

    Raises:
        CheckpointError: neither is there.
        InputError: this is no name.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise InputError(f"a model is given by its folder or hub id, not as {type(path_or_hub_id).__name__}")
    text = str(path_or_hub_id)
    if not text:
        raise CheckpointError("the name of the model is empty")
    try:
        folder = Path(path_or_hub_id).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, a folder without permission, no such home
        raise CheckpointError(f"{text}: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        return folder
    if exists:
        raise CheckpointError(
            f"{text}: is a file; give the folder that holds config.json and the safetensors"
        )
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text}: no such folder")
    try:
        # Without a pattern, the hub's client refuses a snapshot that was fetched in part, such as one without pickles.
        return Path(
            huggingface_hub.snapshot_download(text, local_files_only=True, allow_patterns=["config.json"])
        )
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{text}: no such folder, and no such model in the Hugging Face cache; "
            f"if it is a hub id, fetch it with `slowllm download {text}`"
        ) from error
