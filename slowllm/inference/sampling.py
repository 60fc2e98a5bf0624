"""Which token comes next: transformers' own processors, and draws from a generator of the prompt's own.

A batch of transformers' `generate` draws for all its rows from one generator. So that a prompt in a batch gets the tokens
that it would get alone, up to rounding of its logits, each prompt's tokens are drawn from a generator of its own, which is
seeded as `torch.manual_seed` seeds the global one.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slowllm.inference.generation_types import Prompt, Settings
from slowllm.inference.stopping import SpecialTokens


def processors_of(prompt: Prompt, eos: tuple[int, ...]) -> LogitsProcessorList:
    """Return transformers' processors for the settings of a prompt, in the order in which `generate` has them."""
    settings, processors = prompt.settings, LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.min_new_tokens and eos:
        processors.append(
            MinNewTokensLengthLogitsProcessor(len(prompt.ids), settings.min_new_tokens, torch.tensor(eos))
        )
    if settings.do_sample:
        if settings.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
    return processors


def generator_of(
    settings: Settings, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator | None:
    """Return what tokens are drawn with, None where the likeliest is taken.

    Args:
        settings: of the prompt; without a seed, the seed is drawn from the calling thread's own generator.
        index: of the continuation, by which its seed counts up.
        device: of the logits; on a GPU, `generate` draws with the GPU's generator.
    """
    if not settings.do_sample:
        return None
    seed = int(torch.randint(1 << 62, ())) if settings.seed is None else settings.seed
    own = device if torch.device(device).type == "cuda" else "cpu"
    return torch.Generator(own).manual_seed((seed + index) % (1 << 64))


def next_tokens(
    ids: Tensor, logits: Tensor, processors: LogitsProcessorList, generator: torch.Generator | None
) -> Tensor:
    """Choose the next token of each row of one prompt, as transformers' `generate` does for the prompt alone.

    Args:
        ids: (B, T) int64, the prompt and what has come of each row, without padding.
        logits: (B, V) float32; may be overwritten.
        processors: from `processors_of`.
        generator: from `generator_of`.

    Returns:
        (B,) int64.
    """
    scores = processors(cast(Any, ids), cast(Any, logits)) if processors else logits
    if generator is None:
        return scores.argmax(-1)
    probabilities = scores.softmax(-1).to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(scores.device)


class TokenChooser(LogitsProcessor):
    """Chooses the next tokens of a batch, prompt by prompt; for greedy decoding, which takes what it leaves.

    One prompt's rows at a time are sorted and summed up, so that a large batch needs no more memory for it than one prompt.

    Args:
        prompts: of the batch, with equal settings but for their seeds.
        tokens: with EOS.
        width: of the batch's prompts, padding included.
        device: of the logits.
    """

    def __init__(
        self, prompts: Sequence[Prompt], tokens: SpecialTokens, width: int, device: torch.device | str
    ) -> None:
        self._starts = [width - len(prompt.ids) for prompt in prompts]
        self._rows_each = prompts[0].settings.num_return_sequences
        self._processors = [processors_of(prompt, tokens.eos) for prompt in prompts]
        self._generators = [generator_of(prompt.settings, device=device) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) float32: 0 at the token that each row gets, and minus infinity elsewhere."""
        chosen = []
        for place, (start, processors, generator) in enumerate(
            zip(self._starts, self._processors, self._generators, strict=True)
        ):
            rows = slice(place * self._rows_each, (place + 1) * self._rows_each)
            # A copy, because the batch's logits are the caller's.
            chosen.append(next_tokens(input_ids[rows, start:], scores[rows].clone(), processors, generator))
        left = torch.full_like(scores, -torch.inf)
        return left.scatter_(1, torch.cat(chosen)[:, None], 0.0)


def draws_by_row(settings: Settings) -> bool:
    """Whether each row of a batch has its next token drawn for it; beams are moved from row to row by `generate` itself."""
    return settings.do_sample and settings.num_beams == 1


def seeded(prompt: Prompt) -> Prompt:
    """Return a prompt with a seed that nobody can foresee, if it is sampled and has none."""
    if not prompt.settings.do_sample or prompt.settings.seed is not None:
        return prompt
    return replace(prompt, settings=replace(prompt.settings, seed=secrets.randbits(63)))
