"""The calls of spans as messages: what stands in a message's meta, and how its tensors are named.

A client packs, a server unpacks and checks everything that its model would otherwise stumble over; and the other way
round for answers. Knows `modeling.span`; knows no bytes, no peers and no sessions' contents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slowllm.errors import ProtocolError, UnsupportedError
from slowllm.modeling.cache_labels import Move
from slowllm.modeling.span import SpanCall, SpanGrads

Meta = dict[str, Any]
Tensors = dict[str, Tensor]

MAX_LENGTH = 1 << 24
_MAX_POSITION_KINDS = 8
# After the number of a call, in a replay.
_TO_COMPRESS = re.compile(r"([0-9]+/)?(hidden|grad)([.].*)?")
_BLOCK_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class SpanRequest:
    """What a client asks of a server.

    Attributes:
        call: the passage.
        session: in which keys and values are kept; None for a passage that leaves nothing.
        step: how many passages the session has had.
        grads: of the outputs, by the block's number, for a backward pass.
    """

    call: SpanCall
    session: str | None = None
    step: int = 0
    grads: Mapping[int, Tensor] | None = None


def pack_request(request: SpanRequest) -> tuple[Meta, Tensors]:
    """Return the meta and the tensors of a request."""
    call = request.call
    tensors: Tensors = {"hidden": call.hidden}
    meta: Meta = {
        "op": "forward" if request.grads is None else "backward",
        "first": call.first, "end": call.end, "length": call.length, "records_past": call.records_past,
        "keeps_everything": call.keeps_everything, "returns_all": call.returns_all,
    }  # fmt: skip
    if request.session is not None:
        meta |= {"session": request.session, "step": request.step}
    if call.mask is not None:
        # A byte a position; the dtype is given back, because some models compute with it.
        meta["mask_dtype"] = str(call.mask.dtype).removeprefix("torch.")
        tensors["mask"] = call.mask.to(torch.uint8)
        if not bool(((call.mask == 0) | (call.mask == 1)).all()):
            raise UnsupportedError(
                "an attention_mask with other values than 0 and 1 is not sent to other machines"
            )
    if call.positions is not None:
        tensors["positions"] = call.positions
    for number, vectors in call.vectors.items():
        tensors[f"vectors.{number}"] = vectors
    for number, (keys, values) in call.pairs.items():
        tensors[f"keys.{number}"], tensors[f"values.{number}"] = keys, values
    moves: list[list[Any]] = []
    for index, move in enumerate(dict.fromkeys(map(id, call.moves.values()))):
        blocks = [number for number, other in call.moves.items() if id(other) == move]
        meant = call.moves[blocks[0]]
        moves.append([meant.length, blocks])
        if meant.rows is not None:
            tensors[f"rows.{index}"] = meant.rows
        if meant.positions is not None:
            tensors[f"positions.{index}"] = meant.positions
    if moves:
        meta["moves"] = moves
    for number, grad in (request.grads or {}).items():
        tensors[f"grad.{number}"] = grad
    return meta, tensors


def compressible(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that may be compressed: hidden states and their gradients."""
    return [name for name in tensors if _TO_COMPRESS.fullmatch(name)]


