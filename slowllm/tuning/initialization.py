"""Where a soft prompt starts: embeddings of a text or of random tokens, keys and values of a pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from slowllm.errors import InputError
from slowllm.modeling.head import last_hidden
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.hints import Reach, reach
from slowllm.tuning.recipe import Recipe


def starts_of(lm: StreamedLM, recipes: Sequence[Recipe], first: int) -> list[SoftPrompt]:
    """Return where each trial begins; keys and values of prefixes take one sweep for all of them."""
    ids = [_first_ids(lm, recipe) for recipe in recipes]
    jobs = [
        functools.partial(_pairs_rider, lm, found)
        for recipe, found in zip(recipes, ids, strict=True)
        if recipe.kind == "prefix"
    ]
    pairs = iter(lm.ride(jobs) if jobs else [])
    width, num_blocks = int(lm.config.get_text_config().hidden_size), len(lm.layout.blocks)
    starts = []
    for recipe, found in zip(recipes, ids, strict=True):
        if recipe.kind == "prefix":
            starts.append(above(_spread_alike(SoftPrompt("prefix", pairs=next(pairs)), recipe), first))
            continue
        with torch.no_grad():
            rows = lm.model.get_input_embeddings()(found).float().cpu()
        vectors: tuple[Tensor, ...] = ()
        if recipe.kind == "deep":
            vectors = tuple(torch.zeros(recipe.num_tokens, width) for _ in range(num_blocks))
        starts.append(above(_spread_alike(SoftPrompt(recipe.kind, rows, vectors), recipe), first))
    return starts


def above(start: SoftPrompt, first: int) -> SoftPrompt:
    """Take away the vectors of blocks that are not tuned."""
    return replace(start, vectors=(*[None] * min(first, len(start.vectors)), *start.vectors[first:]))


def _first_ids(lm: StreamedLM, recipe: Recipe) -> Tensor:
    """Return the tokens (P,) whose embeddings a prompt begins with."""
    if recipe.init == "text":
        found = lm.tokenizer(recipe.init_text, add_special_tokens=False, verbose=False)["input_ids"]
        if not found:
            raise InputError(f"the tokenizer makes no tokens of init_text {recipe.init_text!r}")
        repeated = -(-recipe.num_tokens // len(found)) * list(found)
        return torch.tensor(repeated[: recipe.num_tokens])
    dice = torch.Generator("cpu").manual_seed(recipe.seed)
    return torch.randint(int(lm.config.get_text_config().vocab_size), (recipe.num_tokens,), generator=dice)


def _pairs_rider(lm: StreamedLM, ids: Tensor) -> tuple[Tensor, ...]:
    cache = DynamicCache(config=lm.model.config.get_text_config())
    # The head has no keys and values.
    reach.set(Reach(end=len(lm.layout.blocks)))
    with torch.no_grad():
        last_hidden(lm.model, {"input_ids": ids[None], "past_key_values": cache, "use_cache": True})
    pairs = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape != values.shape or keys.shape[2] != len(ids):
            raise InputError(
                "this model does not keep keys and values of one shape for every token, so it takes no prefix; use a "
                "shallow or deep prompt"
            )
        pairs.append(torch.stack([keys[0], values[0]]).float().cpu())
    return tuple(pairs)


def _spread_alike(start: SoftPrompt, recipe: Recipe) -> SoftPrompt:
    """Replace the numbers of a start by random ones of their mean and spread, where the recipe says so."""
    if recipe.init != "random":
        return start
    dice = torch.Generator("cpu").manual_seed(recipe.seed)

    def drawn(tensor: Tensor) -> Tensor:
        return tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=dice)

    embeddings = None if start.embeddings is None else drawn(start.embeddings)
    pairs = tuple(torch.stack([drawn(side) for side in pair]) for pair in start.pairs)
    return replace(start, embeddings=embeddings, pairs=pairs)
