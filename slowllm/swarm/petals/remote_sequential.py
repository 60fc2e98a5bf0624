"""Blocks at the servers as one module: what Petals calls a remote sequential.

It stands in the place of the model's list of blocks, so the model's own loop runs over it as before, and it can be called
on hidden states by itself, indexed and sliced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Self

from torch import Tensor, nn

from slowllm.errors import InputError, counted
from slowllm.modeling.remote_hop import pass_through
from slowllm.modeling.remote_spans import Remote
from slowllm.swarm.petals.client_config import read_call
from slowllm.swarm.petals.inference_session import InferenceSession, check_inputs, vectors_of
from slowllm.swarm.petals.opening import open_ends, remote_of


class RemoteSequential(nn.ModuleList):
    """Blocks that servers compute. Iterating yields single blocks, which can be called on hidden states as well.

    Args:
        config: of `AutoDistributedConfig.from_pretrained`, with `initial_peers`. The model is opened, and closed with this
            module.
        start_block: the first block; by default the model's first.
        end_block: the number after the last; by default that after the model's last.
        dht: refused; the swarm is joined by `initial_peers`.
        sequence_manager: refused; routes are chosen by `slowllm.swarm.routing`.
    Raises:
        InputError: an argument cannot be used.
        NetworkError: the swarm cannot be joined, or lacks blocks.
    """

    __call__ = nn.Module.__call__

    _remote: Remote
    _first: int
    _num_virtual: int
    _session: ContextVar[InferenceSession | None]

    def __init__(
        self,
        config: Any,
        *,
        start_block: int | None = None,
        end_block: int | None = None,
        dht: object = None,
        sequence_manager: object = None,
    ) -> None:
        for name, value in (("dht", dht), ("sequence_manager", sequence_manager)):
            if value is not None:
                raise InputError(f"{name} is not taken: the swarm is joined by the config's initial_peers")
        num_blocks = int(config.get_text_config().num_hidden_layers)
        first, end = start_block or 0, num_blocks if end_block is None else end_block
        if not 0 <= first < end <= num_blocks:
            raise InputError(
                f"start_block={start_block} and end_block={end_block} name none of {counted(num_blocks, 'block')}"
            )
        lm = open_ends(read_call(config._name_or_path, {"config": config}))
        blocks = list(lm.layout.blocks)
        super().__init__(blocks[first:end])
        self._set(remote_of(lm), first, 0)
        self.__dict__["_slowllm"] = lm

    @classmethod
    def over(cls, blocks: Sequence[nn.Module], remote: Remote, first: int = 0, num_virtual: int = 0) -> Self:
        """Return the module of some remote blocks of a client.

        Args:
            blocks: in order.
            remote: that they share.
            first: the number of the first.
            num_virtual: virtual tokens with which a text of the whole model begins.
        """
        made = cls.__new__(cls)
        nn.ModuleList.__init__(made, blocks)
        made._set(remote, first, num_virtual)
        return made

    def _set(self, remote: Remote, first: int, num_virtual: int) -> None:
        self._remote, self._first, self._num_virtual = remote, first, num_virtual
        self._session = ContextVar("session", default=None)

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self._first, self._first + len(self))

    @property
    def active_session(self) -> InferenceSession | None:
        """The session of the `inference_session` or `use_session` that this code is in; None outside of one."""
        return self._session.get()

    @property
    def position(self) -> int:
        """The positions of the active session; 0 without one."""
        return 0 if self.active_session is None else self.active_session.position

    def forward(
        self, inputs: Tensor, prompts: Tensor | None = None, hypo_ids: Tensor | None = None
    ) -> Tensor:
        """Pass hidden states through the blocks; within a session this is its `step`.

        Args:
            inputs: (B, T, H) before the first block.
            prompts: (N, B, P, H) or (N, 1, P, H) of a deep prompt, added to the first P positions before each of the N blocks.
            hypo_ids: see `InferenceSession.step`.
        Returns:
            (B, T, H) behind the last block; without a session, with gradients.
        Raises:
            InputError: the tensors do not fit one another, or rows are reordered without a session.
        """
        if self.active_session is not None:
            return self.active_session.step(inputs, prompts, hypo_ids)
        check_inputs(inputs, self._remote.config.hidden_size)
        if hypo_ids is not None and len(hypo_ids):
            raise InputError(
                "hypo_ids reorder the rows of a session; call the blocks inside inference_session()"
            )
        vectors = vectors_of(prompts, inputs, self._first, len(self))
        return pass_through(self._remote, self._first, self._first + len(self), inputs, vectors=vectors)

    @contextlib.contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Let calls inside the context continue a session; None for none.

        Raises:
            InputError: it is a session of other blocks, or none that was begun.
        """
        if session is not None and not isinstance(session, InferenceSession):
            raise InputError(
                f"the session is a {type(session).__name__}, not one that was begun; write `with "
                "model.inference_session(max_length=...) as session:` and give what that names"
            )
        if session is not None and session.blocks != self.blocks:
            raise InputError(
                f"the session is of blocks {session.blocks.start}:{session.blocks.stop}, but these are "
                f"{self.blocks.start}:{self.blocks.stop}"
            )
        token = self._session.set(session)
        try:
            yield session
        finally:
            self._session.reset(token)

    @contextlib.contextmanager
    def inference_session(self, *, max_length: int) -> Iterator[InferenceSession]:
        """Begin a session that calls inside the context continue, and end it with the context.

        Args:
            max_length: positions that it may have.
        """
        whole = self._num_virtual if self.blocks == range(self._remote.config.num_hidden_layers) else 0
        with (
            InferenceSession(
                self._remote, self._first, self._first + len(self), max_length=max_length, num_virtual=whole
            ) as session,
            self.use_session(session),
        ):
            yield session

    def __getitem__(self, index: int | slice) -> Self:
        """Return one block, or a row of neighbours, as a module of its own."""
        numbers = range(len(self))[index]
        chosen = numbers if isinstance(numbers, range) else range(numbers, numbers + 1)
        if chosen.step != 1:
            raise InputError(f"blocks are taken one after the other, but the slice has step {chosen.step}")
        blocks = [own for number in chosen if (own := self._modules[str(number)]) is not None]
        part = type(self).over(blocks, self._remote, self._first + chosen.start, self._num_virtual)
        if (lm := self.__dict__.get("_slowllm")) is not None:
            part.__dict__["_slowllm"] = lm
        return part

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([block for block in self._modules.values() if block is not None])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(blocks {self.blocks.start}:{self.blocks.stop})"
