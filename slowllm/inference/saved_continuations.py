"""Continuations in a state folder: what is saved of a micro-batch that has ended, and what is made of it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from slowllm.errors import StateError
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.runtime.state import State

# Called as a rider with the numbers of its prompts (from 0), and the prompts.
ContinueGroup = Callable[[Sequence[int], Sequence[Prompt]], list[tuple[Continuation, ...]]]


def saved_in(state: State | None, rider: ContinueGroup) -> ContinueGroup:
    """Return a rider that saves what it continued, and continues nothing that an earlier process saved.

    Micro-batches are made of all prompts, finished ones included, so that each is the same as before, to the bit.
    """
    return rider if state is None else functools.partial(_resume_or_continue, state, rider)


def _resume_or_continue(
    state: State, rider: ContinueGroup, numbers: Sequence[int], prompts: Sequence[Prompt]
) -> list[tuple[Continuation, ...]]:
    saved = state.result(numbers[0])
    if saved is not None and not (isinstance(saved, dict) and isinstance(saved.get("numbers"), list)):
        raise StateError(
            f"{state.folder}: its continuations were saved by another version; name another folder, or delete it"
        )
    # Others, where one of the prompts has left the micro-batch because NaN came out of it.
    if saved is not None and saved["numbers"] == list(numbers):
        return [tuple(_from_json(one) for one in continuations) for continuations in saved["continuations"]]
    results = rider(numbers, prompts)
    continuations = [[_to_json(one) for one in continuations] for continuations in results]
    state.finish(numbers[0], {"numbers": list(numbers), "continuations": continuations})
    return results


def _to_json(continuation: Continuation) -> dict[str, Any]:
    tops, eos = continuation.top_log_probs, continuation.eos
    # JSON has only strings as keys.
    pairs = None if tops is None else [list(top.items()) for top in tops]
    end = None if eos is None else [*eos[:2], list(eos[2].items())]
    return {**asdict(continuation), "top_log_probs": pairs, "eos": end}


def _from_json(saved: Mapping[str, Any]) -> Continuation:
    log_probs, tops, eos = saved["log_probs"], saved["top_log_probs"], saved.get("eos")
    return Continuation(
        ids=tuple(saved["ids"]),
        text=saved["text"],
        finish_reason=saved["finish_reason"],
        log_probs=None if log_probs is None else tuple(log_probs),
        top_log_probs=None if tops is None else tuple(dict(map(tuple, top)) for top in tops),
        eos=None if eos is None else (eos[0], eos[1], dict(map(tuple, eos[2]))),
    )
