"""Embedding by rows; the head over vocabulary chunks; log-probabilities without logits.

The two matrices of vocabulary size stay out of memory. The embedding is transformers' own module on a
memory-mapped parameter: a look-up touches only its rows. The head is a row of stops, each an equal part of the
vocabulary. Log-probabilities are gathered chunk by chunk with an online softmax, so that tokens x vocabulary is
never held.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from slowllm.errors import ArchitectureError, InputError
from slowllm.modeling.streamed_block import check_finite
from slowllm.runtime.state import journal
from slowllm.storage.spans import Placement, take_rows
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.cast_stops import SwappedWeight
from slowllm.streaming.riders import reach
from slowllm.streaming.stops import Weights

log = logging.getLogger(__name__)

# The head is not cut into chunks smaller than this: a GEMM of few columns is slow, and its rounding differs from
# that of the whole (measured: chunks of 6,000 columns and more give the bits of the whole at a width of 4096).
MIN_CHUNK_BYTES = 64 << 20
# Columns of logits that are held in fp32 at a time: 8,192 x 1,024 tokens are 34 MB.
TILE_COLUMNS = 8192

_taken: ContextVar[list[Tensor] | None] = ContextVar("taken", default=None)

Finish = Callable[[Tensor], Tensor]
# From token ids (K,) to their rows (K, H) of the head.
Lookup = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """What was found of N tokens.

    Attributes:
        log_probs: (N,) float32, in nats.
        is_likeliest: (N,) bool, whether the token is the argmax: the first of the likeliest.
    """

    log_probs: Tensor
    is_likeliest: Tensor


def cut_head(placement: Placement, max_bytes: int) -> list[Placement]:
    """Cut the head's matrix (V, H) into the fewest equal chunks of rows that are at most `max_bytes`."""
    num_rows = placement.shape[0]
    num_chunks = max(1, -(-placement.num_bytes // max(max_bytes, MIN_CHUNK_BYTES)))
    rows = -(-num_rows // num_chunks // 64) * 64
    starts = range(0, num_rows, rows)
    return [
        take_rows(placement, f"{placement.name}[{start}:]", start, min(start + rows, num_rows))
        for start in starts
    ]


class HostEmbedding(nn.Embedding):
    """Mixin for an input embedding whose rows are looked up in the host's memory, for a model that is on a device."""

    _device: torch.device

    __call__ = nn.Module.__call__

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ids, which may be anywhere, on the model's device."""
        return super().forward(input.cpu()).to(self._device)


def stream_embedding(
    embedding: nn.Module, weight: Tensor, compute_dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Put a mapped weight (V, H) into a model's input embedding, which stays a module of its own class.

    A weight stored in another dtype than `compute_dtype` is looked up as stored, and only its rows are cast.

    Args:
        embedding: of the model.
        weight: in the host's memory.
        compute_dtype: of the model.
        device: where its rows are wanted; None for the processor.
    Raises:
        ArchitectureError: it is no `nn.Embedding`.
    """
    if not isinstance(embedding, nn.Embedding):
        raise ArchitectureError(f"{type(embedding).__name__}: the input embedding is no nn.Embedding")
    if weight.dtype != compute_dtype:
        weight = SwappedWeight(weight, compute_dtype, torch.empty(0, dtype=torch.uint8))
    embedding._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if device is not None:
        kind = type(embedding)
        embedding.__class__ = type(kind.__name__, (HostEmbedding, kind), {"__module__": __name__})
        cast(HostEmbedding, embedding)._device = device


class StreamedHead(nn.Linear):
    """Mixin for a model's output embedding whose matrix comes by in chunks; made by `stream_head`."""

    _carousel: Carousel
    _stops: tuple[int, ...]
    _rows: tuple[tuple[int, int], ...]
    _finish: Finish | None
    _lookup: Lookup | None

    __call__ = nn.Module.__call__

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., H)."""
        taken = _taken.get()
        if taken is not None:
            taken.append(input)
            return input.new_zeros(*input.shape[:-1], 0)
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _HeadFunction.apply(self, input))  # type: ignore[no-untyped-call]
        return self._logits(input)

    def _logits(self, hidden: Tensor, *, comes_back: bool = False) -> Tensor:
        # Flat: by the strides of a slice of positions, torch may choose a product in a batch and copy the weight.
        flat = hidden.reshape(-1, hidden.shape[-1])
        parts = []
        for number, stop in enumerate(self._stops):

            def work(weights: Weights, number: int = number) -> Tensor:
                part = F.linear(flat, self._weight(weights), self._bias(number))
                part = part.view(*hidden.shape[:-1], -1)
                check_finite("the head", part, infinity_is_legal=True)
                return part

            parts.append(self._carousel.visit(stop, "up", work, comes_back=comes_back))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _weight(self, weights: Weights) -> Tensor:
        (weight,) = weights.values()
        return weight

    def _bias(self, number: int) -> Tensor | None:
        start, stop = self._rows[number]
        return None if self.bias is None else self.bias[start:stop]

    def gather(self, hidden: Tensor, which: Tensor, tokens: Tensor) -> Found:
        """Return the log-probabilities of tokens after some hidden states; see `log_probs_at`.

        Args:
            hidden: (P, H), after the last block.
            which: (N,) int64, the hidden state that each token follows.
            tokens: (N,) int64.
        """
        assert self._finish is not None, "log_probs_at() takes the long way for such a model"
        which, tokens = which.to(hidden.device), tokens.to(hidden.device)
        highest = hidden.new_full((len(hidden),), -math.inf, dtype=torch.float32)
        total = torch.zeros_like(highest)
        likeliest = torch.zeros_like(highest, dtype=torch.int64)
        found = highest.new_full((len(tokens),), math.nan)
        sums = (highest, total, likeliest, found)
        kept = journal.get()
        for number, stop in enumerate(self._stops if len(tokens) else ()):
            if kept is not None and (saved := kept.sums_of(number)):
                for ours, theirs in zip(sums, saved, strict=True):
                    ours.copy_(theirs)
                continue

            def work(weights: Weights, number: int = number) -> None:
                weight, bias = self._weight(weights), self._bias(number)
                first = self._rows[number][0]
                for column in range(0, len(weight), TILE_COLUMNS):
                    tile = slice(column, min(column + TILE_COLUMNS, len(weight)))
                    logits = self._tile(hidden, weight[tile], None if bias is None else bias[tile])
                    # An online softmax (Milakov and Gimelshein, 2018): the sum is kept relative to the highest.
                    best = logits.max(-1)
                    likeliest.copy_(
                        torch.where(best.values > highest, best.indices + first + column, likeliest)
                    )
                    peak = torch.maximum(highest, best.values)
                    scale = torch.where(peak == highest, 1.0, (highest - peak).exp())
                    place = tokens - (first + column)
                    here = ((place >= 0) & (place < logits.shape[-1])).nonzero().flatten()
                    found[here] = logits[which[here], place[here]]
                    total.mul_(scale).add_(logits.sub_(peak[:, None]).exp_().sum(-1))
                    highest.copy_(peak)

            self._carousel.visit(stop, "up", work)
            if kept is not None:
                kept.pass_chunk(number, sums)
        scores = found - (highest + total.log())[which]
        check_finite("the head", scores, infinity_is_legal=True)
        return Found(scores, tokens == likeliest[which])

    def compare(self, hidden: Tensor, which: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (N,) of tokens, up to a constant for each hidden state; see `log_probs_at`."""
        assert self._finish is not None, "log_probs_at() takes the long way for such a model"
        assert self._lookup is not None, "log_probs_at() takes the long way for such a model"
        wanted, places = tokens.unique(return_inverse=True)
        weight = self._lookup(wanted).to(hidden.device, hidden.dtype)
        logits = self._tile(hidden, weight, None if self.bias is None else self.bias[wanted])
        return logits[which, places]

    def _tile(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self._finish is not None, "checked by log_probs"
        logits = self._finish(F.linear(rows, weight, bias)[None])[0].float()
        check_finite("the head", logits[None], infinity_is_legal=True)
        return logits


class _HeadFunction(torch.autograd.Function):
    """Logits whose backward visits the head's stops again."""

    @staticmethod
    def forward(ctx: Any, head: StreamedHead, hidden: Tensor) -> Tensor:
        ctx.head = head
        ctx.dtype = hidden.dtype
        ctx.is_autocast = torch.is_autocast_enabled(hidden.device.type)
        return head._logits(hidden, comes_back=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        head: StreamedHead = ctx.head
        parts = []
        # From the last chunk to the first: the last is still in memory.
        for number in reversed(range(len(head._stops))):
            start, stop = head._rows[number]

            def work(weights: Weights, start: int = start, stop: int = stop) -> Tensor:
                weight = head._weight(weights)
                part = grad[..., start:stop].flatten(0, -2)  # flat, as in `_logits`
                if ctx.is_autocast:
                    return part @ weight.to(part.dtype)
                return part.to(weight.dtype) @ weight

            parts.append(head._carousel.visit(head._stops[number], "down", work))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return None, total.view(*grad.shape[:-1], -1).to(ctx.dtype)


def stream_head(
    head: nn.Linear,
    carousel: Carousel,
    chunks: Sequence[Placement],
    first_stop: int,
    finish: Finish | None,
    lookup: Lookup | None = None,
) -> None:
    """Turn a model's output embedding into stops.

    Args:
        head: its bias, if any, is real; its weight is only looked at for its shape.
        carousel: that brings the chunks.
        chunks: from `cut_head`, in order.
        first_stop: the number of the first.
        finish: from `find_finish`.
        lookup: reads single rows; None where they cannot be had.
    """
    kind = type(head)
    head.__class__ = type(f"Streamed{kind.__name__}", (StreamedHead, kind), {"__module__": __name__})
    streamed = cast(StreamedHead, head)
    streamed._carousel = carousel
    streamed._stops = tuple(range(first_stop, first_stop + len(chunks)))
    ends = [0]
    for chunk in chunks:
        ends.append(ends[-1] + chunk.shape[0])
    streamed._rows = tuple(itertools.pairwise(ends))
    streamed._finish, streamed._lookup = finish, lookup


class _Returns(nn.Module):
    """A module that answers every call with one value.

    Looks for all else like `likeness`, whose dtype a forward may ask for; without one, like itself all the way
    down, for a forward that calls a part of its base model.
    """

    def __init__(self, value: Any, likeness: nn.Module | None = None) -> None:
        super().__init__()
        self.__dict__["value"], self.__dict__["likeness"] = value, likeness

    def __getattr__(self, name: str) -> Any:
        return self if self.__dict__["likeness"] is None else getattr(self.__dict__["likeness"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


class _Output(BaseModelOutputWithPast):
    """A base model's output that has nothing but hidden states; what else is asked for is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def find_finish(model: PreTrainedModel) -> Finish | None:
    """Return what the model does to logits after its head: soft caps, scales, casts.

    It is the model's own forward, with a base model and a head that only hand over what they were given. Returns
    None where that cannot be separated from the head, or is not element by element; log-probabilities then take
    the logits as a whole.
    """
    kind, head = type(model), model.get_output_embeddings()
    names = [name for name, module in model.named_children() if module is head]
    base = model.base_model_prefix
    if len(names) != 1 or base not in model._modules:
        log.info("%s: its head is no child of the model; log-probabilities take whole logits", kind.__name__)
        return None
    shim = copy.copy(model)
    shim.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def finish(logits: Tensor) -> Tensor:
        hidden = logits.new_zeros(*logits.shape[:-1], 1)
        shim._modules[base] = _Returns(_Output(last_hidden_state=cast(Any, hidden)))
        shim._modules[names[0]] = _Returns(logits, head)
        return cast(Tensor, kind.forward(shim, input_ids=ids, use_cache=False, return_dict=True).logits)

    probe = torch.linspace(-40.0, 40.0, 24).view(1, 3, 8)
    try:
        with torch.no_grad():
            whole = finish(probe)
            parts = torch.cat([finish(probe[..., :5]), finish(probe[..., 5:])], -1)
            separable = torch.equal(whole, parts) and finish(probe[..., :0]).shape[-1] == 0
    except Exception as error:  # whatever a model's forward may trip over on such stubs
        log.info("%s: %r; log-probabilities take whole logits", kind.__name__, error)
        return None
    if not separable:
        log.info("%s: finishes its logits together; log-probabilities take whole logits", kind.__name__)
        return None
    return finish


def last_hidden(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return what a call of a streamed model hands to its head, (B, T, H), without a visit to the head."""
    taken: list[Tensor] = []
    token = _taken.set(taken)
    try:
        model(**inputs)
    finally:
        _taken.reset(token)
    return taken[0]


def log_probs(model: PreTrainedModel, targets: Tensor, **inputs: Any) -> Tensor:
    """Return the log-probability of each target token under a streamed model, by one call of it.

    Args:
        model: a streamed model.
        targets: (B, T) int64, the token expected after each position; -100 marks positions that are not scored.
        inputs: of the model's forward, `input_ids` (B, T) among them.
    Returns:
        (B, T) float32 on the processor, zero where not scored.
    Raises:
        InputError: a target is no token of the vocabulary.
        NonFiniteError: NaN came out of a block or the head.
    """
    targets = targets.cpu()
    wanted = targets != -100
    places = wanted.nonzero()
    found = log_probs_at(model, places[:, 0], places[:, 1], targets[wanted], **inputs).log_probs
    scores = torch.zeros(targets.shape, dtype=torch.float32)
    scores[wanted] = found
    return scores


def log_probs_at(
    model: PreTrainedModel,
    rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    *,
    relative: bool = False,
    **inputs: Any,
) -> Found:
    """Return the log-probability of any tokens after any positions, by one call of a streamed model.

    Args:
        model: a streamed model.
        rows: (N,) int64, of the batch.
        positions: (N,) int64, after which each token is expected; several tokens may be asked for after one.
        tokens: (N,) int64.
        relative: whether it is enough to know the tokens asked for after one position against one another: their
            log-probabilities may all be off by the same number. Then only their rows of the head are read, where
            the model allows it, and `is_likeliest` is all false.
        inputs: of the model's forward, `input_ids` (B, T) among them.
    Returns:
        what was found, on the processor.
    Raises:
        InputError: a token is not in the vocabulary.
        NonFiniteError: NaN came out of a block or the head.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "log_probs_at needs a streamed model"
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < head.out_features:
        raise InputError(
            f"targets lie between {int(tokens.min())} and {int(tokens.max())}, but there are {head.out_features} tokens"
        )
    inputs = {"use_cache": False, **inputs}
    with torch.no_grad():
        if head._finish is None:
            scores = model(**inputs).logits[rows, positions].float().log_softmax(-1)
            wanted = tokens.to(scores.device)
            return _on_host(scores.gather(-1, wanted[:, None])[:, 0], scores.argmax(-1) == wanted)
        wanted, which = torch.stack([rows, positions], -1).unique(dim=0, return_inverse=True)
        few = (relative and head._lookup is not None) or not len(tokens)
        # Nobody comes to the head's stops, so they need not be read ahead.
        hint = reach.set(replace(reach.get(), end=head._stops[0])) if few else None
        try:
            hidden = last_hidden(model, inputs)[wanted[:, 0], wanted[:, 1]]
        finally:
            if hint is not None:
                reach.reset(hint)
        if not len(tokens):
            return Found(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        if few:
            return _on_host(head.compare(hidden, which, tokens), torch.zeros(len(tokens), dtype=torch.bool))
        found = head.gather(hidden, which, tokens)
        return _on_host(found.log_probs, found.is_likeliest)


def _on_host(log_probs: Tensor, is_likeliest: Tensor) -> Found:
    return Found(log_probs.cpu(), is_likeliest.cpu())
