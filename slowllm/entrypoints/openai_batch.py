"""The answers to a file of requests, in OpenAI's batch format: all of them in the same sweeps, none of them twice.

With a state folder, what is done is kept by micro-batches. The same file of another run gives the same bytes, but for
``created``, which is the time at which the job was begun. Knows nothing of terminals.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from slowllm.entrypoints.openai_requests import CHAT, Refusal, Request, digest_of
from slowllm.errors import StateError
from slowllm.inference.generation import (
    Continuation,
    ContinueGroup,
    Prompt,
    continue_prompts,
    job_of,
    own_defaults,
    ride_prompts,
    text_of,
)
from slowllm.inference.text import TextSide
from slowllm.planning.job import Job, Rates
from slowllm.runtime.run_identity import run_identity, saved_packing
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM


@dataclass(frozen=True)
class ResponseMeta:
    """What every answer of a run says of where it comes from.

    Attributes:
        model: its name.
        created: seconds since 1970.
        fingerprint: of the model, its dtype and the versions it ran with.
    """

    model: str
    created: int
    fingerprint: str


def answered(
    lm: TextSide, request: Request, found: Sequence[Sequence[Continuation]], stamp: ResponseMeta
) -> dict[str, Any]:
    """Return the output line of a request.

    Args:
        lm: the model, or its description.
        request: that was done.
        found: continuations of each of its prompts.
        stamp: of this run.
    """
    is_chat = request.url == CHAT
    choices = list[dict[str, Any]]()
    for place, (prompt, row) in enumerate(zip(request.prompts, found, strict=True)):
        # Where nothing was drawn, one continuation is all of them.
        for continuation in list(row) * (request.num_choices // len(row)):
            choice: dict[str, Any] = {"index": len(choices)}
            if is_chat:
                choice["message"] = {"role": "assistant", "content": continuation.text, "refusal": None}
            else:
                choice["text"] = (request.echo[place] if request.echo else "") + continuation.text
            choice["logprobs"] = _log_probs(lm, prompt, continuation, is_chat)
            choice["finish_reason"] = continuation.finish_reason
            choices.append(choice)
    num_prompt = sum(len(prompt.ids) for prompt in request.prompts)
    num_new = sum(len(one.ids) * (request.num_choices // len(row)) for row in found for one in row)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.digest[:24]}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": stamp.created,
        "model": stamp.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
        },
        "system_fingerprint": stamp.fingerprint,
    }
    return _line(request, 200, body, None)


def refused(refusal: Refusal) -> dict[str, Any]:
    """Return the output line of a line that cannot be done; what is no request has no response."""
    return _failed(refusal, 400, refusal.code, refusal.message, refusal.param)


def _failed(
    entry: Request | Refusal, status: int, code: str, message: str, param: str | None = None
) -> dict[str, Any]:
    # Given twice, because some readers look for it under "error" and some in the response.
    kind = "invalid_request_error" if status == 400 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return _line(entry, status, body, {"code": code, "message": message})


def _line(entry: Request | Refusal, status: int, body: Any, error: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{entry.digest[:32]}", "body": body}
    return {
        "id": f"batch_req_{entry.digest[:24]}",
        "custom_id": entry.custom_id,
        "response": None if entry.custom_id is None else response,
        "error": error,
    }


def _log_probs(lm: TextSide, prompt: Prompt, continuation: Continuation, is_chat: bool) -> Any:
    """Return a choice's log-probabilities in the form of its endpoint, those behind a stop string left out."""
    if continuation.log_probs is None or continuation.top_log_probs is None:
        return None
    # No stop string cuts its text, and its last tokens are enough to know how the first new one begins.
    plain = Prompt(prompt.ids[-8:])
    ids, end = continuation.ids, len(continuation.text)
    offsets = [len(text_of(lm, plain, ids[:place])) for place in range(len(ids))]
    if len(text_of(lm, plain, ids)) > end:
        offsets = [offset for offset in offsets if offset < end]
    text = functools.partial(_token_text, lm.tokenizer)
    rows = [
        (text(token), value, [(text(other), likely) for other, likely in tops.items()])
        for token, value, tops, _ in zip(
            ids, continuation.log_probs, continuation.top_log_probs, offsets, strict=False
        )
    ]
    if is_chat:
        content = [
            {**_token(token, value), "top_logprobs": [_token(*pair) for pair in tops]}
            for token, value, tops in rows
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [token for token, _, _ in rows],
        "token_logprobs": [value for _, value, _ in rows],
        # The token itself is always among them.
        "top_logprobs": [{**_likeliest(tops), token: value} for token, value, tops in rows],
        "text_offset": offsets,
    }


