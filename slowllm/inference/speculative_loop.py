"""Speculative decoding of one continuation: grow a draft tree, verify it in one sweep, accept."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from slowllm.inference import generation
from slowllm.inference.draft_trees import (
    NGRAM_WEIGHTS,
    Costs,
    NgramCache,
    Node,
    choose_tree,
    free_tokens,
    paths_of,
    pays,
)
from slowllm.inference.generation import (
    Continuation,
    Ends,
    Prompt,
    special_tokens,
)
from slowllm.runtime.streamed_lm import StreamedLM

log = logging.getLogger(__name__)

# The draft looks so far ahead, and follows so many branches at each step.
MAX_DEPTH, MAX_WIDTH = 24, 16


# The likeliest token is taken more often than its probability says, so drafts follow it further. Found with the
# embedded models: 3.6 tokens a sweep instead of 3.5.
SHARPNESS = 1.5


# What is expected of a draft until it was seen at work, in tokens of a sweep; and after how many sweeps it was.
EXPECTED_TOKENS, NUM_SEEN = 2.0, 4


@dataclass
class Acceptance:
    """What drafting brought.

    Attributes:
        num_tokens: of all continuations.
        num_passes: of a rider through the model.
        num_drafted: tokens that were drafted; 0 for prompt look-up, which does not say.
        num_accepted: of them.
        num_plain: passes for which nothing was drafted, because it would not have paid.
    """

    num_tokens: int = 0
    num_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_plain: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one sweep gave a continuation, on average."""
        return self.num_tokens / self.num_passes if self.num_passes else math.nan


class FanLayer(DynamicLayer):
    """Keys and values of one row, and behind them those of many short rows that all go on from it.

    The one row is held once: what attention gets is put together anew at each block, and not kept.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tails: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to the short rows; return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.tails is not None:
            key_states = torch.cat([self.tails[0], key_states], -2)
            value_states = torch.cat([self.tails[1], value_states], -2)
        self.tails = key_states, value_states
        if not self.keys.numel():
            return key_states, value_states
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], -2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], -2),
        )

    def get_seq_length(self) -> int:
        """Return the length of the one row and a short one."""
        return super().get_seq_length() + (0 if self.tails is None else self.tails[0].shape[-2])

    def select(self, rows: Tensor) -> None:
        """Keep some short rows, in a new order."""
        if self.tails is not None:
            self.tails = self.tails[0][rows], self.tails[1][rows]

    def settle(self, row: int, num_tokens: int) -> None:
        """Let the one row go on with the first tokens of a short one, and forget the others."""
        if self.tails is not None and num_tokens:
            added = [tail[row : row + 1, :, :num_tokens] for tail in self.tails]
            if self.keys.numel():
                added = [torch.cat(pair, -2) for pair in zip((self.keys, self.values), added, strict=True)]
            # Copied, or the other rows would stay in memory behind the view.
            self.keys, self.values = (tensor.clone() for tensor in added)
        self.tails = None


@dataclass
class DraftStats:
    """What the riders of one job know of each other; changed by whoever holds the baton."""

    costs: Costs
    decides: bool
    num_left: int
    seats: int
    counts: Acceptance
    draft_seconds: float
    verdicts: list[bool] = field(default_factory=list)

    @property
    def num_riders(self) -> int:
        """Riders that share the next sweep."""
        return max(1, min(self.seats, self.num_left))

    def drafts(self, tree_tokens: int) -> bool:
        """Return whether drafting pays, by what was seen so far; say so when it changes."""
        if not self.decides:
            return True
        seen = self.counts.num_passes - self.counts.num_plain
        drafted = self.counts.num_tokens - self.counts.num_plain
        rate = drafted / seen if seen >= NUM_SEEN else EXPECTED_TOKENS
        verdict = pays(
            self.costs, num_riders=self.num_riders, tree_tokens=tree_tokens, tokens_per_pass=rate,
            draft_seconds=self.draft_seconds,
        )  # fmt: skip
        if self.verdicts[-1:] != [verdict]:
            self.verdicts.append(verdict)
            log.info(
                "drafting is %s: %d riders, %.1f tokens a sweep %s, %.2f s for each draft, %.2f s to read a sweep",
                "on" if verdict else "off", self.num_riders, rate,
                "so far" if seen >= NUM_SEEN else "expected", self.draft_seconds, self.costs.read,
            )  # fmt: skip
        return verdict


class _Side:
    """A model with a cache that can take back tokens."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config.get_text_config()
        self.num_layers, self._vocabulary = config.num_hidden_layers, config.vocab_size
        self._layers = [FanLayer() for _ in range(self.num_layers)]
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, rows: Tensor, num_last: int) -> Tensor:
        """Return the logits (B, num_last, V) of the last tokens of rows (B, T) that go on from what is kept.

        On the processor, where the tree is, whatever the model is computed on.
        """
        # A token that only the other model's padded vocabulary has is none here; it can only cost acceptance.
        rows = rows.clamp(max=self._vocabulary - 1)
        extra = {"logits_to_keep": num_last} if self._keeps else {}
        output = self._model(
            input_ids=rows, past_key_values=Cache(layers=list(self._layers)), use_cache=True, **extra
        )
        logits: Tensor = output.logits[:, -num_last:].float().cpu()
        return logits

    def select(self, rows: Tensor) -> None:
        for layer in self._layers:
            layer.select(rows)

    def settle(self, row: int, num_tokens: int) -> None:
        for layer in self._layers:
            layer.settle(row, num_tokens)


