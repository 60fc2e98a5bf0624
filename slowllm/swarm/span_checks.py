"""Whether a server may compute what it is asked: within the span and the limits that it announces, on numbers.

Pure checks of a request that is well formed. Knows no network, no sessions and no models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slowllm.errors import BusyError, InputError, LimitError, NonFiniteError, counted
from slowllm.modeling.span import SpanCall
from slowllm.swarm.messages import MAX_HEADER_BYTES

# Bytes of a number on the wire; of int8 the scale of a row is counted beside.
_WIRE_BYTES = {"bfloat16": 2, "float16": 2, "int8": 1}
_SCALE_BYTES = 4


@dataclass(frozen=True)
class ServedSpan:
    """What a server serves, and how much of it.

    Attributes:
        first: the first block.
        end: the number after the last.
        max_batch_tokens: of one request.
        max_length: of one sequence, what its session holds included.
        max_waiting_tokens: of all requests that are under way or wait.
        cache_tokens: that all sessions hold together.
        session_seconds: after which an idle session ends.
        max_answer_bytes: of one answer's message.
        no_backward: why gradients are not computed; empty where they are.
    """

    first: int
    end: int
    max_batch_tokens: int
    max_length: int
    max_waiting_tokens: int
    cache_tokens: int
    session_seconds: float
    max_answer_bytes: int
    no_backward: str = ""

    @property
    def has_backward(self) -> bool:
        """Whether gradients are computed."""
        return not self.no_backward


def tokens_of(call: SpanCall) -> int:
    """Return the tokens that a call computes."""
    return call.hidden.shape[0] * call.hidden.shape[1]


def waiting_tokens(call: SpanCall) -> int:
    """Return for how many tokens a forward pass counts while it waits: those whose hidden states it will have."""
    return tokens_of(call) * _num_outputs(call)


def check_request(
    call: SpanCall,
    num_tokens: int,
    served: ServedSpan,
    hidden_shape: tuple[int, ...],
    *,
    wants_grad: bool = False,
) -> None:
    """Refuse what a server does not serve, before anything is computed.

    Args:
        call: that is asked for.
        num_tokens: of the whole request.
        served: what the server serves.
        hidden_shape: of one position's hidden states.
        wants_grad: whether gradients are asked for.
    Raises:
        InputError: the shape is not the model's.
        BusyError: it asks for blocks that are not served here.
        LimitError: it asks for too many tokens, or for gradients that are not computed.
    """
    width = call.hidden.shape[1]
    if not served.first <= call.first < call.end <= served.end:
        # No limit that lasts: who asks has an old record of a server that has moved, and should look for others.
        raise BusyError(
            f"blocks {call.first}:{call.end} are not served here; this server has {served.first}:{served.end}"
        )
    if call.hidden.shape[2:] != hidden_shape:
        raise InputError(
            f"hidden states of shape {list(call.hidden.shape)} are no (rows, positions, "
            f"{', '.join(map(str, hidden_shape))}) of this model"
        )
    if num_tokens > served.max_batch_tokens:
        raise LimitError(
            f"a request of {num_tokens:,} tokens is longer than the {served.max_batch_tokens:,} that this server announces"
        )
    if call.length + width > served.max_length:
        raise LimitError(
            f"a sequence of {call.length + width:,} tokens is longer than the {served.max_length:,} that this server takes"
        )
    if wants_grad and not served.has_backward:
        raise LimitError(f"this server computes no gradients: {served.no_backward}")


def check_answer(calls: Sequence[SpanCall], served: ServedSpan, compression: str) -> None:
    """Refuse forward passes whose hidden states do not fit an answer. Gradients are no more than what was sent.

    Args:
        calls: that are asked for in one request, of one span.
        served: what the server serves.
        compression: of the answer.
    Raises:
        LimitError: the message has both numbers of bytes.
    """
    hidden, num_rows = calls[0].hidden, sum(map(waiting_tokens, calls))
    row_bytes = hidden.shape[-1] * _WIRE_BYTES.get(compression, hidden.element_size())
    if compression == "int8":
        row_bytes += _SCALE_BYTES
    num_bytes = num_rows * math.prod(hidden.shape[2:-1]) * row_bytes + MAX_HEADER_BYTES
    if num_bytes > served.max_answer_bytes:
        raise LimitError(
            f"the hidden states behind {counted(_num_outputs(calls[0]), 'block')} for {sum(map(tokens_of, calls)):,} tokens have "
            f"{num_bytes:,} bytes, more than the {served.max_answer_bytes:,} of an answer; ask for fewer tokens or blocks at once"
        )


def check_sent(call: SpanCall) -> None:
    """Refuse NaN and infinity in what a client has sent, which the first block would call a fault of its weights.

    Gradients may have them: a scaler of losses looks for them behind the backward pass.

    Raises:
        NonFiniteError: the message names the tensor, and of hidden states the first bad position that holds text.
    """
    for name, values in _sent(call):
        if torch.isfinite(values.detach().sum(dtype=torch.float32)):
            continue
        bad = ~values.isfinite()
        if name == "hidden":
            bad = bad.flatten(2).any(-1)
            if call.mask is not None:  # what stands in padding reaches nobody
                bad &= call.mask[:, -bad.shape[1] :].bool()
        if bool(bad.any()):
            position = f" at position {bad.nonzero()[0].tolist()}" if name == "hidden" else ""
            raise NonFiniteError(
                f"{name}: {'NaN' if bool(values.isnan().any()) else 'infinity'}{position} in what the client sent; the "
                "fault is before this server's blocks"
            )


def _sent(call: SpanCall) -> Iterator[tuple[str, Tensor]]:
    yield "hidden", call.hidden
    for number, vectors in call.vectors.items():
        yield f"vectors.{number}", vectors
    for number, pair in call.pairs.items():
        yield from zip((f"keys.{number}", f"values.{number}"), pair, strict=True)


def _num_outputs(call: SpanCall) -> int:
    return call.end - call.first if call.returns_all else 1
