"""Answer a file of requests in OpenAI's batch format: all of them share the sweeps, and none is done twice.

A state folder keeps finished micro-batches. Another run of the same file gives the same bytes but for ``created``, the
time at which the job was begun. Knows nothing of terminals.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from slowllm.entrypoints.openai_requests import CHAT, Refusal, Request
from slowllm.entrypoints.openai_responses import ResponseMeta, answered, failed, refused
from slowllm.errors import StateError
from slowllm.inference.continuation import continue_prompts, with_own_defaults
from slowllm.inference.generation import job_of, ride_prompts
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.saved_continuations import saved_in
from slowllm.inference.text import TextSide
from slowllm.planning.job import Job, Rates
from slowllm.runtime.run_identity import batch_identity, digest_of
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM


def plan_of(
    lm: TextSide, entries: Iterable[Request | Refusal], rates: Rates, begun: Mapping[str, Any] | None = None
) -> Job:
    """Return the job that the plan is made for, of a file with at least one request that is not refused.

    Args:
        lm: the model, or its `ModelInfo`.
        entries: of the file.
        rates: of the machine.
        begun: from `state.read_job`: prompts then share micro-batches as they did when the job was begun.
    Raises:
        StateError: the state is another version's.
    """
    if begun is not None and type(begun.get("created")) is not int:
        raise StateError(
            "the state is another job's or version's, or damaged; name another folder, or delete it"
        )
    return job_of(lm, _prompts(entries), rates, begun)


def _prompts(entries: Iterable[Request | Refusal]) -> list[Prompt]:
    return [prompt for entry in entries if isinstance(entry, Request) for prompt in entry.prompts]


def describe(
    lm: StreamedLM, entries: Iterable[Request | Refusal], begun: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what the answers depend on, for `State`; ``created`` is the time at which the job was begun."""
    entries = list(entries)
    return batch_identity(
        "batch", lm,
        requests=digest_of([entry.number, entry.digest] for entry in entries),
        prompts=digest_of(prompt.ids for prompt in _prompts(entries)),
        created=int(time.time()) if begun is None else begun["created"],
    )  # fmt: skip


def rendered_chats(entries: Iterable[Request | Refusal]) -> dict[str, list[int]]:
    """Return the token ids of every chat by the number of its line, for the `inputs` of a `State`.

    A chat template may name the time of day, so that it would make other ids in a later process.
    """
    return {
        str(entry.number): list(entry.prompts[0].ids)
        for entry in entries
        if isinstance(entry, Request) and entry.url == CHAT
    }


def other_models(lm: StreamedLM, entries: Iterable[Request | Refusal]) -> list[str]:
    """Return the models that requests name, other than the one that answers them."""
    models = {entry.model for entry in entries if isinstance(entry, Request) and entry.model}
    return sorted(models - {lm.name, str(lm.folder)})


def answer(
    lm: StreamedLM,
    entries: Sequence[Request | Refusal],
    job: Mapping[str, Any],
    state: State | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the output line of every entry, in order. All requests share the sweeps.

    Args:
        lm: a loaded model.
        entries: from `read_requests`.
        job: from `describe`.
        state: keeps finished micro-batches, and returns those that an earlier process finished.
    """
    fingerprint = digest_of([job["versions"], job["model"], job["dtype"]])
    meta = ResponseMeta(lm.name, job["created"], f"fp_{fingerprint[:10]}")
    rider = functools.partial(continue_prompts, lm, with_own_defaults(lm), on_tokens=None)
    results = ride_prompts(lm, _prompts(entries), saved_in(state, rider))
    for entry in entries:
        if isinstance(entry, Refusal):
            yield refused(entry)
            continue
        continuations, errors = list[tuple[Continuation, ...]](), list[Exception]()
        for _ in entry.prompts:
            result = next(results)
            if isinstance(result, Exception):
                errors.append(result)
            else:
                continuations.append(result)
        if errors:
            yield failed(entry, 500, "server_error", str(errors[0]))
        else:
            yield answered(lm, entry, continuations, meta)
