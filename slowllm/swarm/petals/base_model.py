"""The module that owns the blocks, under Petals' names: word_embeddings, word_embeddings_layernorm, h, ln_f.

It stays transformers' own. Its calls continue the active session, and begin with the prompt that is tuned.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slowllm.errors import UnsupportedError
from slowllm.modeling.cutting import given_to_first
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.swarm.petals.client_config import ClientConfig
from slowllm.swarm.petals.inference_session import InferenceSession, TextCache
from slowllm.swarm.petals.opening import remote_of
from slowllm.swarm.petals.prompt_tuning import PromptTuned, add_prompt_modules
from slowllm.swarm.petals.remote_sequential import RemoteSequential

# What families call the norm behind the last block.
_LAST_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm")


class DistributedBase(PromptTuned):
    """Mixin for the class of the module that owns the blocks; made by `distribute`."""

    blocks_attribute: ClassVar[str]


def distribute(lm: StreamedLM, client: ClientConfig, marker: type[Any] = DistributedBase) -> Any:
    """Give the module that owns a client's blocks Petals' names, sessions and prompts; return it.

    Args:
        lm: a client, which lives as long as this module.
        client: with the prompt to tune.
        marker: the class that the module gets beside its own; `DistributedBase` or a subclass.
    Raises:
        UnsupportedError: the model itself owns its blocks.
    """
    blocks_name = lm.layout.blocks_name
    path, _, attribute = blocks_name.rpartition(".")
    base: Any = lm.model.get_submodule(path)
    kind = type(base)
    if base is lm.model:
        raise UnsupportedError(
            f"{kind.__name__}: owns its blocks itself, which Petals' classes cannot name; use slowllm.load(swarm=...)"
        )
    add_prompt_modules(base, lm, client)
    blocks = RemoteSequential.over(
        list(lm.layout.blocks), remote_of(lm), 0, client.pre_seq_len * bool(client.tuning_mode)
    )
    base._modules[attribute] = blocks
    names: dict[str, Any] = {
        "forward": _continuing(kind.forward),
        "blocks_attribute": attribute,
        # The same module and name: transformers looks up by str(class) which outputs it can record.
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    for name, find in _ALIASES.items():
        if name not in base._modules:
            names[name] = property(find)
    base.__class__ = type(kind.__name__, (marker, kind), names)
    for module in (base, blocks):
        module.__dict__["_slowllm"] = lm
    return base


def _word_embeddings(base: Any) -> nn.Module:
    embeddings: nn.Module = base.get_input_embeddings()
    return embeddings


def _word_embeddings_layernorm(base: Any) -> nn.Module:
    """Return what stands between embeddings and the first block where that is nothing: the identity.

    Raises:
        UnsupportedError: something stands there, such as learnt positions.
    """
    width = base.get_input_embeddings().embedding_dim
    noise = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0)).to(
        base.get_input_embeddings().weight.dtype
    )
    with torch.no_grad():
        hidden, _ = given_to_first(base, base._modules[base.blocks_attribute]._modules["0"], noise)
    if hidden.shape != noise.shape or not torch.equal(hidden, noise):
        raise UnsupportedError(
            f"{type(base).__name__}: does more between its embeddings and its first block than a norm (positions or scales); "
            "call the model with inputs_embeds instead"
        )
    return nn.Identity()


def _blocks(base: Any) -> RemoteSequential:
    blocks: RemoteSequential = base._modules[base.blocks_attribute]
    return blocks


def _last_norm(base: Any) -> nn.Module:
    """Return the norm behind the last block.

    Raises:
        UnsupportedError: it has no known name.
    """
    for name in _LAST_NORMS:
        if base._modules.get(name) is not None:
            norm: nn.Module = base._modules[name]
            return norm
    raise UnsupportedError(
        f"{type(base).__name__}: the norm behind its last block has no known name; call the model itself"
    )


_ALIASES: dict[str, Callable[[Any], nn.Module]] = {
    "word_embeddings": _word_embeddings,
    "word_embeddings_layernorm": _word_embeddings_layernorm,
    "h": _blocks,
    "ln_f": _last_norm,
}


def _continuing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `forward` that continues the active session, and begins with the prompt."""
    parameters = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)  # generate() looks at the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        session = _session_of(self, given)
        cache = given.get("past_key_values")
        num_before = 0
        with contextlib.ExitStack() as held:
            if session is not None:
                held.enter_context(torch.no_grad())
                held.enter_context(call_context(final_length=session.max_length))
            if isinstance(cache, TextCache):
                held.enter_context(cache.whole())
            prompt = self.soft_prompt(self.get_input_embeddings().weight.dtype)
            if prompt is not None:
                is_first = cache is None or not cache.get_seq_length()
                given, num_before = (
                    _after_prompt(self, given, prompt, is_first=is_first),
                    prompt.num_tokens * is_first,
                )
                held.enter_context(prompt.adding())
            if session is not None:
                session.check_room(_width_of(given))
            output = forward(self, **given)
        return _without_prompt(output, num_before) if num_before else output

    return call


def _session_of(base: Any, given: dict[str, Any]) -> InferenceSession | None:
    """Return the session that a call continues, and put its cache among the arguments."""
    session: InferenceSession | None = _blocks(base).active_session
    if session is None or given.get("use_cache") is False:
        return None
    if given.get("past_key_values") is None:
        given |= {"past_key_values": session.cache, "use_cache": True}
    return session if given["past_key_values"] is session.cache else None


def _width_of(given: dict[str, Any]) -> int:
    inputs = given.get("inputs_embeds")
    ids: Tensor = given["input_ids"] if inputs is None else inputs
    return ids.shape[1]


def _after_prompt(base: Any, given: dict[str, Any], prompt: SoftPrompt, *, is_first: bool) -> dict[str, Any]:
    """Return the arguments of a call whose text stands behind a prompt; the first call has the prompt itself as well."""
    assert prompt.embeddings is not None, "a tuned prompt has embeddings"
    given, count = dict(given), prompt.num_tokens
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None:
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], 1)
    if positions is not None:
        given["position_ids"] = positions + count
    if not is_first:
        return given
    inputs = given.get("inputs_embeds")
    text: Tensor = base.get_input_embeddings()(given["input_ids"]) if inputs is None else inputs
    virtual = prompt.embeddings.to(text.device, text.dtype).expand(len(text), -1, -1)
    given |= {"input_ids": None, "inputs_embeds": torch.cat([virtual, text], 1)}
    if positions is not None:
        before = torch.arange(count, device=positions.device).expand(*positions.shape[:-1], -1)
        given["position_ids"] = torch.cat([before, positions + count], -1)
    return given


def _without_prompt(output: Any, count: int) -> Any:
    """Return an output without the positions of the prompt."""
    if isinstance(output, tuple):
        return (output[0][:, count:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, count:]
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(hidden[:, count:] for hidden in output.hidden_states)
    return output
