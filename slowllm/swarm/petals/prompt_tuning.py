"""Prompts that are tuned, as Petals names them: virtual tokens (ptune), and vectors before every block (deep_ptune).

The parameters are fp32 modules of the base model, `prompt_embeddings` and `intermediate_prompt_embeddings`. In files they
are slowllm's own soft prompts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slowllm.errors import InputError
from slowllm.modeling.soft_prompt_files import load_prompt, save_prompt
from slowllm.modeling.soft_prompts import SoftPrompt, check_fits
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.petals.client_config import ClientConfig


def add_prompt_modules(base: nn.Module, lm: StreamedLM, client: ClientConfig) -> None:
    """Give a base model the modules of a prompt, with random values, where the client tunes one.

    Args:
        base: the module that owns the blocks.
        lm: its client.
        client: with `tuning_mode` and `pre_seq_len`.
    """
    if client.tuning_mode is None:
        return
    text = lm.config.get_text_config()
    std = float(getattr(text, "initializer_range", 0.02))
    width = lm.model.get_input_embeddings().embedding_dim
    base.add_module("prompt_embeddings", _embedding(client.pre_seq_len, width, std))
    if client.tuning_mode == "deep_ptune":
        base.add_module(
            "intermediate_prompt_embeddings",
            _embedding(client.pre_seq_len, text.num_hidden_layers * text.hidden_size, std),
        )


def _embedding(count: int, width: int, std: float) -> nn.Embedding:
    embedding = nn.Embedding(count, width, dtype=torch.float32)
    nn.init.normal_(embedding.weight, std=std)
    return embedding


class PromptTuned:
    """Mixin for a base model that may have a prompt."""

    prompt_embeddings: nn.Embedding
    intermediate_prompt_embeddings: nn.Embedding

    @property
    def pre_seq_len(self) -> int:
        """Virtual tokens before every text; 0 where no prompt is tuned."""
        own: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        return own["prompt_embeddings"].num_embeddings if "prompt_embeddings" in own else 0

    def soft_prompt(self, dtype: torch.dtype = torch.float32) -> SoftPrompt | None:
        """Return the prompt, whose tensors carry gradients to the modules; None where none is tuned.

        Args:
            dtype: of its tensors.
        """
        own: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        if "prompt_embeddings" not in own:
            return None
        embeddings: Tensor = own["prompt_embeddings"].weight.to(dtype)
        if "intermediate_prompt_embeddings" not in own:
            return SoftPrompt("shallow", embeddings)
        deep: Tensor = own["intermediate_prompt_embeddings"].weight.to(dtype)
        # (P, N x H) to N of (P, H).
        vectors = deep.view(len(deep), self._num_blocks, -1).unbind(1)
        return SoftPrompt("deep", embeddings, tuple(vectors))

    @property
    def _num_blocks(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)  # type: ignore[attr-defined]

    def save_prompt(self, folder: str | os.PathLike[str]) -> None:
        """Write the prompt into a folder, in the files of `slowllm tune`: `--prompt` and `slowllm.load(prompt=)` read it.

        Raises:
            InputError: no prompt is tuned, or the folder cannot be written.
        """
        prompt = self.soft_prompt()
        if prompt is None:
            raise InputError("there is no prompt to save; load the model with tuning_mode and pre_seq_len")
        lm: StreamedLM = self.__dict__["_slowllm"]
        about = {
            "fingerprint": lm.fingerprint(of_source=True),
            "dtype": str(lm.model.dtype).removeprefix("torch."),
        }
        save_prompt(prompt, Path(folder).expanduser(), str(lm.folder), about)

    def load_prompt(self, folder: str | os.PathLike[str]) -> None:
        """Read a prompt of the same kind and length from a folder of `save_prompt`, `slowllm tune` or PEFT.

        Raises:
            InputError: it cannot be read, or is of another kind, length or model.
        """
        mine, (prompt, _) = self.soft_prompt(), load_prompt(folder)
        check_fits(prompt, self.config, str(folder))  # type: ignore[attr-defined]
        if mine is None or (mine.kind, mine.num_tokens) != (prompt.kind, prompt.num_tokens):
            have = "none" if mine is None else f"a {mine.kind} one of {mine.num_tokens}"
            raise InputError(
                f"{folder}: is a {prompt.kind} prompt of {prompt.num_tokens} tokens, but the model tunes {have}; load it with that "
                "tuning_mode and pre_seq_len"
            )
        assert prompt.embeddings is not None, "of this kind it has embeddings"
        with torch.no_grad():
            self.prompt_embeddings.weight.copy_(prompt.embeddings)
            if prompt.kind == "deep":
                stacked = torch.stack([vector for vector in prompt.vectors if vector is not None], 1)
                self.intermediate_prompt_embeddings.weight.copy_(stacked.flatten(1))
