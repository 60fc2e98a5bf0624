"""A text that grows at the servers: what Petals calls an inference session.

Its keys and values are those of a labelled cache (`modeling.cache_labels`), so a session and transformers' own
`past_key_values` are one thing: steps on hidden states, calls of the model and `generate` continue one another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from numbers import Integral
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from slowllm.errors import InputError, SessionError, SessionLengthError, counted
from slowllm.modeling.cache_labels import held_of
from slowllm.modeling.remote_hop import pass_through
from slowllm.modeling.remote_spans import Kept, Remote


class TextCache(DynamicCache):
    """A cache that tells `generate` how many tokens of the text it holds, without the virtual tokens before them.

    Args:
        config: of the text model.
        num_virtual: virtual tokens that the cache begins with.
    """

    def __init__(self, config: Any, num_virtual: int = 0) -> None:
        super().__init__(config=config)
        if any(self.is_sliding):
            # A window forgets what has left it, so no position before that could be gone back to. Without the config every
            # block keeps every position, and masks leave out what is outside of its window.
            super().__init__()
        self.num_virtual = num_virtual
        self._hidden = num_virtual

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the text; inside `whole`, all positions."""
        return max(0, int(super().get_seq_length(layer_idx)) - self._hidden)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Tell all positions inside the context, which is what the model's own code needs."""
        before, self._hidden = self._hidden, 0
        try:
            yield
        finally:
            self._hidden = before


