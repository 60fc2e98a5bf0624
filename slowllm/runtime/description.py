"""What a checkpoint says of itself before any weight is read: config, tokenizer, soft prompt."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from slowllm.errors import CheckpointError, InputError, first_line
from slowllm.files import refuse_large, system_errors
from slowllm.modeling.native.gguf_tokenizer import gguf_tokenizer
from slowllm.modeling.skeleton import read_config
from slowllm.modeling.soft_prompt_files import load_prompt
from slowllm.modeling.soft_prompts import SoftPrompt, check_fits
from slowllm.runtime.model_folder import EMBEDDED, find_folder
from slowllm.storage.checkpoint import LFS_POINTER
from slowllm.storage.gguf_files import gguf_files


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
        is_path = Path(path_or_hub_id).expanduser() == self.folder or str(path_or_hub_id).startswith(EMBEDDED)
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
        return load_tokenizer(self.folder)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder, or in its GGUF file where no tokenizer.json lies beside it.

    Raises:
        CheckpointError: the folder has none that transformers can load.
    """
    for path in (file for pattern in _READ_BY_TRANSFORMERS for file in folder.glob(pattern)):
        if not path.exists():  # a link to nowhere, which is named below
            continue
        with system_errors(CheckpointError, path):
            refuse_large(path, CheckpointError)
    if (files := gguf_files(folder)) and not (folder / "tokenizer.json").is_file():
        return gguf_tokenizer(files)
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not isinstance(length := found.model_max_length, int | float):
            raise ValueError(f"its model_max_length is a {type(length).__name__}")
        return found
    except Exception as error:  # a damaged tokenizer may raise anything
        reason = _what_is_wrong_with_tokenizer(folder) or first_line(error)
        if ": (1) " in reason:  # the first line of a list of ways that were tried
            there = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
            reason = f"transformers cannot make one of {', '.join(there)} alone; fetch tokenizer.json"
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({reason})") from error


_READ_BY_TRANSFORMERS = (
    "*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "chat_template.json", "additional_chat_templates/*",
    "*.tiktoken",
)  # fmt: skip

# Of which one must be there, with what it needs beside it.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tokenizer_config.json",
)  # fmt: skip


def _what_is_wrong_with_tokenizer(folder: Path) -> str | None:
    """Return in words why a folder has no tokenizer, where the files themselves show it."""
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_symlink() and not path.exists():
            return f"{name} is a link to {os.readlink(path)}, which is not there"
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    return (
                        f"{name} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"
                    )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES[:-1]):
        return f"there is none of {', '.join(_TOKENIZER_FILES[:-1])}; fetch the tokenizer's files"
    return None
