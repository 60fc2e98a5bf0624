"""Stores of tiny models, whose small matrices are coded too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slowllm
from slowllm.prepare import store_plan
from slowllm.prepare.convert import Converted, convert
from tests.support.families import VOCAB

IDS = torch.randint(5, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))


def make_store(source: Path, out: Path, store: str, **options: Any) -> Converted:
    """Convert a tiny model in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_plan, "MIN_WEIGHTS", 64)
        return convert(source, out, store=store, **{"workers": 1, **options})


def passed(folder: Path, granularity: Any = "blocks", dtype: str = "bf16") -> tuple[Tensor, list[Tensor]]:
    """Return logits, and with whole blocks the gradients of embeddings, of two riders in one sweep."""
    with slowllm.load(folder, dtype=dtype, keep_resident=False, poison=True, granularity=granularity) as lm:
        if granularity == "leaves":
            with torch.no_grad():
                return torch.cat(lm.ride([lambda: lm.model(IDS).logits] * 2)), []
        return gradients(lm, lm.model)


def gradients(lm: Any, model: Any) -> tuple[Tensor, list[Tensor]]:
    given = [model.get_input_embeddings()(IDS).detach().requires_grad_(True) for _ in range(2)]

    def step(vectors: Tensor) -> Tensor:
        output = model(inputs_embeds=vectors, labels=IDS, use_cache=False)
        output.loss.backward()
        return torch.as_tensor(output.logits.detach())

    jobs = [lambda vectors=vectors: step(vectors) for vectors in given]
    logits = lm.ride(jobs) if lm else [job() for job in jobs]
    return torch.cat(logits), [vectors.grad for vectors in given]
