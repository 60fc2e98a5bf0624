"""The calls in which a session grew, as one message: a session that was lost is filled anew by them in one sweep.

Each call is packed as `span_messages` packs it, and its tensors' names begin with its number. Knows no peers and no caches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slowllm.errors import ProtocolError
from slowllm.modeling.span import SpanCall
from slowllm.swarm.bounded_json import dump_json
from slowllm.swarm.messages import MAX_META_BYTES, MAX_TENSORS
from slowllm.swarm.span_checks import waiting_tokens
from slowllm.swarm.span_messages import (
    Meta,
    SpanRequest,
    Tensors,
    checked_hidden,
    pack_request,
    unpack_request,
)

# Each is a thread at the server.
MAX_CALLS = 128
# Of what the message says besides the calls.
_OTHER_META_BYTES = 1024
_CALL_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")


@dataclass(frozen=True)
class ReplayRequest:
    """What a client asks of a server to fill a session.

    Attributes:
        calls: of one span, in the order in which the session grew.
        session: its name; the server makes it, or continues its own replay of it.
        step: how many passages the session has had.
        returns: whether hidden states are returned: those behind the last block, or behind every one where a call says so.
    """

    calls: Sequence[SpanCall]
    session: str
    step: int = 0
    returns: bool = True


def windows(calls: Sequence[SpanCall], max_tokens: int) -> Iterator[Sequence[SpanCall]]:
    """Yield the calls in pieces that a server takes as one request, in their order.

    Args:
        calls: of a session.
        max_tokens: rows times positions of one request, and of its answer for each block whose hidden states are wanted. A
            call with more makes a piece of its own.
    """
    piece: list[SpanCall] = []
    num_tokens = num_tensors = num_bytes = 0
    for call in calls:
        meta, tensors = pack_request(SpanRequest(call))
        own_tokens = waiting_tokens(call)
        own_bytes = len(dump_json(meta, "a call's meta", MAX_META_BYTES)) + 2
        is_full = (
            len(piece) == MAX_CALLS
            or num_tokens + own_tokens > max_tokens
            or num_tensors + len(tensors) > MAX_TENSORS
            or num_bytes + own_bytes > MAX_META_BYTES - _OTHER_META_BYTES
        )
        if piece and is_full:
            yield piece
            piece, num_tokens, num_tensors, num_bytes = [], 0, 0, 0
        piece.append(call)
        num_tokens, num_tensors = num_tokens + own_tokens, num_tensors + len(tensors)
        num_bytes += own_bytes
    if piece:
        yield piece


def pack_replay(request: ReplayRequest) -> tuple[Meta, Tensors]:
    """Return the meta and the tensors of a request."""
    tensors: Tensors = {}
    metas = []
    for number, call in enumerate(request.calls):
        meta, own = pack_request(SpanRequest(call))
        metas.append(meta)
        tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
    said = {"op": "replay", "session": request.session, "step": request.step, "returns": request.returns}
    return said | {"calls": metas}, tensors


def unpack_replay(
    meta: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> ReplayRequest:
    """Return the request of a message.

    Args:
        meta: of the message.
        tensors: of the message.
        dtype: that the server computes in.
    Raises:
        ProtocolError: it is no replay, or a call of it is damaged.
    """
    metas, session = meta.get("calls"), meta.get("session")
    step, returns = meta.get("step"), meta.get("returns")
    if not isinstance(metas, list) or not 0 < len(metas) <= MAX_CALLS:
        raise ProtocolError(f"a replay has no list of 1 to {MAX_CALLS} calls")
    if not isinstance(session, str) or not 0 < len(session) <= 64 or type(step) is not int or step < 0:
        raise ProtocolError("a replay names no session and step")
    if not isinstance(returns, bool):
        raise ProtocolError("a replay does not say whether it wants its outputs")
    own: list[Tensors] = [{} for _ in metas]
    for name, tensor in tensors.items():
        number, _, rest = name.partition("/")
        if not _CALL_NUMBER.fullmatch(number) or int(number) >= len(metas):
            raise ProtocolError(f"a replay has the tensor {name[:80]!r}, which belongs to none of its calls")
        own[int(number)][rest] = tensor
    calls = []
    for said, given in zip(metas, own, strict=True):
        if not isinstance(said, dict) or said.get("op") != "forward" or "session" in said:
            raise ProtocolError("a replay's call is no passage forward")
        calls.append(unpack_request(said, given, dtype, is_replayed=True).call)
    if len({(call.first, call.end, call.keeps_everything) for call in calls}) > 1:
        raise ProtocolError("a replay's calls are of different spans or caches")
    return ReplayRequest(calls, session, step, returns)


def pack_replayed(outputs: Sequence[Mapping[int, Tensor]]) -> Tensors:
    """Return the hidden states of each call, behind its blocks by their numbers, as tensors of a message."""
    tensors: Tensors = {}
    for number, own in enumerate(outputs):
        last = max(own)
        tensors |= {_name_of(number, block, last): hidden for block, hidden in own.items()}
    return tensors


def unpack_replayed(tensors: Mapping[str, Tensor], calls: Sequence[SpanCall]) -> list[dict[int, Tensor]]:
    """Return the hidden states of an answer for each call: behind its last block, or behind each if it asks for all.

    Raises:
        ProtocolError: they are not those that the calls asked for.
    """
    outputs = []
    for number, call in enumerate(calls):
        last, what = call.end - 1, f"the hidden states of passage {number}"
        wanted = range(call.first, call.end) if call.returns_all else (last,)
        found = {block: tensors.get(_name_of(number, block, last)) for block in wanted}
        outputs.append({block: checked_hidden(hidden, call, what) for block, hidden in found.items()})
    return outputs


def _name_of(number: int, block: int, last: int) -> str:
    return f"{number}/hidden" if block == last else f"{number}/hidden.{block}"
