"""Continue many prompts, one sweep for each token of all of them.

Prompts of like length and equal settings share a micro-batch, and each micro-batch is a rider that runs transformers'
own `generate()` with a cache of its own (see `continuation`). A rider whose prompts have all ended leaves, and the next
one boards. A prompt of which beams are sampled rides alone, because `generate` draws for all rows with one generator.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slowllm.errors import InputError, NonFiniteError, SlowLLMError
from slowllm.inference.continuation import continue_prompts, with_own_defaults
from slowllm.inference.generation_types import Continuation, OnTokens, Prompt, Settings, check_prompt
from slowllm.inference.sampling import draws_by_row
from slowllm.inference.saved_continuations import ContinueGroup, saved_in
from slowllm.inference.stopping import MAX_CRITERIA, stop_criteria
from slowllm.inference.text import TextSide
from slowllm.modeling.batching import batch_rule
from slowllm.planning.host_plan import MAX_RIDER_TOKENS, padding_worth
from slowllm.planning.job import ContinuedRow, Job, Rates
from slowllm.planning.packing import pack
from slowllm.runtime.run_identity import packed_as_begun
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.riders import Sized

log = logging.getLogger(__name__)

# Each rider is a thread, which costs a little memory beside its tokens.
MAX_RIDERS = 256
# Prompts are packed within a window of this many sweeps' tokens, so that any number of prompts can stream through.
WINDOW_SWEEPS = 4
# Copies of a row's logits while its next token is drawn: values, probabilities, and what sorting for top_p takes, with indices of
# eight bytes.
CHOICE_COPIES = 12


def job_of(
    lm: TextSide,
    prompts: Iterable[Prompt],
    rates: Rates | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Job:
    """Return the job that the plan is made for, once every prompt is checked.

    Args:
        lm: the model, or its `ModelInfo`.
        prompts: of the whole job.
        rates: of the machine, which say how much padding is worth a micro-batch.
        begun: from `state.read_job`: prompts then share micro-batches as they did when the job was begun.
    Raises:
        InputError: there are no prompts, or one cannot be continued.
        StateError: the state is another version's.
    """
    prompts = [replace(prompt, num_virtual=lm.num_virtual_tokens) for prompt in prompts]
    if not prompts:
        raise InputError("there are no prompts to continue")
    for number, prompt in enumerate(prompts, 1):
        check_prompt(lm, prompt, f"prompt {number}")
    padding = padding_worth(rates or Rates())
    groups = _group(lm, prompts, MAX_RIDER_TOKENS, 1 << 62, padding)
    rows: Counter[ContinuedRow] = Counter()
    for prompt in prompts:
        rows[row_of(prompt.width, prompt.settings)] += prompt.settings.num_rows
    if chosen := [prompt.settings.num_rows for prompt in prompts if draws_by_row(prompt.settings)]:
        rows[ContinuedRow(1, 2, 0, CHOICE_COPIES)] += max(chosen)
    # Made here, where the plan finds their tables in the process's memory.
    for stop in list(dict.fromkeys(prompt.settings.stop for prompt in prompts))[:MAX_CRITERIA]:
        stop_criteria(lm.tokenizer, stop)
    job = Job(
        num_tokens=sum(_held_tokens([prompts[n] for n in group]) for group in groups),
        # A rider takes a prompt with all its rows, or not at all.
        longest=max(prompt.num_tokens for prompt in prompts),
        forward_only=True,
        keeps_results=False,
        rows=tuple(rows.items()),
        num_passes=max(prompt.settings.max_new_tokens for prompt in prompts),
    )
    return packed_as_begun(job, begun)


def row_of(width: int, settings: Settings) -> ContinuedRow:
    """Return what is held of a row that is continued: the copies of its logits that transformers' `generate` makes.

    Float32 logits and scores stay until those of the next token replace them. What a `TokenChooser` takes is counted
    for one prompt at a time, with `CHOICE_COPIES`.
    """
    num_held, num_scratch = 2, 4
    if settings.num_beams > 1:
        num_held, num_scratch = 3, 6
    if settings.top_log_probs is not None:
        num_held += settings.max_new_tokens
    return ContinuedRow(width, width + settings.max_new_tokens, num_held, num_scratch)


def _held_tokens(prompts: Sequence[Prompt]) -> int:
    """Return the tokens that a micro-batch holds at its end."""
    settings = prompts[0].settings
    width = max(prompt.width for prompt in prompts)
    return len(prompts) * settings.num_rows * (width + settings.max_new_tokens)


def _can_pad(lm: TextSide) -> bool:
    """Whether rows of one batch may begin in different columns; vectors or keys of a soft prompt would not move along."""
    return (lm.soft_prompt is None or lm.soft_prompt.kind == "shallow") and batch_rule(lm.config).pads_left


def _group(
    lm: TextSide, prompts: Sequence[Prompt], rider_tokens: int, sweep_tokens: int, padding_tokens: int
) -> list[list[int]]:
    """Divide prompts into micro-batches; return the prompts' numbers, each exactly once."""
    can_pad, rule = _can_pad(lm), batch_rule(lm.config)
    alike: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(prompts):
        key: Hashable = number
        samples_beams = prompt.settings.do_sample and prompt.settings.num_beams > 1
        if not (samples_beams or rule.rides_alone):
            width_class = rule.growing_class(prompt.width, prompt.settings.max_new_tokens)
            key = (replace(prompt.settings, seed=None), width_class if can_pad else len(prompt.ids))
        alike.setdefault(key, []).append(number)
    groups = []
    for numbers in alike.values():
        settings = prompts[numbers[0]].settings
        widths = [prompts[n].width for n in numbers]
        for batch in pack(widths, rider_tokens // settings.num_rows, padding_tokens):
            row_tokens = settings.num_rows * (widths[batch[0]] + settings.max_new_tokens)
            size = max(1, sweep_tokens // row_tokens)
            for start in range(0, len(batch), size):
                groups.append(sorted(numbers[i] for i in batch[start : start + size]))
    # Riders board by their first prompt, because results are handed over in order.
    return sorted(groups, key=lambda group: group[0])


def generate(
    lm: StreamedLM,
    prompts: Iterable[Prompt],
    *,
    on_tokens: OnTokens | None = None,
    state: State | None = None,
) -> Iterator[tuple[Continuation, ...]]:
    """Yield the continuations of every prompt, in order, in as few sweeps as the plan allows.

    Prompts are drawn as riders leave, so their number is no limit. An error in one rider, such as a number too large
    for the compute dtype, costs the others nothing: its prompts get an empty tuple each, and the error is raised
    after the last prompt.

    Args:
        lm: a loaded model.
        prompts: drawn here for the first window, then on the carousel's thread, so it must not call the model.
        on_tokens: called as tokens come, from the first one again where another prompt leaves the micro-batch; must not call
            the model.
        state: keeps finished micro-batches, and returns those that an earlier process finished.
    Raises:
        InputError: a prompt is empty, or with its continuation longer than the model or the plan takes.
    """
    rider = functools.partial(continue_prompts, lm, with_own_defaults(lm), on_tokens=on_tokens)
    return raise_at_end(ride_prompts(lm, prompts, saved_in(state, rider)))


def raise_at_end(
    results: Iterable[tuple[Continuation, ...] | Exception],
) -> Iterator[tuple[Continuation, ...]]:
    """Yield the results of `ride_prompts`, an empty tuple for each error; raise the first error after the last."""
    errors: dict[int, Exception] = {}
    for result in results:
        if isinstance(result, Exception):
            errors[id(result)] = result
            yield ()
        else:
            yield result
    for first in errors.values():
        first.add_note(f"{len(errors)} riders failed; the others' results were handed over")
        raise first


@dataclass(frozen=True, kw_only=True)
class _GroupJob(Sized):
    """The job that continues a group of prompts; `numbers` are those of the prompts."""

    numbers: list[int]


def ride_prompts(
    lm: StreamedLM,
    prompts: Iterable[Prompt],
    rider: ContinueGroup,
    *,
    tree_tokens: int = 0,
) -> Iterator[tuple[Continuation, ...] | Exception]:
    """Group prompts, have riders continue each group, and yield the results in the prompts' order.

    An error in one rider is logged and yielded in place of the continuations of each prompt that it concerns.

    Args:
        lm: a loaded model.
        prompts: as for `generate`.
        rider: continues a group.
        tree_tokens: most tokens that a rider drafts; each prompt then rides alone.
    """
    plan, rule = lm.plan, batch_rule(lm.config)
    for reason in rule.reasons():
        log.info("%s: %s", lm.config.model_type, reason)
    windows = _windows(lm, prompts)
    first_window = next(
        windows, []
    )  # drawn here, so that errors in its prompts are raised before anything rides

    def jobs() -> Iterator[_GroupJob]:
        num_before = 0
        for window in itertools.chain([first_window], windows):
            groups = [[n] for n in range(len(window))]
            if not tree_tokens:
                groups = _group(lm, window, plan.rider_tokens, plan.sweep_tokens, plan.padding_tokens)
            for group in groups:
                numbers, members = [num_before + n for n in group], [window[n] for n in group]
                job = functools.partial(_run_rider, rider, numbers, members)
                yield _GroupJob(job, _held_tokens(members) + tree_tokens, numbers=numbers)
            num_before += len(window)

    finished: dict[int, tuple[Continuation, ...] | Exception] = {}
    num_yielded = 0
    for job, result in lm.stream(jobs(), 1 if rule.takes_turns else MAX_RIDERS, plan.sweep_tokens):
        for error in {id(one): one for one in result if isinstance(one, Exception)}.values():
            failed = [number for number, one in zip(job.numbers, result, strict=True) if one is error]
            log.warning("%s: no continuation: %s", _names(failed), error)
        finished.update(zip(job.numbers, result, strict=True))
        while num_yielded in finished:
            yield finished.pop(num_yielded)
            num_yielded += 1


def _names(numbers: Sequence[int]) -> str:
    return ("prompt " if len(numbers) == 1 else "prompts ") + ", ".join(str(n + 1) for n in numbers)


def _run_rider(
    rider: ContinueGroup, numbers: Sequence[int], prompts: Sequence[Prompt]
) -> list[tuple[Continuation, ...] | Exception]:
    """Return the continuations of each prompt, or the error where it concerns this rider only.

    A prompt of which NaN comes out leaves its micro-batch, and the others begin anew.
    """
    try:
        return list(rider(numbers, prompts))
    except NonFiniteError as error:
        bad = len(prompts) if error.row is None else error.row // prompts[0].settings.num_rows
        if len(prompts) == 1 or bad >= len(prompts):
            return [error] * len(prompts)
        log.info("prompt %d leaves its micro-batch: %s", numbers[bad] + 1, error)
        others = [place for place in range(len(prompts)) if place != bad]
        found = _run_rider(rider, [numbers[place] for place in others], [prompts[place] for place in others])
        found.insert(bad, error)
        return found
    except (SlowLLMError, OSError):  # the next rider would fail as well, say because the disk does
        raise
    except Exception as error:  # raised by `raise_at_end`
        return [error] * len(prompts)


def _windows(lm: StreamedLM, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Yield checked prompts in windows of a few sweeps' tokens."""
    plan = lm.plan
    window, num_tokens = list[Prompt](), 0
    for number, given in enumerate(prompts, 1):
        check_prompt(lm, given, f"prompt {number}")
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