class InferenceSession:
    """A text that grows at the servers of some blocks, up to a length; a context manager.

    Args:
        remote: of the model.
        first: the first block.
        end: the number after the last.
        max_length: positions that it may have, virtual tokens among them. Servers with room for so many are sought.
        num_virtual: virtual tokens of a prompt that is tuned, with which it begins.
    Attributes:
        max_length: as given.
        output_ids: (B, T) the tokens that `generate` knows of, the last of which has not passed the blocks; None before the
            first call.
        text_mask: (B, T), which of these hold text; None for all.
        cache: with the labels of what the servers keep.
    """

    def __init__(
        self, remote: Remote, first: int, end: int, *, max_length: int, num_virtual: int = 0
    ) -> None:
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise InputError(f"max_length={max_length!r} is no number of positions; give 1 or more")
        self.max_length = max_length
        self.output_ids: Tensor | None = None
        self.text_mask: Tensor | None = None
        self.cache = TextCache(remote.config, num_virtual)
        self._remote, self._first, self._end = remote, first, end
        self._is_closed = False

    @property
    def num_blocks(self) -> int:
        """The number of its blocks."""
        return self._end - self._first

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self._first, self._end)

    @property
    def position(self) -> int:
        """The positions that have passed the blocks, virtual tokens among them.

        Setting it to a smaller number rolls back: what comes next follows the first so many positions.
        """
        layers = cast(list[CacheLayerMixin], self.cache.layers)
        return int(layers[self._first].get_seq_length()) if self._first < len(layers) else 0

    @position.setter
    def position(self, length: int) -> None:
        """Roll back to a length."""
        self.rewind(length)
        num_tokens = max(0, length - self.cache.num_virtual)
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, :num_tokens] if num_tokens else None
        if self.text_mask is not None:
            self.text_mask = self.text_mask[:, :num_tokens] if num_tokens else None

    def rewind(self, length: int) -> None:
        """Forget the keys and values behind the first `length` positions, and no tokens.

        Raises:
            InputError: it has fewer, or this is no whole number.
        """
        if isinstance(length, bool) or not isinstance(length, Integral) or not 0 <= length <= self.position:
            raise InputError(
                f"a session of {counted(self.position, 'position')} cannot be rolled back to {length!r}; give a number from 0 to "
                f"{self.position}"
            )
        num_left = self.position - length
        if not length:
            # What begins anew may have another number of rows, and the servers need not keep the old ones meanwhile.
            self._forget()
            self.cache = TextCache(self._remote.config, self.cache.num_virtual)
        elif num_left:
            self.cache.crop(-num_left)

    @property
    def last_token_id(self) -> Tensor | None:
        """The last token (B, 1) of each row, which has not passed the blocks; it can be set."""
        return None if self.output_ids is None else self.output_ids[:, -1:]

    @last_token_id.setter
    def last_token_id(self, value: Tensor) -> None:
        """Let other tokens (B, 1) be continued."""
        if self.output_ids is None:
            raise SessionError("last_token_id cannot be set before the session's first generate()")
        self.output_ids[:, -1:] = value

    def check_room(self, num_tokens: int) -> None:
        """Refuse a step for which there is no room.

        Raises:
            SessionLengthError: there is none.
            SessionError: the session is closed.
        """
        if self._is_closed:
            raise SessionError(
                "the session is closed; begin another one with inference_session(max_length=...)"
            )
        if self.position + num_tokens > self.max_length:
            raise SessionLengthError(
                f"Maximum length exceeded: the session has {self.position} of {self.max_length} positions, and "
                f"{num_tokens} more were given; begin it with a larger max_length"
            )

    def step(self, inputs: Tensor, prompts: Tensor | None = None, hypo_ids: Tensor | None = None) -> Tensor:
        """Pass hidden states through the session's blocks behind those that have passed before. There are no gradients.

        Args:
            inputs: (B, T, H); T may be 0.
            prompts: (N, B, P, H) or (N, 1, P, H) of a deep prompt, added to the first P of these positions before each of
                the N blocks.
            hypo_ids: (B,) int64, the row of the session that each row continues; None for its own.
        Returns:
            (B, T, H) behind the last block.
        Raises:
            SessionLengthError: "Maximum length exceeded".
            InputError: the tensors do not fit one another, or the session.
        """
        check_inputs(inputs, self._remote.config.hidden_size)
        self.check_room(inputs.shape[1])
        position, vectors = self.position, vectors_of(prompts, inputs, self._first, self.num_blocks)
        if hypo_ids is not None:
            self._reorder(hypo_ids, len(inputs))
        if position:
            # A prompt's vectors are added to the positions of their numbers.
            vectors = {
                number: torch.nn.functional.pad(own, (0, 0, position, 0)) for number, own in vectors.items()
            }
        with torch.no_grad(), self.cache.whole():
            return pass_through(
                self._remote,
                self._first,
                self._end,
                inputs,
                cache=self.cache,
                vectors=vectors,
                final_length=self.max_length,
            )

    def _reorder(self, hypo_ids: Tensor, num_rows: int) -> None:
        if not isinstance(hypo_ids, Tensor):
            raise InputError(
                f"hypo_ids of type {type(hypo_ids).__name__} were given; give a tensor of int64, one number for each row"
            )
        if not hypo_ids.numel():
            return
        if hypo_ids.dtype != torch.int64 or hypo_ids.shape != (num_rows,):
            raise InputError(
                f"hypo_ids of shape {list(hypo_ids.shape)} and {hypo_ids.dtype} were given; {counted(num_rows, 'row')} of inputs "
                "need as many in int64"
            )
        if not self.position:
            return
        layer: Any = self.cache.layers[self._first]
        kept_rows = len(layer.keys)
        wrong = [row for row in hypo_ids.tolist() if not 0 <= row < kept_rows]
        if wrong:
            raise InputError(f"hypo_ids name row {wrong[0]}, but the session has {kept_rows} rows from 0 on")
        self.cache.batch_select_indices(hypo_ids)

    def close(self) -> None:
        """Let the servers forget it. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._forget()

    def _forget(self) -> None:
        helds = (held_of(cast(CacheLayerMixin, layer)) for layer in self.cache.layers)
        for kept in {held.kept for held in helds if held is not None and isinstance(held.kept, Kept)}:
            self._remote.spans.end_session(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_inputs(inputs: object, width: int) -> None:
    """Refuse what are no hidden states.

    Args:
        inputs: of a call.
        width: of the hidden states.
    Raises:
        InputError: it is no tensor (B, T, width) of floating-point numbers.
    """
    if not isinstance(inputs, Tensor):
        raise InputError(
            f"inputs of type {type(inputs).__name__} were given; give a tensor of hidden states (rows, positions, {width})"
        )
    if inputs.dim() != 3 or inputs.shape[2] != width or not inputs.is_floating_point():
        raise InputError(
            f"inputs of shape {list(inputs.shape)} and {inputs.dtype} were given; give hidden states (rows, positions, {width})"
        )


def vectors_of(prompts: Tensor | None, inputs: Tensor, first: int, num_blocks: int) -> dict[int, Tensor]:
    """Return a deep prompt's vectors by the numbers of blocks; none where there is no prompt.

    Args:
        prompts: (N, B, P, H) or (N, 1, P, H) for N blocks.
        inputs: (B, T, H) of the call.
        first: the first block.
        num_blocks: N.
    Raises:
        InputError: they do not fit the inputs.
    """
    if prompts is None:
        return {}
    if not isinstance(prompts, Tensor):
        raise InputError(f"prompts of type {type(prompts).__name__} were given; give a tensor, or None")
    if not prompts.numel():
        return {}
    fits = (
        prompts.dim() == 4
        and inputs.dim() == 3
        and prompts.shape[0] == num_blocks
        and prompts.shape[1] in (1, len(inputs))
        and prompts.shape[2] <= inputs.shape[1]
        and prompts.shape[3] == inputs.shape[2]
    )
    if not fits:
        raise InputError(
            f"prompts of shape {list(prompts.shape)} do not fit inputs of shape {list(inputs.shape)}; give (blocks, rows, "
            f"positions, width) for {counted(num_blocks, 'block')}, with at most as many positions as the inputs have"
        )
    return {first + number: own.expand(len(inputs), -1, -1) for number, own in enumerate(prompts)}
