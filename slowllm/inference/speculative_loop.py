"""The loop of speculative decoding for one prompt: draft a tree, verify it in one sweep, accept a path."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from slowllm.inference.branching_cache import CachedModel
from slowllm.inference.continuation import make_continuation
from slowllm.inference.draft_trees import Costs, Node, choose_tree, free_tokens, paths_of, pays
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.ngram_cache import MAX_NGRAM, NgramCache
from slowllm.inference.sampling import processors_of
from slowllm.inference.stopping import EndDetector, special_tokens, without_eos
from slowllm.runtime.streamed_lm import StreamedLM

log = logging.getLogger(__name__)

# How many tokens ahead the draft model goes, and how many branches it follows at each step.
MAX_DEPTH, MAX_WIDTH = 24, 16
# The large model takes the likeliest token more often than its probability says, so drafts follow it further. Found
# with the embedded models: 3.6 tokens a sweep instead of 3.5.
SHARPNESS = 1.5
# Tokens a sweep that are expected of a draft before its acceptance is measured, and passes until it is.
EXPECTED_TOKENS, MIN_MEASURED_PASSES = 2.0, 4


@dataclass
class Acceptance:
    """How many drafted tokens were accepted.

    Attributes:
        num_tokens: of all continuations.
        num_passes: of a rider through the model.
        num_drafted: drafted tokens; 0 for prompt look-up, which does not count them.
        num_accepted: drafted tokens that the model accepted.
        num_plain: passes without a draft, because it would not have paid.
    """

    num_tokens: int = 0
    num_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_plain: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a continuation got in one sweep, on average."""
        return self.num_tokens / self.num_passes if self.num_passes else math.nan


@dataclass
class DraftStats:
    """What the riders of one job share to decide whether to draft; changed only by the rider with the baton.

    Attributes:
        costs: of a sweep.
        may_stop: whether drafting is switched off where it does not pay.
        num_unfinished: prompts that have not ended.
        max_riders: of a sweep.
        counts: of tokens so far.
        draft_seconds: that one draft takes, as a moving average.
        is_on: the last decision, None before the first.
    """

    costs: Costs
    may_stop: bool
    num_unfinished: int
    max_riders: int
    counts: Acceptance
    draft_seconds: float
    is_on: bool | None = None

    @property
    def num_riders(self) -> int:
        """Riders that share the next sweep."""
        return max(1, min(self.max_riders, self.num_unfinished))

    def should_draft(self, tree_tokens: int) -> bool:
        """Return whether drafting pays, by what was measured so far; log when that changes."""
        if not self.may_stop:
            return True
        num_passes = self.counts.num_passes - self.counts.num_plain
        is_measured = num_passes >= MIN_MEASURED_PASSES
        num_tokens = self.counts.num_tokens - self.counts.num_plain
        tokens_per_pass = num_tokens / num_passes if is_measured else EXPECTED_TOKENS
        decision = tree_tokens > 0 and pays(
            self.costs, num_riders=self.num_riders, tree_tokens=tree_tokens, tokens_per_pass=tokens_per_pass,
            draft_seconds=self.draft_seconds,
        )  # fmt: skip
        if self.is_on is not decision:
            self.is_on = decision
            log.info(
                "drafting is %s: %d riders, %.1f tokens a sweep %s, %.2f s for each draft, %.2f s to read a sweep",
                "on" if decision else "off", self.num_riders, tokens_per_pass,
                "so far" if is_measured else "expected", self.draft_seconds, self.costs.read,
            )  # fmt: skip
        return decision


