"""What one rider does to continue its prompts: one call of transformers' `generate`, and texts made of its ids."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from slowllm.errors import forward_errors
from slowllm.inference.generation_types import Continuation, OnTokens, Prompt, Settings
from slowllm.inference.sampling import TokenChooser, draws_by_row
from slowllm.inference.stopping import (
    EndDetector,
    RowMonitor,
    SpecialTokens,
    new_text,
    special_tokens,
    without_eos,
)
from slowllm.inference.text import TextSide
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context


def with_own_defaults(lm: StreamedLM) -> Any:
    """Return the model with an empty generation config and with errors of its passes in one sentence, sharing all parts.

    transformers fills what a call leaves open from the model's own config, where a checkpoint may put anything
    (Llama's says do_sample=True and a temperature of 0.6).
    """
    model = copy.copy(lm.model)
    model.generation_config = GenerationConfig()
    plain = model.forward

    @functools.wraps(plain)  # generate() looks at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        with forward_errors(lm.model):
            return plain(*args, **kwargs)

    model.forward = forward
    return model


def continue_prompts(
    lm: StreamedLM,
    model: Any,
    numbers: Sequence[int],
    prompts: Sequence[Prompt],
    *,
    on_tokens: OnTokens | None,
    on_pass: Callable[[int], None] | None = None,
    **extra: Any,
) -> list[tuple[Continuation, ...]]:
    """Continue prompts of equal settings in one batch; runs as a rider.

    Args:
        lm: a loaded model.
        model: from `with_own_defaults`.
        numbers: of the prompts, for `on_tokens`.
        prompts: of equal settings but for their seeds; only one where beams are sampled.
        on_tokens: see `generation.generate`.
        on_pass: called after each pass through the model with the number of tokens that a row got.
        extra: for transformers' GenerationConfig.
    """
    settings, tokens = prompts[0].settings, special_tokens(lm)
    inputs = _inputs(lm, model, prompts, tokens.pad)
    width = inputs["input_ids"].shape[1]
    detector = EndDetector(lm, settings, tokens)
    monitor = RowMonitor(detector, tokens, numbers, width, settings, on_tokens, on_pass)
    asked, processors = settings, LogitsProcessorList()
    if draws_by_row(settings):
        processors.append(TokenChooser(prompts, tokens, width, inputs["input_ids"].device))
        # To `generate` each continuation is a greedy row; a soft prompt's cache has as many already.
        inputs = {
            name: value.repeat_interleave(settings.num_rows, 0) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        asked = Settings(settings.max_new_tokens, top_log_probs=settings.top_log_probs)
    elif settings.do_sample and settings.seed is not None:
        torch.manual_seed(settings.seed)  # of this rider only: the generator changes hands with the baton
    soft_prompt = lm.soft_prompt
    adding = contextlib.nullcontext() if soft_prompt is None else soft_prompt.adding()
    with adding, call_context(final_length=width + settings.max_new_tokens):
        output = model.generate(
            **inputs,
            generation_config=_generation_config(asked, tokens, **extra),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([monitor]),
        )
    continuations = []
    for row, sequence in enumerate(output.sequences):
        sources = torch.full((settings.max_new_tokens,), row)
        length = monitor.lengths.get(row, len(sequence))
        if settings.num_beams > 1:
            sources = output.beam_indices[row]
            length = width + int((sources >= 0).sum())
        ended = bool(detector.has_ended(sequence[None, :length], width))
        made = sequence[width:length].tolist()
        ids = without_eos(made, tokens)
        eos = made[-1] if len(ids) < len(made) else None
        prompt = prompts[row // settings.num_return_sequences]
        continuations.append(make_continuation(lm, prompt, ids, ended, _logits_of(output, sources), eos))
    step = settings.num_return_sequences
    return [tuple(continuations[start : start + step]) for start in range(0, len(continuations), step)]


def _generation_config(settings: Settings, tokens: SpecialTokens, **extra: Any) -> GenerationConfig:
    """Return transformers' form of settings; `RowMonitor` sees to stop strings."""
    sampling = {}
    if settings.do_sample:
        sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        num_beams=settings.num_beams,
        num_return_sequences=settings.num_return_sequences,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=list(tokens.eos) or None,
        pad_token_id=tokens.pad,
        return_dict_in_generate=True,
        output_logits=settings.top_log_probs is not None,
        **sampling,
        **extra,
    )


