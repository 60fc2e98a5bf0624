"""Models under Petals' names, on blocks that are computed in this process, and plain transformers to compare them with."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor

from slowllm.swarm.petals import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    ClientConfig,
)
from tests.support.families import resident, save_tiny
from tests.support.local_swarm import LocalSwarm

# Petals' four families; the later ones differ in nothing that is of slowllm.
FAMILIES = [
    "bloom",
    "llama-2",
    pytest.param("falcon-new-decoder", marks=pytest.mark.long),
    pytest.param("mixtral", marks=pytest.mark.long),
]


class Case:
    """A checkpoint, plain transformers on it, and a swarm of its blocks; a context manager."""

    def __init__(self, name: str, folder: Path, **client: Any) -> None:
        if not (folder / "config.json").is_file():
            save_tiny(name, folder)
        self.plain: Any = resident(folder)
        self.swarm = LocalSwarm(folder)
        self.client = ClientConfig(**client)

    @property
    def model(self) -> Any:
        """A causal language model. Of one swarm, either this or `classifier` is made, once."""
        return AutoDistributedModelForCausalLM.of_client(self.swarm.lm, self.client)

    def classifier(self, num_labels: int) -> Any:
        """A classifier."""
        return AutoDistributedModelForSequenceClassification.of_client(self.swarm.lm, self.client, num_labels)

    def __enter__(self) -> Case:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.swarm.__exit__()


def greedy(count: int) -> dict[str, Any]:
    """Return the settings of a continuation by so many likeliest tokens."""
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}


def ids(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Return tokens."""
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def embedded(model: Any, tokens: Tensor) -> Tensor:
    """Return what the first block gets for tokens, by the names that Petals' examples use."""
    base = model.transformer
    hidden: Tensor = base.word_embeddings_layernorm(base.word_embeddings(tokens))
    return hidden.detach()
