"""The initial values of a soft prompt: embeddings of a text or of random tokens, or keys and values of a pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from slowllm.errors import InputError, forward_errors
from slowllm.modeling.head import last_hidden
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.rounding import ceil_div
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.hints import Reach
from slowllm.tuning.recipe import Recipe


def starts_of(lm: StreamedLM, recipes: Sequence[Recipe], first: int) -> list[SoftPrompt]:
    """Return the initial prompts of trials that tune from block `first` on. Prefixes take one sweep for all of them.

    Raises:
        InputError: a prefix is to be tuned where caches are elsewhere; or the model's are of another kind.
    """
    if not lm.keeps_caches and any(recipe.kind == "prefix" for recipe in recipes):
        raise InputError(
            "a prefix begins as the keys and values of tokens, which stay at the servers of a swarm; tune a shallow or deep prompt, "
            "or the prefix on a machine that has the blocks"
        )
    ids = [_first_ids(lm, recipe) for recipe in recipes]
    jobs = [
        functools.partial(_pairs_rider, lm, prompt_ids)
        for recipe, prompt_ids in zip(recipes, ids, strict=True)
        if recipe.kind == "prefix"
    ]
    pairs = iter(lm.ride(jobs) if jobs else [])
    width, num_blocks = int(lm.config.get_text_config().hidden_size), len(lm.layout.blocks)
    starts = []
    for recipe, prompt_ids in zip(recipes, ids, strict=True):
        if recipe.kind == "prefix":
            start = SoftPrompt("prefix", pairs=next(pairs))
        else:
            with torch.no_grad():
                rows = lm.model.get_input_embeddings()(prompt_ids).float().cpu()
            vectors: tuple[Tensor, ...] = ()
            if recipe.kind == "deep":
                vectors = tuple(torch.zeros(recipe.num_tokens, width) for _ in range(num_blocks))
            start = SoftPrompt(recipe.kind, rows, vectors)
        starts.append(above(_randomised(start, recipe), first))
    return starts


def above(start: SoftPrompt, first: int) -> SoftPrompt:
    """Return a prompt without the vectors of blocks below `first`, which are not tuned."""
    return replace(start, vectors=(*[None] * min(first, len(start.vectors)), *start.vectors[first:]))


def _first_ids(lm: StreamedLM, recipe: Recipe) -> Tensor:
    """Return the tokens (P,) whose embeddings are a prompt's initial values."""
    if recipe.init == "text":
        ids = list(lm.tokenizer(recipe.init_text, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids:
            raise InputError(f"the tokenizer makes no tokens of init_text {recipe.init_text!r}")
        return torch.tensor((ids * ceil_div(recipe.num_tokens, len(ids)))[: recipe.num_tokens])
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    vocabulary = int(lm.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (recipe.num_tokens,), generator=generator)


def _pairs_rider(lm: StreamedLM, ids: Tensor) -> tuple[Tensor, ...]:
    """Return the keys and values of each block for some tokens. Runs as a rider."""
    cache = DynamicCache(config=lm.model.config.get_text_config())
    # The head has no keys and values.
    reach = Reach(end=len(lm.layout.blocks))
    with forward_errors(lm.model), call_context(reach=reach), torch.no_grad():
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


def _randomised(start: SoftPrompt, recipe: Recipe) -> SoftPrompt:
    """Replace initial values by random numbers with their mean and spread, if the recipe says so."""
    if recipe.init != "random":
        return start
    generator = torch.Generator("cpu").manual_seed(recipe.seed)

    def drawn(tensor: Tensor) -> Tensor:
        return tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=generator)

    embeddings = None if start.embeddings is None else drawn(start.embeddings)
    pairs = tuple(torch.stack([drawn(side) for side in pair]) for pair in start.pairs)
    return replace(start, embeddings=embeddings, pairs=pairs)
