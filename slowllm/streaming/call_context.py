"""What a caller says about one call of the model without passing it through transformers' own code.

One frozen value in one context variable. It travels with riders to the carousel's thread (`thread_context`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from slowllm.streaming.hints import Reach
from slowllm.streaming.way import Way


@dataclass
class OwnerCall:
    """One call of the module that owns the blocks, for as long as it lasts.

    Attributes:
        arguments: what the module was called with, by name, without those that are None.
        outputs: of blocks that were computed elsewhere ahead of their turn, by their numbers.
        route: the hops of this call, where blocks are elsewhere.
        time: that the call has for all of its hops; None before the first.
        past_length: the position of the call's first column; None until somebody counted it.
    """

    arguments: Mapping[str, Any]
    outputs: dict[int, Any] = field(default_factory=dict)
    route: tuple[Any, ...] = ()
    time: Any = None
    past_length: int | None = None


@dataclass(frozen=True)
class CallContext:
    """Hidden arguments of a call of a streamed model.

    Attributes:
        reach: the stops that the call will visit.
        way: the blocks and chunks of the head that it computes, and what stands for the others.
        owner_call: the call of the module that owns the blocks; None outside of one.
        text_mask: the (B, T) attention mask: which positions hold text; None where all do. `finite.UNKNOWN_MASK`
            stands for a mask of another form.
        edit_input: given a block's number and hidden states (B, T, H), returns those that the block gets.
        vectors: of a deep prompt, (P, H) or (B, P, H) for each block, as `edit_input` adds them.
        final_length: positions that a cache of these calls will hold at its end; 0 where nobody knows.
        take_hidden: given the hidden states (B, T, H) after the last block, which then pass no head.
        late_nodes: takes the nodes of a block's graph whose gradients are computed before autograd runs for the whole block
            (`recompute.LateNode`), in order; None where no graph is made.
    """

    reach: Reach = field(default_factory=Reach)
    way: Way = field(default_factory=Way)
    owner_call: OwnerCall | None = None
    text_mask: Tensor | None = None
    edit_input: Callable[[int, Tensor], Tensor] | None = None
    vectors: tuple[Tensor | None, ...] = ()
    final_length: int = 0
    take_hidden: Callable[[Tensor], None] | None = None
    late_nodes: list[Any] | None = None


_context: ContextVar[CallContext] = ContextVar("call_context", default=CallContext())  # noqa: B039 (frozen)


def current_call() -> CallContext:
    """Return the context of this thread's call."""
    return _context.get()


@contextlib.contextmanager
def call_context(**changes: Any) -> Iterator[None]:
    """Replace fields of the `CallContext` for the calls made inside."""
    token = _context.set(replace(_context.get(), **changes))
    try:
        yield
    finally:
        _context.reset(token)