def _inputs(lm: StreamedLM, model: Any, prompts: Sequence[Prompt], pad: int) -> dict[str, Any]:
    """Return the inputs of `generate`: rows of ids, padded on the left so that all continue in one column.

    A soft prompt has positions in the rows as well. They hold the first token of the text, which is not attended to
    there, but which penalties for repetition see.
    """
    soft_prompt = lm.soft_prompt
    num_virtual = 0 if soft_prompt is None else soft_prompt.num_tokens
    width = num_virtual + max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    starts = [width - num_virtual - len(prompt.ids) for prompt in prompts]
    for row, (start, prompt) in enumerate(zip(starts, prompts, strict=True)):
        ids[row, start:] = torch.tensor([prompt.ids[0]] * num_virtual + list(prompt.ids))
        mask[row, start:] = 1
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = mask
    if soft_prompt is not None and soft_prompt.virtual_ids:
        virtual = ids.clone()
        for row, start in enumerate(starts):
            virtual[row, start : start + num_virtual] = torch.tensor(soft_prompt.virtual_ids)
        inputs["inputs_embeds"] = soft_prompt.embed(lm.model, virtual)
    elif soft_prompt is not None:
        num_rows = len(prompts) * prompts[0].settings.num_rows
        inputs["past_key_values"] = soft_prompt.growing_cache(lm.config, num_rows, lm.model.dtype)
    # transformers samples and collects tokens on the device of the logits.
    return {k: v.to(lm.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _logits_of(output: Any, sources: Tensor) -> Iterator[Tensor]:
    """Yield the raw logits (V,) of each new token of a sequence; a beam may have moved from row to row."""
    for logits, source in zip(output.logits or (), sources.tolist(), strict=False):
        yield logits[source]


def make_continuation(
    lm: TextSide,
    prompt: Prompt,
    ids: Sequence[int],
    ended: bool,
    logits: Iterable[Tensor],
    eos: int | None = None,
) -> Continuation:
    """Return a continuation with its text, and with log-probabilities where the prompt asks for them.

    Args:
        lm: with the tokenizer.
        prompt: that is continued.
        ids: of the continuation, without EOS.
        ended: whether EOS or a stop string ended it.
        logits: (V,) raw logits of each new token, and of EOS, where log-probabilities are asked for.
        eos: the token that ended it, if one did.
    """
    text = text_of(lm, prompt, ids)
    reason: Literal["stop", "length"] = "stop" if ended else "length"
    num_top = prompt.settings.top_log_probs
    if num_top is None:
        return Continuation(tuple(ids), text, reason)
    log_probs, tops = list[float](), list[dict[int, float]]()
    for token, row in zip(ids if eos is None else (*ids, eos), logits, strict=False):
        scores = row.float().log_softmax(-1)
        best = scores.topk(min(num_top, len(scores)))
        log_probs.append(float(scores[token]))
        tops.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    end = (eos, log_probs.pop(), tops.pop()) if eos is not None and len(log_probs) > len(ids) else None
    return Continuation(tuple(ids), text, reason, tuple(log_probs), tuple(tops), end)


def text_of(lm: TextSide, prompt: Prompt, ids: Sequence[int]) -> str:
    """Return the text of a continuation, cut before the first stop string; one that begins in the prompt does not count."""
    text = new_text(lm.tokenizer, [*prompt.ids, *ids], len(prompt.ids))
    ends = [place for stop in prompt.settings.stop if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
