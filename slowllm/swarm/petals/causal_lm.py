"""Causal language models whose blocks are at servers, with sessions that several calls of `generate` continue."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
from torch import Tensor

from slowllm.errors import InputError
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.petals.base_model import DistributedBase, distribute
from slowllm.swarm.petals.client_config import ClientConfig, read_call
from slowllm.swarm.petals.config import class_for, with_client
from slowllm.swarm.petals.inference_session import InferenceSession, TextCache
from slowllm.swarm.petals.opening import closed_on_error, open_ends, remote_of
from slowllm.swarm.petals.tied_gradient import add_gradient_of_tied_head

# What makes `generate` pass the blocks in another order than one text that grows.
_RESTARTS = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate")


class ForCausalLM:
    """Mixin for transformers' causal language model of a family.

    Attributes:
        family: the only `model_type` that a subclass takes; None for any.
        base_marker: the class that the base model gets beside its own.
    """

    family: ClassVar[str | None] = None
    base_marker: ClassVar[type[Any]] = DistributedBase

    @classmethod
    def from_pretrained(cls, model_name_or_path: Any, **arguments: Any) -> Any:
        """Open what is outside the blocks, join the swarm, and return transformers' own model with remote blocks.

        The model is the owner of all that was opened: `close` it, or forget it.

        Args:
            model_name_or_path: a folder, or a hub id that is in the local cache.
            arguments: fields of `ClientConfig`; `torch_dtype`, `revision`, `low_cpu_mem_usage`; `ram`, `device` and `vram` of
                `slowllm.load`; and a `config` of `AutoDistributedConfig`.
        Raises:
            InputError: an argument is unknown or cannot be obeyed.
            CheckpointError: there is no such checkpoint.
            NetworkError: the swarm cannot be joined, or lacks blocks.
        """
        call = read_call(model_name_or_path, arguments)
        lm = open_ends(call, cls)
        with closed_on_error(lm):
            return cls.of_client(lm, call.client)

    @classmethod
    def of_client(cls, lm: StreamedLM, client: ClientConfig) -> Any:
        """Return the model of a client under Petals' names. Used by `from_pretrained`.

        Args:
            lm: whose blocks are remote.
            client: with the prompt to tune.
        """
        base = distribute(lm, client, class_for(cls.base_marker, lm.config))
        model: Any = lm.model
        kind = type(model)
        names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        if "transformer" not in model._modules:
            names["transformer"] = property(lambda self: base)
        model.__class__ = type(kind.__name__, (class_for(cls, lm.config), kind), names)
        add_gradient_of_tied_head(lm)
        carried = with_client(model.config, client)
        model.config = base.config = carried
        return model

    @property
    def active_session(self) -> InferenceSession | None:
        """The session that calls continue here; None outside of one."""
        session: InferenceSession | None = self._blocks.active_session
        return session

    @property
    def _blocks(self) -> Any:
        return self.transformer.h  # type: ignore[attr-defined]

    def use_session(self, session: InferenceSession | None) -> Any:
        """Let calls inside the context continue a session; see `RemoteSequential.use_session`."""
        return self._blocks.use_session(session)

    def inference_session(self, *, max_length: int) -> Any:
        """Begin a session that calls inside the context continue; see `RemoteSequential.inference_session`."""
        return self._blocks.inference_session(max_length=max_length)

    def close(self) -> None:
        """Leave the swarm, and give files, threads and memory back. Idempotent."""
        self.__dict__["_slowllm"].close()

    def generate(
        self, inputs: Tensor | None = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any
    ) -> Any:
        """Continue texts by transformers' own `generate`; within a session, continue what it has.

        Args:
            inputs: (B, T) token ids; within a session those that follow, or None to go on.
            args, kwargs: of transformers' `generate`.
            session: to continue; by default the active one, if there is one.
        Returns:
            what `generate` returns; within a session without the tokens of earlier calls.
        Raises:
            SessionLengthError: the session has no room for so many tokens.
            InputError: the session has positions whose tokens are not known, or texts of another number.
        """
        if kwargs.get("max_length", 0) is None:
            del kwargs["max_length"]
        if isinstance(kwargs.get("do_sample"), int):
            kwargs["do_sample"] = bool(kwargs["do_sample"])
        given = kwargs.pop("input_ids", None)
        inputs = given if inputs is None else inputs
        session = self.active_session if session is None else session
        if session is not None:
            with self.use_session(session):
                return self._continue(session, inputs, args, kwargs)
        num_virtual = self.transformer.pre_seq_len  # type: ignore[attr-defined]
        if num_virtual and kwargs.get("use_cache") is not False:
            kwargs.setdefault(
                "past_key_values", TextCache(remote_of(self.__dict__["_slowllm"]).config, num_virtual)
            )
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _continue(
        self, session: InferenceSession, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = session.output_ids
        if before is None and session.position > 0:
            raise InputError(
                "the session has positions whose tokens are not known, because they passed as hidden states or in a call of the "
                "model; begin a session with generate(), or continue this one with step()"
            )
        if before is not None and inputs is not None and len(inputs) != len(before):
            raise InputError(
                f"the session has {len(before)} texts, but {len(inputs)} were given; give as many"
            )
        parts = [ids for ids in (before, inputs) if ids is not None]
        ids = torch.cat(parts, 1) if parts else None
        num_before = 0 if before is None else before.shape[1]
        mask = _mask(session, ids, num_before, kwargs.pop("attention_mask", None))
        if mask is not None:
            kwargs["attention_mask"] = mask
        num_beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", 1) or 1
        restarts = num_beams > 1 or any(kwargs.get(name) is not None for name in _RESTARTS)
        virtual = session.cache.num_virtual
        # At least one token has to pass the blocks; beams and drafts begin anew.
        num_kept = 0 if ids is None or restarts else min(session.position, virtual + ids.shape[1] - 1)
        session.rewind(0 if num_kept <= virtual else num_kept)
        kwargs["past_key_values"] = session.cache
        with contextlib.ExitStack() as held:
            if num_beams > 1:
                # Its rows are beams, of which nobody knows which became the texts.
                held.callback(lambda: session.rewind(0))
            result = super().generate(ids, *args, **kwargs)  # type: ignore[misc]
        sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
        session.output_ids = sequences
        session.text_mask = None if mask is None else _longer(mask, sequences)
        new = sequences[:, num_before:].clone()
        if isinstance(result, Tensor):
            return new
        result.sequences = new
        return result


def _mask(
    session: InferenceSession, ids: Tensor | None, num_before: int, given: Tensor | None
) -> Tensor | None:
    """Return the mask of all tokens of a session; None where it has none.

    Args:
        session: with the mask of its tokens.
        ids: (B, T) all tokens.
        num_before: those of earlier calls.
        given: (B, T') of the new tokens, or of all.
    """
    if ids is None or (given is None and session.text_mask is None):
        return given
    earlier = session.text_mask
    if given is not None and given.shape[1] == ids.shape[1]:
        return given
    if earlier is None:
        earlier = ids.new_ones(len(ids), num_before)
    if given is None:
        return _longer(earlier, ids)
    if num_before + given.shape[1] != ids.shape[1]:
        raise InputError(
            f"an attention_mask of {given.shape[1]} positions was given for {ids.shape[1] - num_before} new tokens; give one for "
            "the new tokens, or for all of the session"
        )
    return torch.cat([earlier, given.to(earlier.dtype)], 1)


def _longer(mask: Tensor, ids: Tensor) -> Tensor:
    """Return a mask for all of some tokens (B, T), of which those behind the mask hold text."""
    mask = mask.repeat_interleave(len(ids) // len(mask), 0)
    return torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)


class ForSpeculation(ForCausalLM):
    """Mixin for a causal language model that generates with a small model's drafts, which it verifies."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: Any, **arguments: Any) -> Any:
        """Open the model; see `ForCausalLM.from_pretrained`.

        Args:
            model_name_or_path: a folder, or a hub id that is in the local cache.
            arguments: as there, and `small_model`, a causal language model with the same tokenizer that makes drafts.
        Raises:
            InputError: there is no small model.
        """
        small_model = arguments.pop("small_model", None)
        if small_model is None:
            raise InputError(
                "small_model is missing: give a small model with the same tokenizer, which makes the drafts"
            )
        model = super().from_pretrained(model_name_or_path, **arguments)
        model.use_small_model(small_model)
        return model

    def use_small_model(self, small_model: Any) -> None:
        """Let `generate` take drafts from another model from now on.

        Args:
            small_model: with the same tokenizer.
        """
        self.__dict__["small_model"] = small_model

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Continue a text; see `ForCausalLM.generate`. Drafts come from the small model; the tokens are this model's."""
        kwargs.setdefault("assistant_model", self.__dict__["small_model"])
        return super().generate(inputs, *args, **kwargs)
