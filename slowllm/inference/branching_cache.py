"""A key-value cache for trees of tokens: one accepted row that is kept once, and many short rows that continue it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from slowllm.errors import forward_errors
from slowllm.streaming.call_context import call_context


class BranchingLayer(DynamicLayer):
    """Keys and values of one accepted row, and behind them those of many short rows, the branches.

    The accepted row is kept once: the tensors for attention are concatenated anew at each block, and not kept.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.branches: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to the branches; return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.branches is not None:
            key_states = torch.cat([self.branches[0], key_states], -2)
            value_states = torch.cat([self.branches[1], value_states], -2)
        self.branches = key_states, value_states
        if not self.keys.numel():
            return key_states, value_states
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], -2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], -2),
        )

    def get_seq_length(self) -> int:
        """Return the length of the accepted row and a branch."""
        return super().get_seq_length() + (0 if self.branches is None else self.branches[0].shape[-2])

    def select(self, rows: Tensor) -> None:
        """Keep some branches, in a new order."""
        if self.branches is not None:
            self.branches = self.branches[0][rows], self.branches[1][rows]

    def accept(self, row: int, num_tokens: int) -> None:
        """Append the first tokens of a branch to the accepted row, and drop all branches."""
        if self.branches is not None and num_tokens:
            added = [branch[row : row + 1, :, :num_tokens] for branch in self.branches]
            if self.keys.numel():
                added = [torch.cat(pair, -2) for pair in zip((self.keys, self.values), added, strict=True)]
            # Copied, or the view would keep the other rows in memory.
            self.keys, self.values = (tensor.clone() for tensor in added)
        self.branches = None


class CachedModel:
    """A model with a cache from which drafted tokens can be dropped.

    Args:
        model: streamed, or transformers' own.
        final_length: tokens that the cache will hold at its end; 0 where nobody knows.
    """

    def __init__(self, model: Any, final_length: int = 0) -> None:
        self._model, self._final_length = model, final_length
        config = model.config.get_text_config()
        self.num_layers, self._vocabulary = config.num_hidden_layers, config.vocab_size
        self._layers = [BranchingLayer() for _ in range(self.num_layers)]
        self._can_keep_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, rows: Tensor, num_last: int) -> Tensor:
        """Return the logits (B, num_last, V) of the last tokens of rows (B, T), which continue the cache.

        They are on the processor, where the tree is, whatever device computes the model.
        """
        # A token that only the other model's padded vocabulary has is replaced; it can only cost acceptance.
        rows = rows.clamp(max=self._vocabulary - 1)
        extra = {"logits_to_keep": num_last} if self._can_keep_last else {}
        with forward_errors(self._model), call_context(final_length=self._final_length):
            output = self._model(
                input_ids=rows, past_key_values=Cache(layers=list(self._layers)), use_cache=True, **extra
            )
        logits: Tensor = output.logits[:, -num_last:].float().cpu()
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep some branches of the cache, in a new order."""
        for layer in self._layers:
            layer.select(rows)

    def accept(self, row: int, num_tokens: int) -> None:
        """Append the first tokens of a branch to the accepted row of the cache, and drop all branches."""
        for layer in self._layers:
            layer.accept(row, num_tokens)