def unpack_request(
    meta: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype, *, is_replayed: bool = False
) -> SpanRequest:
    """Return the request of a message.

    Args:
        meta: of the message.
        tensors: of the message.
        dtype: that the server computes in.
        is_replayed: whether it is a call of a session that is named elsewhere.
    Raises:
        ProtocolError: it is not a request, or its tensors do not fit one another.
    """
    reader = _Reader(meta, dict(tensors))
    first, end, length = reader.number("first"), reader.number("end"), reader.number("length")
    if first >= end:
        raise ProtocolError(f"a request names the empty span of blocks {first}:{end}")
    hidden = reader.tensor("hidden", dtype)
    if hidden is None or hidden.dim() < 3 or not hidden.numel():
        raise ProtocolError("a request has no hidden states of shape (rows, positions, width)")
    batch, width = hidden.shape[:2]
    mask = reader.tensor("mask", torch.uint8)
    if mask is not None:
        if mask.dim() != 2 or len(mask) != batch or mask.shape[1] != length + width:
            raise ProtocolError(
                f"a request's mask has the shape {list(mask.shape)}, but there are {batch} rows of {width} positions"
            )
        if int(mask.max()) > 1:
            raise ProtocolError("a request's mask has other values than 0 and 1")
        mask = mask.to(_MASK_DTYPES[reader.word("mask_dtype", tuple(_MASK_DTYPES))])
    positions = reader.tensor("positions", torch.int64)
    if positions is not None:
        # Some models have several kinds of positions, in a dimension before the rows.
        if positions.dim() not in (2, 3) or positions.shape[-2:] not in ((batch, width), (1, width)):
            raise ProtocolError(
                f"a request's positions have the shape {list(positions.shape)}, but there are {batch} rows of {width}"
            )
        if positions.shape[0] > max(batch, _MAX_POSITION_KINDS) or not (
            0 <= int(positions.min()) <= int(positions.max()) <= MAX_LENGTH
        ):
            raise ProtocolError(f"a request's positions are none from 0 to {MAX_LENGTH:,}")
    vectors: dict[int, Tensor] = {}
    for number in reader.numbers_of("vectors", first, end):
        given = reader.tensor(f"vectors.{number}", None)
        assert given is not None, "its name was seen"
        if given.dim() not in (2, 3) or given.shape[-1] != hidden.shape[-1]:
            raise ProtocolError(f"vectors.{number} has the shape {list(given.shape)}")
        vectors[number] = given
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for number in reader.numbers_of("keys", first, end):
        keys, values = (reader.tensor(f"{name}.{number}", dtype) for name in ("keys", "values"))
        if (
            keys is None
            or values is None
            or keys.dim() != 4
            or values.dim() != 4
            or keys.shape[:3] != values.shape[:3]
        ):
            raise ProtocolError(
                f"keys.{number} and values.{number} are no keys and values of the same positions"
            )
        if len(keys) != batch:
            raise ProtocolError(f"keys.{number} has {len(keys)} rows, but there are {batch}")
        pairs[number] = (keys, values)
    call = SpanCall(
        first, end, hidden, mask, positions, length, vectors, pairs, reader.moves(first, end, batch, length),
        reader.flag("records_past"), reader.flag("keeps_everything"), reader.flag("returns_all"),
    )  # fmt: skip
    session = reader.optional_word("session")
    if session is not None and meta.get("op") == "backward":
        raise ProtocolError("a backward request names a session, and gradients are computed without one")
    if length and not pairs and session is None and not is_replayed:
        raise ProtocolError(f"a request without a session continues {length:,} positions")
    grads: dict[int, Tensor] | None = None
    if meta.get("op") == "backward":
        grads = {}
        for number in reader.numbers_of("grad", first, end):
            grad = reader.tensor(f"grad.{number}", dtype)
            assert grad is not None, "its name was seen"
            if grad.shape != hidden.shape:
                raise ProtocolError(
                    f"grad.{number} has the shape {list(grad.shape)}, not {list(hidden.shape)}"
                )
            grads[number] = grad
        wanted = set(range(first, end)) if call.returns_all else {end - 1}
        if not grads or not grads.keys() <= wanted:
            raise ProtocolError("a backward request has no gradients of its outputs")
    reader.refuse_rest()
    return SpanRequest(call, session, reader.number("step") if session is not None else 0, grads)


def pack_outputs(outputs: Mapping[int, Tensor]) -> Tensors:
    """Return the hidden states behind blocks as tensors of a message."""
    return {f"hidden.{number}": hidden for number, hidden in outputs.items()}


def unpack_outputs(tensors: Mapping[str, Tensor], call: SpanCall) -> dict[int, Tensor]:
    """Return the hidden states of an answer.

    Raises:
        ProtocolError: they are not those that the call asked for.
    """
    wanted = range(call.first, call.end) if call.returns_all else (call.end - 1,)
    outputs = {}
    for number in wanted:
        what = f"the hidden states behind block {number}"
        outputs[number] = checked_hidden(tensors.get(f"hidden.{number}"), call, what)
    return outputs


def checked_hidden(hidden: Tensor | None, call: SpanCall, what: str) -> Tensor:
    """Return the hidden states of an answer to a call.

    Args:
        hidden: that came; None where none came.
        call: which they are the answer to.
        what: they are, for the error.
    Raises:
        ProtocolError: they have another shape or dtype than those that were sent, or are not finite where there is text.
    """
    sent = call.hidden
    if hidden is None:
        raise ProtocolError(f"the answer lacks {what}")
    if hidden.shape != sent.shape or hidden.dtype != sent.dtype:
        raise ProtocolError(
            f"the answer has {what} as {_form_of(hidden)}, but what was sent is {_form_of(sent)}"
        )
    if not _is_finite(hidden, call.mask):
        raise ProtocolError(f"the answer has NaN or infinity in {what}")
    return hidden


def _form_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _is_finite(hidden: Tensor, mask: Tensor | None) -> bool:
    """Whether hidden states are finite where there is text; a server that computes right refuses others itself."""
    finite = hidden.isfinite()
    if bool(finite.all()):
        return True
    if mask is None or mask.dim() != 2 or len(mask) != len(hidden) or mask.shape[1] < hidden.shape[1]:
        return mask is not None
    return bool(finite[mask[:, mask.shape[1] - hidden.shape[1] :].bool()].all())


def pack_grads(grads: SpanGrads) -> Tensors:
    """Return gradients as tensors of a message."""
    tensors: Tensors = {} if grads.hidden is None else {"hidden": grads.hidden}
    tensors |= {f"vectors.{number}": grad for number, grad in grads.vectors.items()}
    for number, pair in grads.pairs.items():
        for name, grad in zip(("keys", "values"), pair, strict=True):
            if grad is not None:
                tensors[f"{name}.{number}"] = grad
    return tensors


