"""Answer a file of requests in OpenAI's batch format: all of them share the sweeps, and none is done twice.

A state folder keeps finished micro-batches. Another run of the same file gives the same bytes but for ``created``, the
time at which the job was begun. Knows nothing of terminals.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from slowllm.entrypoints.openai.responses import ResponseOrigin, system_fingerprint
from slowllm.entrypoints.openai_requests import Refusal, Request
from slowllm.entrypoints.openai_responses import answered, failed, refused
from slowllm.errors import NonFiniteError, StateError
from slowllm.inference.continuation import continue_prompts, with_own_defaults
from slowllm.inference.generation import job_of, ride_prompts
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.live_batch import may_share_a_batch
from slowllm.inference.prompt_scores import PromptScores, score_prompts
from slowllm.inference.saved_continuations import saved_in
from slowllm.inference.service_types import Answer
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
        if isinstance(entry, Request) and entry.is_chat
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
    origin = ResponseOrigin(lm.name, job["created"], system_fingerprint(job))
    riding = _Riding(lm, entries, state)
    results = ride_prompts(lm, _prompts(entries), riding.answer_group)
    numbers = itertools.count()
    for entry in entries:
        if isinstance(entry, Refusal):
            yield refused(entry)
            continue
        answers, errors = list[Answer](), list[Exception]()
        for _ in entry.prompts:
            number, result = next(numbers), next(results)
            if isinstance(result, Exception):
                errors.append(result)
            else:
                answers.append(Answer(result, riding.scores.pop(number, None)))
        if errors:
            yield failed(entry, 500, "server_error", str(errors[0]))
        else:
            yield answered(lm, entry, answers, origin)


class _Riding:
    """What riders do for groups of prompts, and what they find out about the prompts themselves."""

    def __init__(self, lm: StreamedLM, entries: Iterable[Request | Refusal], state: State | None) -> None:
        self.scores: dict[int, PromptScores] = {}
        self._lm, self._state = lm, state
        asked = [
            (entry.num_prompt_top, entry.only_prompt)
            for entry in entries
            if isinstance(entry, Request)
            for _ in entry.prompts
        ]
        self._num_top = [num_top for num_top, _ in asked]
        self._only_prompt = [only_prompt for _, only_prompt in asked]
        self._plain = with_own_defaults(lm)
        self._continue = saved_in(state, self._continue_group)

    def answer_group(
        self, numbers: Sequence[int], prompts: Sequence[Prompt]
    ) -> list[tuple[Continuation, ...]]:
        """Continue and score a group of prompts; runs as a rider."""
        continuations = self._continue(numbers, prompts)
        scored = [
            (number, prompt.ids)
            for number, prompt in zip(numbers, prompts, strict=True)
            if self._num_top[number] is not None
        ]
        if scored:
            try:
                found = self._score(numbers[0], scored)
            except NonFiniteError as error:
                if error.row is not None:  # as the rows of the whole group are numbered
                    error.row = numbers.index(scored[error.row][0]) * prompts[0].settings.num_rows
                raise
            self.scores.update(zip((number for number, _ in scored), found, strict=True))
        return continuations

    def _continue_group(
        self, numbers: Sequence[int], prompts: Sequence[Prompt]
    ) -> list[tuple[Continuation, ...]]:
        if all(self._only_prompt[number] for number in numbers):
            return [()] * len(numbers)
        found = continue_prompts(self._lm, self._plain, numbers, prompts, on_tokens=None)
        return [() if self._only_prompt[number] else one for number, one in zip(numbers, found, strict=True)]

    def _score(self, first: int, scored: Sequence[tuple[int, tuple[int, ...]]]) -> list[PromptScores]:
        # Continuations are saved under the number of a group's first prompt; these are behind all of them.
        place = len(self._num_top) + first
        asked = [number for number, _ in scored]
        saved = None if self._state is None else self._state.result(place)
        # Those of others, where one of the prompts has left the micro-batch.
        if saved is not None and saved["numbers"] == asked:
            return [_scores_of(*one) for one in saved["scores"]]
        num_top = [self._num_top[number] or 0 for number, _ in scored]
        groups = (
            [range(len(scored))]
            if may_share_a_batch(self._lm)
            else [range(n, n + 1) for n in range(len(scored))]
        )
        found = list[PromptScores]()
        for group in groups:
            try:
                found += score_prompts(self._lm, [scored[n][1] for n in group], [num_top[n] for n in group])
            except NonFiniteError as error:
                error.row = None if error.row is None else group[error.row]
                raise
        if self._state is not None:
            self._state.finish(place, {"numbers": asked, "scores": [_saved_scores(one) for one in found]})
        return found


def _saved_scores(scores: PromptScores) -> list[Any]:
    # JSON has only strings as keys.
    tops = [list(top.items()) for top in scores.top_log_probs]
    return [scores.log_probs, scores.is_likeliest, tops]


def _scores_of(log_probs: list[float], is_likeliest: list[bool], tops: list[Any]) -> PromptScores:
    return PromptScores(tuple(log_probs), tuple(is_likeliest), tuple(dict(map(tuple, top)) for top in tops))
