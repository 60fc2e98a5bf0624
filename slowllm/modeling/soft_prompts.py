"""Soft prompts: what they are, and how a call of a streamed model gets one.

Three kinds. *shallow*: virtual tokens before the text (Lester et al., 2021; PEFT's prompt tuning, Petals' ptune).
*deep*: these, and vectors that are added to the hidden states of their positions before every block (Petals'
deep_ptune). *prefix*: keys and values before the text in every block (Li and Liang, 2021; PEFT's prefix tuning).

Knows tensors and transformers' calls; knows no files and no training.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from slowllm.errors import InputError, counted
from slowllm.modeling.shared_cache import Pair, can_share, takes_cache
from slowllm.options import PromptKind
from slowllm.streaming.call_context import call_context, current_call

Kind = PromptKind


@dataclass(frozen=True)
class SoftPrompt:
    """A soft prompt of P virtual tokens.

    Attributes:
        kind: which of the other attributes it has.
        embeddings: (P, H) of a shallow or deep prompt.
        vectors: (P, H) for each block of a deep prompt, or (B, P, H) with vectors of their own for each row of a call;
            None where nothing is added.
        pairs: for each block of a prefix (2, heads, P, head_dim), keys and values.
    """

    kind: Kind
    embeddings: Tensor | None = None
    vectors: tuple[Tensor | None, ...] = ()
    pairs: tuple[Tensor, ...] = ()

    @property
    def num_tokens(self) -> int:
        """The number of positions that it takes before a text."""
        return self.pairs[0].shape[2] if self.embeddings is None else len(self.embeddings)

    def digest(self) -> str:
        """Return a hash of its numbers."""
        digest = hashlib.sha256(self.kind.encode())
        for tensor in self.tensors:
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def tensors(self) -> list[Tensor]:
        """Its numbers."""
        tensors = (self.embeddings, *self.vectors, *self.pairs)
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def virtual_ids(self) -> tuple[int, ...]:
        """The ids of its tokens, before those of a text: -1 to -P; a prefix has none."""
        return () if self.embeddings is None else tuple(range(-1, -len(self.embeddings) - 1, -1))

    def embed(self, model: Any, ids: Tensor) -> Tensor:
        """Return the embeddings (B, T, H) of ids (B, T), which may be virtual, on the model's device."""
        assert self.embeddings is not None, "a prefix has no embeddings"
        text: Tensor = model.get_input_embeddings()(ids.clamp(min=0))
        ids = ids.to(text.device)
        virtual = F.embedding((-1 - ids).clamp(min=0), self.embeddings.to(text.device, text.dtype))
        return torch.where(ids[..., None] < 0, virtual, text)

    @contextlib.contextmanager
    def applied(self, model: Any, ids: Tensor, mask: Tensor) -> Iterator[dict[str, Any]]:
        """Yield the inputs of a call of the model; the call must be made inside the context.

        Args:
            model: a streamed model.
            ids: (B, T), padded on the right; each row begins with the `virtual_ids`.
            mask: (B, T), 1 where there is a token.
        """
        inputs: dict[str, Any] = {"attention_mask": mask}
        if self.embeddings is None:
            ones = mask.new_ones(len(ids), self.num_tokens)
            inputs = {"attention_mask": torch.cat([ones, mask], 1), "input_ids": ids, "use_cache": True}
            inputs["past_key_values"] = self.passing_cache(model.config, len(ids), model.dtype)
        else:
            inputs["inputs_embeds"] = self.embed(model, ids)
        with self.adding():
            yield inputs

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Add a deep prompt's vectors in the calls made inside, each to the position of its number.

        The first column of a call has the length of its cache for its position. So a prompt may be cut into several
        calls, and what comes after it gets none. A recurrent state does not tell its length: calls that continue one
        another on such a state are made inside one context, and none of another text between them.
        """
        is_deep = self.kind == "deep"
        with call_context(
            edit_input=functools.partial(self._add_vectors, _Counter()) if is_deep else None,
            vectors=self.vectors if is_deep else (),
        ):
            yield

    def _add_vectors(self, counter: _Counter, block: int, hidden: Tensor) -> Tensor:
        start, vectors = counter.past_length(hidden.shape[1]), self.vectors[block]
        return hidden if vectors is None else add_vectors(hidden, vectors, start)

    def pair(self, block: int, batch: int, dtype: torch.dtype) -> Pair:
        """Return the keys and values (batch, heads, P, head_dim) of a block."""
        keys, values = self.pairs[block].to(dtype)
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def passing_cache(self, config: Any, batch: int, dtype: torch.dtype) -> Cache:
        """Return a cache that begins with the prefix, for one pass. If the model allows it, the pass adds nothing."""
        if not can_share(config):
            return self.growing_cache(config, batch, dtype)
        return Cache(
            layers=[_PrefixLayer(*self.pair(block, batch, dtype)) for block in range(len(self.pairs))]
        )

    def growing_cache(self, config: Any, batch: int, dtype: torch.dtype) -> DynamicCache:
        """Return a cache that begins with the prefix and grows with each call."""
        cache = DynamicCache(config=config.get_text_config())
        for block in range(len(self.pairs)):
            cache.update(*self.pair(block, batch, dtype), block)
        return cache


def add_vectors(hidden: Tensor, vectors: Tensor, start: int) -> Tensor:
    """Add a deep prompt's vectors to a block's input, at the positions that both have.

    Args:
        hidden: (B, T, H), of the positions from `start` on.
        vectors: (P, H), or (B, P, H) for each row its own, of the positions from 0 on.
        start: the position of the first column.
    Raises:
        InputError: there are vectors for another number of rows.
    """
    added = vectors[..., start : start + hidden.shape[1], :].to(hidden.device, hidden.dtype)
    count = added.shape[-2]
    if not count:
        return hidden
    if added.dim() == 3 and len(added) != len(hidden):
        raise InputError(
            f"a deep prompt has vectors for {counted(len(added), 'row')}, but the model is called with {len(hidden)}; "
            "give (P, H) for all rows, or vectors for each"
        )
    return torch.cat([hidden[:, :count] + added, hidden[:, count:]], 1)


class _Counter:
    """Counts the positions of calls, at the first block of each."""

    def __init__(self) -> None:
        self._num_seen = 0

    def past_length(self, width: int) -> int:
        """Return the position of the first of `width` columns in this call of the module that owns the blocks."""
        call = current_call().owner_call
        assert call is not None, "blocks are called by their owner"
        if call.past_length is None:  # before the cache grows
            call.past_length = self._past_of(call.arguments)
            self._num_seen = call.past_length + width
        return call.past_length

    def _past_of(self, arguments: Mapping[str, Any]) -> int:
        cache = arguments.get("past_key_values", arguments.get("cache_params"))
        layers = [] if cache is None else cache.layers
        if any(isinstance(layer, CacheLayerMixin) for layer in layers):
            return int(cache.get_seq_length())
        # A recurrent state does not tell how many positions it has seen.
        if "state" not in arguments and not any(any(layer.has_previous_state.values()) for layer in layers):
            return 0
        if not self._num_seen:
            raise InputError(
                "a recurrent state does not tell which positions of a deep prompt it has seen; make all calls that "
                "continue one another inside one `adding`"
            )
        return self._num_seen


class PrefixBeginning:
    """A prefix as what the rows of a rider continue, in the place of a `shared_cache.Beginning`."""

    def __init__(self, prompt: SoftPrompt, batch: int, dtype: torch.dtype) -> None:
        self.length = prompt.num_tokens
        self._prompt, self._batch, self._dtype = prompt, batch, dtype

    def take(self, block: int) -> Pair:
        """Return keys and values of a block."""
        return self._prompt.pair(block, self._batch, self._dtype)


class _PrefixLayer(DynamicLayer):
    """Keys and values of a prefix, put before those of each call. Keeps no others: a text passes each block once.

    The tensors are attributes, so that a streamed block finds them when it looks for tensors that want a gradient.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        assert self.keys is not None and self.values is not None, "set on construction"  # noqa: PT018
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def get_seq_length(self) -> int:
        assert self.keys is not None, "set on construction"
        return int(self.keys.shape[-2])