def unpack_grads(tensors: Mapping[str, Tensor], call: SpanCall) -> SpanGrads:
    """Return the gradients of an answer.

    Raises:
        ProtocolError: that of the hidden states is missing, or one has another shape or dtype than what it is the gradient of.
    """

    def take(name: str, of: Tensor) -> Tensor | None:
        grad = tensors.get(name)
        if grad is not None and (grad.shape != of.shape or grad.dtype != of.dtype):
            raise ProtocolError(f"the gradient {name} is {_form_of(grad)}, not {_form_of(of)}")
        return grad

    # The outputs depend on them in any case; on vectors and keys only where there are positions for them.
    if "hidden" not in tensors:
        raise ProtocolError("the answer lacks the gradient of the hidden states")

    return SpanGrads(
        take("hidden", call.hidden),
        {n: grad for n, of in call.vectors.items() if (grad := take(f"vectors.{n}", of)) is not None},
        {
            n: (take(f"keys.{n}", keys), take(f"values.{n}", values))
            for n, (keys, values) in call.pairs.items()
        },
    )


_MASK_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int64, torch.bool, torch.int32, torch.float32)
}


class _Reader:
    """Takes the fields of a message, each checked for its kind."""

    def __init__(self, meta: Mapping[str, Any], tensors: Tensors) -> None:
        self._meta, self._left = meta, tensors

    def number(self, name: str) -> int:
        value = self._meta.get(name)
        if type(value) is not int or not 0 <= value <= MAX_LENGTH:
            raise ProtocolError(f"a request's {name} is no number from 0 to {MAX_LENGTH:,}")
        return value

    def flag(self, name: str) -> bool:
        value = self._meta.get(name, False)
        if not isinstance(value, bool):
            raise ProtocolError(f"a request's {name} is neither true nor false")
        return value

    def word(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self._meta.get(name)
        if value not in allowed:
            raise ProtocolError(f"a request's {name} is none of {', '.join(allowed)}")
        return str(value)

    def optional_word(self, name: str) -> str | None:
        value = self._meta.get(name)
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= 64):
            raise ProtocolError(f"a request's {name} is no name of 64 letters at most")
        return value

    def tensor(self, name: str, dtype: torch.dtype | None) -> Tensor | None:
        tensor = self._left.pop(name, None)
        if tensor is None:
            return None
        if (dtype is not None and tensor.dtype != dtype) or (
            dtype is None and not tensor.is_floating_point()
        ):
            raise ProtocolError(
                f"a request's {name} has the dtype {str(tensor.dtype).removeprefix('torch.')}; this server takes "
                f"{'floating numbers' if dtype is None else str(dtype).removeprefix('torch.')}"
            )
        return tensor

    def numbers_of(self, prefix: str, first: int, end: int) -> list[int]:
        """Return the blocks for which there is a tensor of this prefix."""
        names = [name for name in self._left if name.startswith(f"{prefix}.")]
        numbers = [
            int(rest) if _BLOCK_NUMBER.fullmatch(rest := name[len(prefix) + 1 :]) else -1 for name in names
        ]
        if not all(first <= number < end for number in numbers):
            raise ProtocolError(f"a request has {prefix} for blocks outside of {first}:{end}")
        return sorted(numbers)

    def moves(self, first: int, end: int, batch: int, length: int) -> dict[int, Move]:
        listed = self._meta.get("moves", [])
        found: dict[int, Move] = {}
        if not isinstance(listed, list):
            raise ProtocolError("a request's moves are no list")
        for index, entry in enumerate(listed):
            if not (
                isinstance(entry, list)
                and len(entry) == 2
                and type(entry[0]) is int
                and 0 <= entry[0] <= length
                and isinstance(entry[1], list)
                and all(type(number) is int and first <= number < end for number in entry[1])
            ):
                raise ProtocolError(f"a request's move {index} names no length and blocks of {first}:{end}")
            rows = self.tensor(f"rows.{index}", torch.int64)
            positions = self.tensor(f"positions.{index}", torch.int64)
            shape = (None if rows is None else rows.dim(), None if positions is None else positions.shape)
            fits = shape in ((None, None), (1, None)) or (
                rows is not None and positions is not None and rows.dim() == 2 and rows.shape == positions.shape
                and rows.shape[1] == entry[0]
            )  # fmt: skip
            # Before anything is moved: a row may be named any number of times.
            if not fits or (rows is not None and len(rows) != batch):
                raise ProtocolError(
                    f"a request's move {index} has rows and positions that do not fit each other"
                )
            found.update(dict.fromkeys(entry[1], Move(entry[0], rows, positions)))
        return found

    def refuse_rest(self) -> None:
        if self._left:
            raise ProtocolError(f"a request has the unknown tensor {next(iter(self._left))[:80]!r}")
