"""A swarm without a network: spans of blocks, each computed by a streamed model of its own in this process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

import slowllm
from slowllm.modeling.cache_labels import LabelSource
from slowllm.modeling.cutting import find_form
from slowllm.modeling.remote_block import make_remote
from slowllm.modeling.remote_spans import Hop, Kept, Need, Remote
from slowllm.modeling.soft_prompts import hook_inputs
from slowllm.modeling.span import SpanCall, SpanGrads, SpanRunner
from slowllm.runtime.streamed_lm import StreamedLM


class LocalSpans:
    """A `Spans` whose machines are models in this process; counts what it is asked."""

    def __init__(self, models: Sequence[StreamedLM], bounds: Sequence[tuple[int, int]]) -> None:
        self.ends = dict(bounds)
        self.models = dict(zip(self.ends, models, strict=True))
        self.runners = {
            first: SpanRunner(lm.model, lm.layout.blocks_name, find_form(lm.model, lm.layout.blocks_name))
            for first, lm in self.models.items()
        }
        self.sessions: dict[str, Cache] = {}
        self.num_calls = 0
        self.calls: list[SpanCall] = []
        self.needs: list[Need] = []

    def deadline(self) -> float:
        return math.inf

    def route(self, first: int, need: Need, deadline: float) -> list[Hop]:
        self.needs.append(need)
        return [Hop(max(start, first), end) for start, end in self.ends.items() if end > first]

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        self.num_calls += 1
        self.calls.append(call)
        runner = self.runners[self._start_of(call.first)]
        cache = None
        if session is not None:
            if session not in self.sessions:
                self.sessions[session] = runner.new_cache(keeps_everything=call.keeps_everything)
            cache = self.sessions[session]
        return self._ride(call.first, lambda: runner.forward(call, cache))

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        self.num_calls += 1
        runner = self.runners[self._start_of(call.first)]
        return self._ride(call.first, lambda: runner.backward(call, grads))

    def _ride(self, first: int, job: Callable[[], Any]) -> Any:
        return self.models[self._start_of(first)].ride([job])[0]

    def _start_of(self, block: int) -> int:
        """Return the first block of the machine that holds a block."""
        return next(start for start, end in self.ends.items() if start <= block < end)

    def end_session(self, kept: Kept) -> None:
        self.sessions.pop(kept.session, None)


def cut_in_two_or_three(num_blocks: int) -> list[tuple[int, int]]:
    """Return spans of unequal length that cover the blocks."""
    bounds = [0, 1, num_blocks] if num_blocks < 4 else [0, 1, num_blocks - 1, num_blocks]
    return list(itertools.pairwise(bounds))


class LocalSwarm:
    """A client's model, the models of its servers, and the spans between them; a context manager."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        bounds: Sequence[tuple[int, int]] | None = None,
        **options: Any,
    ) -> None:
        self.lm = slowllm.load(folder, dtype=dtype, ram="6GiB")
        blocks = self.lm.layout.blocks
        bounds = cut_in_two_or_three(len(blocks)) if bounds is None else bounds
        self.servers = [slowllm.load(folder, dtype=dtype, **{"ram": "6GiB", **options}) for _ in bounds]
        self.spans = LocalSpans(self.servers, bounds)
        form = find_form(self.lm.model, self.lm.layout.blocks_name)
        remote = Remote(
            self.spans, form, self.lm.config.get_text_config(), lambda work: work(), LabelSource()
        )
        for number, block in enumerate(blocks):
            blocks[number] = make_remote(block, number, remote)
        hook_inputs(blocks)

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *error: object) -> None:
        for lm in (self.lm, *self.servers):
            lm.close()
