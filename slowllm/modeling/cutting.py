"""Whether and how a model can be cut between blocks: what a block returns, and on what its other arguments depend.

A span of blocks is computed for others by transformers' own forward, with stand-ins for the blocks below it
(`modeling.span`). That is right where a block's other arguments depend on mask, positions and cache only, not on token
ids or embeddings. Both are found by passes of a few zeros through the model's own code, in which no block is computed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slowllm.errors import UnsupportedError, first_line
from slowllm.streaming.call_context import call_context
from slowllm.streaming.way import StopForward, Way

# Three rows, so that a loop that takes a block's output for a tuple of one or two fails.
_ROWS, _POSITIONS = 3, 2


@dataclass(frozen=True)
class BlockForm:
    """How the blocks of a model are called.

    Attributes:
        num_extras: values that a block returns after the hidden states; None where it returns these alone.
        width: of the embeddings, which may differ from that of the hidden states.
        dtype: of the embeddings.
        hidden_shape: of the hidden states of one position.
        hidden_dtype: of the hidden states.
    """

    num_extras: int | None
    width: int
    dtype: torch.dtype
    hidden_shape: tuple[int, ...]
    hidden_dtype: torch.dtype

    def stand_in(self, hidden: Tensor) -> Any:
        """Return hidden states in the form in which a block returns them."""
        return hidden if self.num_extras is None else (hidden, *[None] * self.num_extras)

    def embeddings(self, batch: int, width: int) -> Tensor:
        """Return the embeddings (B, T, width) that a call is made with; their values do not count."""
        return torch.zeros(batch, width, self.width, dtype=self.dtype)


class _Known(Way):
    """No block is computed: all return one output."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def output_of(self, block: int) -> Any:
        return self._output


def find_form(model: Any, blocks_name: str) -> BlockForm:
    """Find out how the blocks of a streamed model are called.

    Raises:
        UnsupportedError: the model cannot be cut between blocks.
    """
    owner = model.get_submodule(blocks_name.rpartition(".")[0])
    blocks = model.get_submodule(blocks_name)
    family = type(model).__name__
    if "inputs_embeds" not in inspect.signature(owner.forward).parameters:
        raise UnsupportedError(f"{family}: cannot be cut between blocks, because it takes no embeddings")
    width = model.get_input_embeddings().embedding_dim
    noise = torch.randn(_ROWS, _POSITIONS, width, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    zeros = torch.zeros_like(noise)
    try:
        with torch.no_grad():
            hidden, first = given_to_first(owner, blocks[0], zeros)
            _, second = given_to_first(owner, blocks[0], noise)
    except Exception as error:  # whatever a model may raise where it is given embeddings without token ids
        raise UnsupportedError(
            f"{family}: cannot be cut between blocks, because it fails without token ids ({first_line(error)})"
        ) from error
    if "input_ids" in first:
        raise UnsupportedError(f"{family}: cannot be cut between blocks, because its blocks need token ids")
    for name, value in first.items():
        pairs = zip(tree_leaves(value), tree_leaves(second[name]), strict=True)
        if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs):
            raise UnsupportedError(
                f"{family}: cannot be cut between blocks, because what its blocks get as {name} depends on the token ids"
            )
    for num_extras in (None, 1, 2):
        form = BlockForm(num_extras, width, model.dtype, tuple(hidden.shape[2:]), hidden.dtype)
        with torch.no_grad():
            is_handed_over = _accepts(owner, blocks, form, zeros, hidden)
        if is_handed_over:
            raise UnsupportedError(
                f"{family}: cannot be cut between blocks, because they hand over more than hidden states to one another"
            )
        if is_handed_over is False:
            return form
    raise UnsupportedError(
        f"{family}: cannot be cut between blocks, because it is not known what its blocks return"
    )


def given_to_first(
    owner: nn.Module, block: nn.Module, embeddings: Tensor
) -> tuple[Tensor, Mapping[str, Any]]:
    """Return the hidden states that the first block gets for embeddings, and its other arguments by name.

    Args:
        owner: of the blocks.
        block: the first.
        embeddings: (B, T, H).
    """
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
        hidden = named.pop("0", None)
        caught.append((named.pop("hidden_states") if hidden is None else hidden, named))
        raise StopForward

    handle = block.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        with contextlib.suppress(StopForward):
            owner(inputs_embeds=embeddings, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def _accepts(
    owner: nn.Module, blocks: nn.ModuleList, form: BlockForm, embeddings: Tensor, hidden: Tensor
) -> bool | None:
    """Find out whether the loop over the blocks goes on with outputs of a form.

    Returns:
        None where it does not; else whether a block gets, beside hidden states, what another one returned.
    """
    extras = [torch.zeros_like(hidden) for _ in range(form.num_extras or 0)]
    seen: list[bool] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = tree_leaves((args, kwargs))
        seen.append(any(leaf is extra for leaf in leaves for extra in extras))

    handles = [block.register_forward_pre_hook(look, with_kwargs=True, prepend=True) for block in blocks]
    try:
        with call_context(way=_Known((hidden, *extras) if extras else hidden)):
            output = owner(inputs_embeds=embeddings, use_cache=False)
    except Exception:  # whatever a loop may raise on an output of another form
        return None
    finally:
        for handle in handles:
            handle.remove()
    last = output[0] if isinstance(output, tuple) else output.last_hidden_state
    if not isinstance(last, Tensor) or last.shape[:2] != hidden.shape[:2]:
        return None
    return any(seen)