def _likeliest(tops: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text, value in tops:
        found.setdefault(text, value)  # of two that read alike, such as halves of a letter, the likelier
    return found


def _token(text: str, log_prob: float) -> dict[str, Any]:
    # A token may end inside a letter; it then has no text of its own, and its bytes are not known here.
    known = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": log_prob, "bytes": known}


def _token_text(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    # A tokenizer of this kind drops the blank before its first token.
    is_behind_blank = str(tokenizer.convert_ids_to_tokens(token)).startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return " " + text if is_behind_blank and not text.startswith(" ") else text


def plan_of(
    lm: TextSide, entries: Iterable[Request | Refusal], rates: Rates, begun: Mapping[str, Any] | None = None
) -> Job:
    """Return what the plan must know of a file with at least one request that can be done.

    Args:
        lm: the model, or its description.
        entries: of the file.
        rates: of the machine.
        begun: from `state.read_job`: prompts then share micro-batches as when the job was begun.
    Raises:
        StateError: the state is another version's.
    """
    job = job_of(lm, _prompts(entries), rates)
    if begun is None:
        return job
    packing = saved_packing(begun)
    if packing is None or type(begun.get("created")) is not int:
        raise StateError("the state is another job's or version's, or damaged; name another folder")
    return replace(job, packing=packing)


def _prompts(entries: Iterable[Request | Refusal]) -> list[Prompt]:
    return [prompt for entry in entries if isinstance(entry, Request) for prompt in entry.prompts]


def describe(
    lm: StreamedLM, entries: Iterable[Request | Refusal], begun: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what the answers depend on, for `State`; ``created`` is kept from when the job was begun."""
    return run_identity(
        "batch", lm,
        requests=digest_of([[entry.number, entry.digest] for entry in entries]),
        packing=[lm.plan.rider_tokens, lm.plan.sweep_tokens, lm.plan.padding_tokens],
        created=int(time.time()) if begun is None else begun["created"],
    )  # fmt: skip


def other_models(lm: StreamedLM, entries: Iterable[Request | Refusal]) -> list[str]:
    """Return the models that requests name and that are not the one that answers them."""
    named = {entry.model for entry in entries if isinstance(entry, Request) and entry.model}
    return sorted(named - {lm.name, str(lm.folder)})


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
        state: where finished micro-batches are kept, and found again.
    """
    of_answers = digest_of([job["versions"], job["model"], job["dtype"]])
    stamp = ResponseMeta(lm.name, job["created"], f"fp_{of_answers[:10]}")
    reasons: dict[int, str] = {}
    alone = functools.partial(continue_prompts, lm, own_defaults(lm), on_tokens=None)
    rider = functools.partial(_ride, alone, state, reasons)
    found = ride_prompts(lm, _prompts(entries), rider, held=_held_tokens)
    position = 0
    for entry in entries:
        if isinstance(entry, Refusal):
            yield refused(entry)
            continue
        rows = [next(found) for _ in entry.prompts]
        why = [reasons[place] for place in range(position, position + len(rows)) if place in reasons]
        position += len(rows)
        yield _failed(entry, 500, "server_error", why[0]) if why else answered(lm, entry, rows, stamp)


def _held_tokens(prompts: Sequence[Prompt]) -> int:
    """Return the tokens that a micro-batch holds; its rows are as long as the longest."""
    return len(prompts) * max(prompt.num_tokens for prompt in prompts)


def _ride(
    rider: ContinueGroup,
    state: State | None,
    reasons: dict[int, str],
    numbers: Sequence[int],
    prompts: Sequence[Prompt],
) -> list[tuple[Continuation, ...]]:
    """Continue a micro-batch unless an earlier process did; runs as a rider.

    Micro-batches are made of all prompts, the finished ones too, so that each is what it was before, to the bit.
    """
    kept = None if state is None else state.result(numbers[0])
    if kept is not None:
        return [tuple(_restored(one) for one in row) for row in kept]
    try:
        found = rider(numbers, prompts)
    except Exception as error:  # told again by `ride_prompts`; here for the error lines of these prompts
        reasons.update((number, str(error)) for number in numbers)
        raise
    if state is not None:
        state.finish(numbers[0], [[_stored(one) for one in row] for row in found])
    return found


def _stored(one: Continuation) -> dict[str, Any]:
    # JSON has only strings for keys.
    tops = None if one.top_log_probs is None else [list(top.items()) for top in one.top_log_probs]
    return {**asdict(one), "top_log_probs": tops}


def _restored(saved: Mapping[str, Any]) -> Continuation:
    values, tops = saved["log_probs"], saved["top_log_probs"]
    return Continuation(
        ids=tuple(saved["ids"]),
        text=saved["text"],
        finish_reason=saved["finish_reason"],
        log_probs=None if values is None else tuple(values),
        top_log_probs=None if tops is None else tuple(dict(map(tuple, top)) for top in tops),
    )
