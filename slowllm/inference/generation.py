"""Continuations of many prompts, one sweep for each token of all of them.

Prompts of like length and equal settings share a micro-batch, and each micro-batch is a rider that runs transformers'
own `generate()` with a cache of its own. A rider whose prompts have all ended leaves, and the next one boards. A
prompt whose tokens are drawn rides alone, so that its tokens do not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import (
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from slowllm.errors import InputError, NonFiniteError, SlowLLMError
from slowllm.inference.generation_types import Continuation, OnTokens, Prompt, Settings, check, encode
from slowllm.inference.text import TextSide
from slowllm.planning.host_plan import MAX_RIDER_TOKENS, padding_worth
from slowllm.planning.job import Job, Rates
from slowllm.planning.packing import pack
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.riders import Sized

__all__ = ["Continuation", "OnTokens", "Prompt", "Settings", "check", "encode", "generate", "job_of"]

log = logging.getLogger(__name__)

# Each rider is a thread; what one holds beside its tokens is small, but not nothing.
MAX_RIDERS = 256
# Prompts are packed within a window of this many sweeps' tokens, so that any number can stream through.
WINDOW_SWEEPS = 4


def job_of(lm: TextSide, prompts: Iterable[Prompt], rates: Rates | None = None) -> Job:
    """Return what the plan must know of all prompts, each of which is checked.

    Args:
        lm: the model, or its description.
        prompts: of the whole job.
        rates: of the machine, which say how much padding is worth a micro-batch.
    Raises:
        InputError: there are no prompts, or one cannot be continued.
    """
    prompts = [replace(prompt, num_virtual=lm.num_virtual_tokens) for prompt in prompts]
    if not prompts:
        raise InputError("there are no prompts to continue")
    for number, prompt in enumerate(prompts, 1):
        check(lm, prompt, f"prompt {number}")
    padding = padding_worth(rates or Rates())
    groups = _grouped(prompts, MAX_RIDER_TOKENS, 1 << 62, padding, can_mask=_can_pad(lm))
    return Job(
        num_tokens=sum(map(_held_tokens, ([prompts[n] for n in group] for group in groups))),
        # A rider takes a prompt with all its rows, or not at all.
        longest=max(prompt.num_tokens for prompt in prompts),
        forward_only=True,
        keeps_results=True,
        num_passes=max(prompt.settings.max_new_tokens for prompt in prompts),
    )


def _held_tokens(prompts: Sequence[Prompt]) -> int:
    settings = prompts[0].settings
    width = max(prompt.width for prompt in prompts)
    return len(prompts) * settings.num_rows * (width + settings.max_new_tokens)


def _can_pad(lm: TextSide) -> bool:
    """Whether rows of one batch may begin at different places: what a soft prompt has inside must not."""
    return lm.soft_prompt is None or lm.soft_prompt.kind == "shallow"


def _grouped(
    prompts: Sequence[Prompt], rider_tokens: int, sweep_tokens: int, padding_tokens: int, *, can_mask: bool
) -> list[list[int]]:
    """Divide prompts into micro-batches; return the prompts' numbers, each exactly once."""
    alike: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        if prompt.settings.do_sample:
            key: Any = number
        else:
            # Where no token is drawn, the seed makes no difference.
            key = (replace(prompt.settings, seed=None), 0 if can_mask else len(prompt.ids))
        alike.setdefault(key, []).append(number)
    groups = []
    for numbers in alike.values():
        settings = prompts[numbers[0]].settings
        lengths = [prompts[n].width for n in numbers]
        for batch in pack(lengths, rider_tokens // settings.num_rows, padding_tokens):
            held = settings.num_rows * (lengths[batch[0]] + settings.max_new_tokens)
            groups += [
                [numbers[i] for i in part]
                for part in _parts(batch, max(1, min(len(batch), sweep_tokens // held)))
            ]
    # Results are handed over in order, so riders board by their first prompt.
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def generate(
    lm: StreamedLM, prompts: Iterable[Prompt], *, on_tokens: OnTokens | None = None
) -> Iterator[tuple[Continuation, ...]]:
    """Yield the continuations of every prompt, in order, in as few sweeps as the plan allows.

    Prompts are drawn as riders leave, so their number is no limit. What goes wrong in one rider, such as a number
    too large for the compute dtype, costs the others nothing: its prompts get an empty tuple each, and the error is
    raised after the last prompt.

    Args:
        lm: a loaded model.
        prompts: drawn here for the first window, then on the carousel's thread, so it must not call the model.
        on_tokens: called as tokens come; must not call the model.
    Raises:
        InputError: a prompt is empty, or with its continuation longer than the model or the plan takes.
    """
    rider = functools.partial(continue_prompts, lm, own_defaults(lm), on_tokens=on_tokens)
    return ride_prompts(lm, prompts, rider, held=_held_tokens)


@dataclass(frozen=True, kw_only=True)
class _Group(Sized):
    """The job that continues a group of prompts; `numbers` are those of the prompts."""

    numbers: list[int]


ContinueGroup = Callable[[Sequence[int], Sequence[Prompt]], list[tuple[Continuation, ...]]]


def ride_prompts(
    lm: StreamedLM,
    prompts: Iterable[Prompt],
    rider: ContinueGroup,
    *,
    held: Callable[[Sequence[Prompt]], int],
    alone: bool = False,
) -> Iterator[tuple[Continuation, ...]]:
    """Group prompts, have riders continue each group, and yield the results in the prompts' order.

    Args:
        lm: a loaded model.
        prompts: as for `generate`.
        rider: called as a rider with the numbers of its prompts, and the prompts.
        held: returns the tokens that a group holds aboard.
        alone: whether each prompt rides alone.
    """
    plan = lm.plan
    most = plan.sweep_tokens
    can_mask = "attention_mask" in inspect.signature(lm.model.forward).parameters and _can_pad(lm)

    windows = _windows(lm, prompts)
    begun = next(windows, [])  # what is wrong with its prompts is said before anybody rides

    def jobs() -> Iterator[_Group]:
        first = 0
        for window in itertools.chain([begun], windows):
            groups = [[n] for n in range(len(window))]
            if not alone:
                groups = _grouped(window, plan.rider_tokens, most, plan.padding_tokens, can_mask=can_mask)
            for group in groups:
                numbers, chosen = [first + n for n in group], [window[n] for n in group]
                job = functools.partial(_guarded, rider, numbers, chosen)
                yield _Group(job, held(chosen), numbers=numbers)
            first += len(window)

    found: dict[int, tuple[Continuation, ...]] = {}
    position, failed = 0, list[Exception]()
    for group, result in lm.stream(jobs(), MAX_RIDERS, most):
        numbers = group.numbers
        if isinstance(result, Exception):
            failed.append(result)
            log.warning("%s: no continuation: %s", _names(numbers), result)
            found.update((number, ()) for number in numbers)
        else:
            found.update(zip(numbers, result, strict=True))
        while position in found:
            yield found.pop(position)
            position += 1
    if failed:
        failed[0].add_note(f"{len(failed)} riders failed; the others' results were handed over")
        raise failed[0]


def _names(numbers: Sequence[int]) -> str:
    return ("prompt " if len(numbers) == 1 else "prompts ") + ", ".join(str(n + 1) for n in numbers)


def _guarded(rider: ContinueGroup, numbers: Sequence[int], prompts: Sequence[Prompt]) -> Any:
    """Return what a rider finds, or what went wrong in it alone."""
    try:
        return rider(numbers, prompts)
    except NonFiniteError as error:
        return error
    except (SlowLLMError, OSError):  # the disk failed, say: the next rider would fare no better
        raise
    except Exception as error:  # of this rider only; raised by `ride_prompts` after the others have ended
        return error


def _windows(lm: StreamedLM, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Yield checked prompts, those of a few sweeps at a time."""
    plan = lm.plan
    window, num_tokens = list[Prompt](), 0
    for number, given in enumerate(prompts, 1):
        check(lm, given, f"prompt {number}")
        prompt = replace(given, num_virtual=lm.num_virtual_tokens)
        width = prompt.width * prompt.settings.num_rows
        if prompt.num_tokens > plan.sweep_tokens or width > plan.rider_tokens:
            raise InputError(
                f"prompt {number} takes {prompt.num_tokens} tokens with all its continuations, but the model was "
                f"loaded for {min(plan.sweep_tokens, plan.rider_tokens)}; load it with job=generation.job_of(...)"
            )
        if window and num_tokens + prompt.num_tokens > WINDOW_SWEEPS * plan.sweep_tokens:
            yield window
            window, num_tokens = [], 0
        window.append(prompt)
        num_tokens += prompt.num_tokens
    if window:
        yield window


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that end and pad.

    Attributes:
        eos: that end a continuation.
        pad: that fills up rows; looked at by nobody.
    """

    eos: tuple[int, ...]
    pad: int


def special_tokens(lm: TextSide) -> SpecialTokens:
    """Return the EOS tokens of generation_config.json, else of config.json, else of the tokenizer."""
    own = getattr(getattr(lm, "model", None), "generation_config", None)
    for source in (own, lm.config.get_text_config()):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            break
    else:
        eos = lm.tokenizer.eos_token_id
    ends = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    pad = getattr(own, "pad_token_id", None)
    return SpecialTokens(ends, pad if pad is not None and pad >= 0 else ends[0] if ends else 0)


def own_defaults(lm: StreamedLM) -> Any:
    """Return the same model under a generation config that says nothing, sharing all parts.

    transformers fills what a call leaves open from the model's own config, where a checkpoint may put anything
    (Llama's says do_sample=True and a temperature of 0.6).
    """
    view = copy.copy(lm.model)
    view.generation_config = GenerationConfig()
    return view


def config_of(settings: Settings, tokens: SpecialTokens, **extra: Any) -> GenerationConfig:
    """Return transformers' form of settings; stop strings are left to `_Watch`."""
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


class Ends:
    """Knows where a continuation ends: at EOS or behind a stop string.

    Args:
        lm: whose tokenizer knows the strings' tokens.
        settings: with the stop strings.
        tokens: with EOS.
    """

    def __init__(self, lm: TextSide, settings: Settings, tokens: SpecialTokens) -> None:
        self.eos = torch.tensor(tokens.eos, dtype=torch.int64)
        self._strings: StopStringCriteria | None = None
        if settings.stop:
            try:
                self._strings = StopStringCriteria(lm.tokenizer, list(settings.stop))
            except ValueError as error:  # none of them can ever come, for want of tokens
                log.info("stop strings %s: %s", settings.stop, error)

    def at(self, ids: Tensor) -> Tensor:
        """Return (B,) bool: whether sequences (B, T) end with their last token."""
        ended = torch.isin(ids[:, -1], self.eos.to(ids.device))
        if self._strings is not None:
            ended |= self._strings(ids, None)
        return ended


class _Watch(StoppingCriteria):
    """Ends rows at stop strings, notes where each row ended, and tells of tokens as they come."""

    def __init__(
        self,
        ends: Ends,
        numbers: Sequence[int],
        width: int,
        settings: Settings,
        on_tokens: OnTokens | None,
        on_pass: Callable[[int], None] | None,
    ) -> None:
        self.lengths: dict[int, int] = {}
        self._ends, self._numbers, self._width = ends, numbers, width
        self._on_tokens, self._on_pass = on_tokens, on_pass
        self._beams, self._returned = settings.num_beams > 1, settings.num_return_sequences
        self._seen = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._beams:
            # Candidates of all prompts, likeliest first, in a number that is transformers' own affair.
            self._tell(input_ids, range(0, len(input_ids), len(input_ids) // len(self._numbers)), 1)
            return self._ends.at(input_ids)
        going = [row for row in range(len(input_ids)) if row not in self.lengths]
        # A draft brings several at once, and the first that ends the row counts.
        for length in range(self._seen + 1, input_ids.shape[1] + 1):
            for row in self._ends.at(input_ids[:, :length]).nonzero().flatten().tolist():
                self.lengths.setdefault(row, length)
        if self._on_pass is not None:
            self._on_pass(self.lengths.get(0, input_ids.shape[1]) - self._seen)
        self._seen = input_ids.shape[1]
        self._tell(input_ids, going, self._returned)
        return torch.tensor([row in self.lengths for row in range(len(input_ids))], device=input_ids.device)

    def _tell(self, input_ids: Tensor, rows: Iterable[int], per_prompt: int) -> None:
        if self._on_tokens is None:
            return
        for place, row in enumerate(rows):
            ids = input_ids[row, self._width : self.lengths.get(row)].tolist()
            if ids and ids[-1] in self._ends.eos:
                ids.pop()
            number, index = (place, 0) if self._beams else divmod(row, per_prompt)
            self._on_tokens(self._numbers[number], index, tuple(ids))


def continue_prompts(
    lm: StreamedLM,
    view: Any,
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
        view: from `own_defaults`.
        numbers: of the prompts, for `on_tokens`.
        prompts: of equal settings; one alone where tokens are drawn.
        on_tokens: see `generate`.
        on_pass: called after each pass through the model with the number of tokens that a row got.
        extra: for transformers' GenerationConfig.
    """
    settings, tokens = prompts[0].settings, special_tokens(lm)
    inputs = _inputs(lm, view, prompts, tokens.pad)
    width = inputs["input_ids"].shape[1]
    ends = Ends(lm, settings, tokens)
    watch = _Watch(ends, numbers, width, settings, on_tokens, on_pass)
    if settings.do_sample and settings.seed is not None:
        torch.manual_seed(settings.seed)  # of this rider only: the generator changes hands with the baton
    prompt = lm.soft_prompt
    with contextlib.nullcontext() if prompt is None else prompt.adding(0, width):
        output = view.generate(
            **inputs,
            generation_config=config_of(settings, tokens, **extra),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    found = []
    for row, sequence in enumerate(output.sequences):
        sources = torch.full((settings.max_new_tokens,), row)
        length = watch.lengths.get(row, len(sequence))
        if settings.num_beams > 1:
            sources = output.beam_indices[row]
            length = width + int((sources >= 0).sum())
        ended = bool(ends.at(sequence[None, :length]))
        new = sequence[width:length].tolist()
        if new and new[-1] in tokens.eos:
            new.pop()
        found.append(
            finished(lm, prompts[row // settings.num_return_sequences], new, ended, _picked(output, sources))
        )
    return [tuple(group) for group in _parts(found, settings.num_return_sequences)]


def _inputs(lm: StreamedLM, view: Any, prompts: Sequence[Prompt], pad: int) -> dict[str, Any]:
    """Return what transformers' `generate` is given: rows of ids, padded on the left so that all go on in one column.

    A soft prompt has places in the rows as well. What stands there is the first token of the text: it is not looked at,
    but penalties for repetition see it.
    """
    soft = lm.soft_prompt
    num_virtual = 0 if soft is None else soft.num_tokens
    width = num_virtual + max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = num_virtual + len(prompt.ids)
        ids[row, width - length :] = torch.tensor([prompt.ids[0]] * num_virtual + list(prompt.ids))
        mask[row, width - length :] = 1
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in inspect.signature(view.forward).parameters:
        inputs["attention_mask"] = mask
    if soft is not None and soft.virtual_ids:
        virtual = ids.clone()
        for row, prompt in enumerate(prompts):
            first = width - num_virtual - len(prompt.ids)
            virtual[row, first : first + num_virtual] = torch.tensor(soft.virtual_ids)
        inputs["inputs_embeds"] = soft.embed(lm.model, virtual)
    elif soft is not None:
        num_rows = len(prompts) * prompts[0].settings.num_rows
        inputs["past_key_values"] = soft.growing_cache(lm.config, num_rows, lm.model.dtype)
    # Where transformers draws tokens and keeps them: beside the logits.
    return {k: v.to(lm.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _picked(output: Any, sources: Tensor) -> Iterator[Tensor]:
    """Yield the raw logits (V,) of each place of one sequence, which may have gone over from beam to beam."""
    for logits, source in zip(output.logits or (), sources.tolist(), strict=False):
        yield logits[source]


def finished(
    lm: TextSide, prompt: Prompt, ids: Sequence[int], ended: bool, logits: Iterable[Tensor]
) -> Continuation:
    """Return a continuation from its ids.

    Args:
        lm: with the tokenizer.
        prompt: that is continued.
        ids: without EOS.
        ended: whether by EOS or a stop string.
        logits: (V,) raw logits of each place, where log-probabilities are asked for.
    """
    text = text_of(lm, prompt, ids)
    reason: Literal["stop", "length"] = "stop" if ended else "length"
    num_top = prompt.settings.top_log_probs
    if num_top is None:
        return Continuation(tuple(ids), text, reason)
    log_probs, tops = list[float](), list[dict[int, float]]()
    for token, row in zip(ids, logits, strict=False):  # EOS has logits, too
        scores = row.float().log_softmax(-1)
        best = scores.topk(min(num_top, len(scores)))
        log_probs.append(float(scores[token]))
        tops.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    return Continuation(tuple(ids), text, reason, tuple(log_probs), tuple(tops))


def text_of(lm: TextSide, prompt: Prompt, ids: Sequence[int]) -> str:
    """Return the text of a continuation, cut before the first stop string."""
    decode = functools.partial(
        lm.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    before, whole = str(decode(prompt.ids)), str(decode([*prompt.ids, *ids]))
    # Decoded together, because a tokenizer may drop the blank before its first token.
    start = len(before)
    if not whole.startswith(before):  # the prompt ends inside a letter
        whole, start = str(decode(list(ids))), 0
    ends = [
        place
        for stop in prompt.settings.stop
        # A stop string may begin in the prompt, but not end there.
        if (place := whole.find(stop, max(0, start - len(stop) + 1))) >= 0
    ]
    return whole[start : max(start, min(ends, default=len(whole)))]