def continue_with_draft(
    lm: StreamedLM,
    draft: StreamedLM,
    stats: DraftStats,
    prompt: Prompt,
    max_tree_tokens: int,
    on_tokens: Callable[[tuple[int, ...]], None] | None,
) -> Continuation:
    """Continue one prompt; runs as a rider."""
    settings, tokens, counts = prompt.settings, special_tokens(lm), stats.counts
    detector, processors = EndDetector(lm, settings, tokens), processors_of(prompt, tokens.eos)
    ids, start = list(prompt.ids), len(prompt.ids)
    large = CachedModel(lm.model, start + settings.max_new_tokens)
    small, ngrams = CachedModel(draft.model), NgramCache()
    # Tokens at the end of `ids` that each model has not processed yet.
    num_unseen = num_unseen_by_draft = start
    logits_of_tokens: list[Tensor] = []
    ended = False
    while len(ids) - start < settings.max_new_tokens and not ended:
        nodes: list[Node] = []
        tree_tokens = min(max_tree_tokens, free_tokens(stats.costs, stats.num_riders))
        depth = min(MAX_DEPTH, tree_tokens, settings.max_new_tokens - (len(ids) - start) - 1)
        if stats.should_draft(tree_tokens) and depth:
            started = time.perf_counter()
            candidates = _draft(small, ngrams, ids, num_unseen_by_draft, depth, tree_tokens)
            num_unseen_by_draft = 0
            # Attention sees every row with all tokens before it, at one block at a time.
            max_rows = max_tree_tokens * large.num_layers // (len(ids) + depth)
            nodes = choose_tree(candidates, tree_tokens, num_unseen, max_rows)
            counts.num_drafted += len(nodes)
            stats.draft_seconds = 0.5 * (stats.draft_seconds + time.perf_counter() - started)
        else:
            counts.num_plain += 1
        paths = paths_of(nodes)
        longest = max(map(len, paths))
        rows = torch.tensor(
            # Padding stands behind a row's tokens, none of which attends to it.
            [
                [*ids[-num_unseen:], *(nodes[n].token for n in path), *[0] * (longest - len(path))]
                for path in paths
            ]
        )
        logits = large.logits(rows, longest + 1)
        if nodes:
            _update_ngrams(ngrams, ids, nodes, paths, logits)
        row, accepted = _verify(nodes, paths, logits, ids, processors)
        large.accept(row, num_unseen + len(accepted) - 1)
        counts.num_passes += 1
        for place, token in enumerate(accepted):
            ids.append(token)
            num_unseen_by_draft += 1
            counts.num_tokens += 1
            counts.num_accepted += place < len(accepted) - 1  # the last one is the model's own
            if settings.top_log_probs is not None:
                logits_of_tokens.append(logits[row, place].clone())
            if ended := bool(detector.has_ended(torch.tensor([ids]), start)):
                break
        num_unseen = 1
        if on_tokens is not None:
            on_tokens(without_eos(ids[start:], tokens))
    return make_continuation(lm, prompt, without_eos(ids[start:], tokens), ended, logits_of_tokens)


def _draft(
    draft: CachedModel, ngrams: NgramCache, ids: Sequence[int], num_unseen: int, depth: int, tree_tokens: int
) -> list[Node]:
    """Draft candidates behind the tokens so far, the last `num_unseen` of which the draft model has not processed."""
    contexts = [tuple(ids[-MAX_NGRAM:])]
    logits = draft.logits(torch.tensor([ids[-num_unseen:]]), 1)
    draft.accept(0, num_unseen)
    nodes: list[Node] = []
    parents, path_log_probs = [-1], torch.zeros(1)
    for level in range(1, depth + 1):
        scores = ngrams.blend(contexts, (SHARPNESS * logits[:, -1]).log_softmax(-1))
        joint = (path_log_probs[:, None] + scores).flatten()
        best = joint.topk(min(MAX_WIDTH, len(joint)))
        path_log_probs = best.values
        rows, tokens = best.indices // scores.shape[-1], best.indices % scores.shape[-1]
        first = len(nodes)
        nodes += [
            Node(token, parents[row], level, log_prob)
            for token, row, log_prob in zip(
                tokens.tolist(), rows.tolist(), path_log_probs.tolist(), strict=True
            )
        ]
        # A node less likely than that would find no room in the tree.
        if level == depth or nodes[first].log_prob < -math.log(16 * tree_tokens + 1):
            break
        contexts = [
            (*contexts[row], token)[-MAX_NGRAM:]
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        parents = list(range(first, len(nodes)))
        draft.select(rows)
        logits = draft.logits(tokens[:, None], 1)
    draft.accept(0, 0)
    return nodes


def _update_ngrams(
    ngrams: NgramCache,
    ids: Sequence[int],
    nodes: Sequence[Node],
    paths: Sequence[Sequence[int]],
    logits: Tensor,
) -> None:
    """Cache the model's predictions at the root and at every node."""
    places = {-1: (0, 0)}  # of each node: its row and depth
    for row, path in enumerate(paths):
        for depth, number in enumerate(path, 1):
            places.setdefault(number, (row, depth))
    contexts = []
    for row, depth in places.values():
        path_tokens = [nodes[n].token for n in paths[row][:depth]]
        contexts.append([*ids[-MAX_NGRAM:], *path_tokens][-MAX_NGRAM:])
    rows, depths = zip(*places.values(), strict=True)
    ngrams.update(contexts, logits[list(rows), list(depths)])


def _verify(
    nodes: Sequence[Node],
    paths: Sequence[Sequence[int]],
    logits: Tensor,
    ids: Sequence[int],
    processors: LogitsProcessorList,
) -> tuple[int, list[int]]:
    """Follow the model's own greedy choices down the tree.

    Returns:
        the row that has all accepted tokens; the accepted tokens and, last, the model's choice after them.
    """
    children = {(node.parent, node.token): number for number, node in enumerate(nodes)}
    row, last, accepted = 0, -1, list[int]()
    while True:
        scores = processors(
            cast(Any, torch.tensor([[*ids, *accepted]])), cast(Any, logits[row, len(accepted)][None])
        )
        accepted.append(int(scores.argmax(-1)))
        child = children.get((last, accepted[-1]))
        if child is None:
            return row, accepted
        last = child
        row = next(number for number, path in enumerate(paths) if child in path)