def hook_inputs(blocks: nn.ModuleList) -> None:
    """Make the blocks of a streamed model take another input where the `CallContext` says so: its way, or a deep prompt."""
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(functools.partial(_edit_input, number), with_kwargs=True)


def _edit_input(block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = current_call()
    given, edit_input = call.way.input_of(block), call.edit_input
    if given is None and edit_input is None:
        return None
    hidden = (args[0] if args else kwargs["hidden_states"]) if given is None else given
    if edit_input is not None:
        hidden = edit_input(block, hidden)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def check_fits(prompt: SoftPrompt, config: Any, name: str) -> None:
    """Refuse a prompt that was made for a model of other sizes.

    Args:
        prompt: to check.
        config: of the model.
        name: of the prompt, for the error.
    Raises:
        InputError: the model has another width or number of blocks or heads, or takes no prefix.
    """
    text = config.get_text_config()
    if prompt.embeddings is not None:
        width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
        if prompt.embeddings.shape[1] != width:
            raise InputError(
                f"{name}: was made for a model of width {prompt.embeddings.shape[1]}, but this one has {width}"
            )
    num_blocks = len(prompt.vectors) or len(prompt.pairs)
    if num_blocks and num_blocks != text.num_hidden_layers:
        raise InputError(
            f"{name}: was made for a model of {num_blocks} blocks, but this one has {text.num_hidden_layers}"
        )
    if prompt.pairs:
        if not takes_cache(config):
            raise InputError(f"{name}: is a prefix of keys and values, but this model takes none")
        _, heads, _, head_dim = prompt.pairs[0].shape
        model_head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if head_dim != model_head_dim or text.num_attention_heads % heads:
            raise InputError(
                f"{name}: was made for a model with {heads} heads of {head_dim} numbers, but this one has "
                f"{text.num_attention_heads} of {model_head_dim}"
            )