def _grow(
    side: _Side, heard: NgramCache, ids: Sequence[int], num_unseen: int, depth: int, room: int
) -> list[Node]:
    """Draft candidates behind the tokens so far, of which the draft model has not seen the last yet."""
    longest = max(NGRAM_WEIGHTS)
    contexts = [tuple(ids[-longest:])]
    logits = side.logits(torch.tensor([ids[-num_unseen:]]), 1)
    side.settle(0, num_unseen)
    nodes: list[Node] = []
    numbers, paths = [-1], torch.zeros(1)
    for level in range(1, depth + 1):
        scores = heard.mix(contexts, (SHARPNESS * logits[:, -1]).log_softmax(-1))
        joint = (paths[:, None] + scores).flatten()
        best = joint.topk(min(MAX_WIDTH, len(joint)))
        rows, tokens, paths = best.indices // scores.shape[-1], best.indices % scores.shape[-1], best.values
        first = len(nodes)
        nodes += [
            Node(token, numbers[row], level, value)
            for token, row, value in zip(tokens.tolist(), rows.tolist(), paths.tolist(), strict=True)
        ]
        # A node less likely than that would not find a place in the tree.
        if level == depth or nodes[first].log_prob < -math.log(16 * room + 1):
            break
        contexts = [
            (*contexts[row], token)[-longest:]
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        numbers = list(range(first, len(nodes)))
        side.select(rows)
        logits = side.logits(tokens[:, None], 1)
    side.settle(0, 0)
    return nodes


def continue_with_draft(
    lm: StreamedLM, draft: StreamedLM, party: DraftStats, prompt: Prompt, share: int, tell: Any
) -> Continuation:
    """Continue one prompt; runs as a rider."""
    settings, tokens, counts = prompt.settings, special_tokens(lm), party.counts
    ends, processors = Ends(lm, settings, tokens), _processors(prompt, tokens.eos)
    large, small, heard = _Side(lm.model), _Side(draft.model), NgramCache()
    ids, start = list(prompt.ids), len(prompt.ids)
    # Tokens that each model has yet to see.
    num_unseen = num_undrafted = start
    kept: list[Tensor] = []
    ended = False
    while len(ids) - start < settings.max_new_tokens and not ended:
        nodes: list[Node] = []
        room = min(share, free_tokens(party.costs, party.num_riders))
        depth = min(MAX_DEPTH, room, settings.max_new_tokens - (len(ids) - start) - 1)
        if depth and party.drafts(room):
            started = time.perf_counter()
            candidates = _grow(small, heard, ids, num_undrafted, depth, room)
            num_undrafted = 0
            # Attention gets all rows with all that stands before them, at one block at a time.
            max_rows = share * large.num_layers // (len(ids) + depth)
            nodes = choose_tree(candidates, room, num_unseen, max_rows)
            counts.num_drafted += len(nodes)
            party.draft_seconds = 0.5 * (party.draft_seconds + time.perf_counter() - started)
        else:
            counts.num_plain += 1
        paths = paths_of(nodes)
        deepest = max(map(len, paths))
        unseen = ids[-num_unseen:]
        rows = torch.tensor(
            # What fills up a row stands behind its tokens, where none of them looks.
            [[*unseen, *(nodes[n].token for n in path), *[0] * (deepest - len(path))] for path in paths]
        )
        logits = large.logits(rows, deepest + 1)
        if nodes:
            _observe(heard, ids, nodes, paths, logits)
        row, chosen = _walk(nodes, paths, logits, ids, processors)
        large.settle(row, num_unseen + len(chosen) - 1)
        counts.num_passes += 1
        for place, token in enumerate(chosen):
            ids.append(token)
            num_undrafted += 1
            counts.num_tokens += 1
            counts.num_accepted += place < len(chosen) - 1  # the last is no draft's
            if settings.top_log_probs is not None:
                kept.append(logits[row, place].clone())
            if ended := bool(ends.at(torch.tensor([ids]))):
                break
        num_unseen = 1
        if tell is not None:
            tell(tuple(_without_eos(ids[start:], tokens.eos)))
    return generation.finished(lm, prompt, _without_eos(ids[start:], tokens.eos), ended, kept)


def _observe(
    heard: NgramCache,
    ids: Sequence[int],
    nodes: Sequence[Node],
    paths: Sequence[Sequence[int]],
    logits: Tensor,
) -> None:
    """Note what the model said at every node, and at the root."""
    places = {-1: (0, 0)}
    for row, path in enumerate(paths):
        for depth, number in enumerate(path, 1):
            places.setdefault(number, (row, depth))
    last, contexts = max(NGRAM_WEIGHTS), []
    for number, (row, depth) in places.items():
        path = [nodes[n].token for n in paths[row][:depth]] if number >= 0 else []
        contexts.append([*ids[-last:], *path][-last:])
    rows, depths = zip(*places.values(), strict=True)
    heard.listen(contexts, logits[list(rows), list(depths)])


def _without_eos(ids: list[int], eos: Sequence[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in eos else ids


def _processors(prompt: Prompt, eos: Sequence[int]) -> LogitsProcessorList:
    settings, found = prompt.settings, LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.min_new_tokens and eos:
        found.append(
            MinNewTokensLengthLogitsProcessor(len(prompt.ids), settings.min_new_tokens, torch.tensor(eos))
        )
    return found


def _walk(
    nodes: Sequence[Node],
    paths: Sequence[Sequence[int]],
    logits: Tensor,
    ids: Sequence[int],
    processors: LogitsProcessorList,
) -> tuple[int, list[int]]:
    """Follow the model's own choices down the tree.

    Returns:
        the row that has all accepted tokens; they and, last, what the model says after them.
    """
    children = {(node.parent, node.token): number for number, node in enumerate(nodes)}
    row, at, chosen = 0, -1, list[int]()
    while True:
        scores = processors(
            cast(Any, torch.tensor([[*ids, *chosen]])), cast(Any, logits[row, len(chosen)][None])
        )
        chosen.append(int(scores.argmax(-1)))
        following = children.get((at, chosen[-1]))
        if following is None:
            return row, chosen
        at = following
        row = next(number for number, path in enumerate(paths) if at in path)
