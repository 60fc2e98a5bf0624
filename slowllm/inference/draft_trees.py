"""Pure arithmetic of drafting: which tree of tokens is worth verifying, how large it may be, and whether it pays.

Knows probabilities, counts and seconds; knows no model. A tree grows from the last token that is known. It is
verified as rows, one for each path from its root to a leaf, all as long as the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Beyond this a larger tree adds next to nothing.
MAX_TREE_TOKENS = 512
# What the large model said after the same two or three tokens counts for so much beside the draft's opinion, and so
# many of its likeliest tokens are kept (4.2 tokens a sweep instead of 3.6).
NGRAM_WEIGHTS, NUM_HEARD = {2: 0.4, 3: 0.6}, 4
# Entries of it that a rider keeps: about 20 MB.
MAX_NGRAMS = 20_000


@dataclass(frozen=True)
class Node:
    """One drafted token.

    Attributes:
        token: its id.
        parent: number of the node before it; -1 for the root, the last token that is known.
        depth: from 1.
        log_prob: of the path to it, by the draft.
    """

    token: int
    parent: int
    depth: int
    log_prob: float


def choose_tree(nodes: Sequence[Node], num_tokens: int, num_before: int, max_rows: int) -> list[Node]:
    """Choose the nodes from which most tokens are expected to be accepted, best first for each depth.

    Args:
        nodes: candidates, parents before children, no child likelier than its parent.
        num_tokens: that drafting may add; at least one.
        num_before: tokens at the beginning of every row; without a draft there would be one row of them.
        max_rows: of them.
    Returns:
        the nodes, numbered anew.
    """
    order = sorted(range(len(nodes)), key=lambda n: -nodes[n].log_prob)
    best: tuple[float, list[int]] = (0.0, [])
    for depth in range(1, max((node.depth for node in nodes), default=0) + 1):
        num_rows = min(max(1, max_rows), (num_tokens + num_before) // (num_before + depth))
        chosen, leaves, expected = set[int](), set[int](), 0.0
        for number in order:
            node = nodes[number]
            if node.depth > depth or (node.parent >= 0 and node.parent not in chosen):
                continue
            if node.parent not in leaves and len(leaves) == num_rows:
                continue
            leaves.discard(node.parent)
            leaves.add(number)
            chosen.add(number)
            expected += math.exp(node.log_prob)
        if expected > best[0]:
            best = expected, sorted(chosen)
    new = {-1: -1, **{old: number for number, old in enumerate(best[1])}}
    return [Node(nodes[n].token, new[nodes[n].parent], nodes[n].depth, nodes[n].log_prob) for n in best[1]]


def paths_of(nodes: Sequence[Node]) -> list[list[int]]:
    """Return the path to each leaf as numbers of nodes; one empty path where there is no node."""
    parents = {node.parent for node in nodes}
    paths = []
    for leaf in range(len(nodes)):
        if leaf not in parents:
            path = [leaf]
            while (parent := nodes[path[-1]].parent) >= 0:
                path.append(parent)
            paths.append(path[::-1])
    return paths or [[]]


class NgramCache:
    """What the large model said after a few tokens, wherever it was asked; it may say so again.

    Every node of a tree that was verified tells something, accepted or not (Token Recycling, Luo et al., 2024).
    """

    def __init__(self) -> None:
        self._said: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def listen(self, contexts: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Keep the likeliest tokens by logits (N, V) after each of N contexts."""
        best = logits.log_softmax(-1).topk(min(NUM_HEARD, logits.shape[-1]))
        for context, *said in zip(contexts, best.indices.tolist(), best.values.exp().tolist(), strict=True):
            for length in NGRAM_WEIGHTS:
                self._said[tuple(context[-length:])] = said[0], said[1]
        while len(self._said) > MAX_NGRAMS:  # the oldest first
            del self._said[next(iter(self._said))]

    def mix(self, contexts: Sequence[Sequence[int]], log_probs: Tensor) -> Tensor:
        """Return the draft's log-probabilities (N, V) with what was said after these contexts mixed in."""
        probs: Tensor | None = None
        for row, context in enumerate(contexts):
            for length, share in sorted(NGRAM_WEIGHTS.items(), reverse=True):
                said = self._said.get(tuple(context[-length:]))
                if said is not None:
                    probs = log_probs.exp() if probs is None else probs
                    probs[row] *= 1 - share
                    for token, prob in zip(*said, strict=True):
                        if token < probs.shape[-1]:
                            probs[row, token] += share * prob
                    break
        return log_probs if probs is None else probs.log()


@dataclass(frozen=True)
class Costs:
    """What a later sweep costs by a plan, in seconds.

    Attributes:
        read: of its bytes.
        weights: of the weights' way through the processor, for each rider.
        token: of computing one token.
    """

    read: float
    weights: float
    token: float


def free_tokens(costs: Costs, num_riders: int) -> int:
    """Return how many tokens each rider may bring whose computing hides under the reading.

    Where nothing is read, or so many riders share the sweep that it hides no more: as many as take as long as the
    weights' way through the processor.
    """
    hidden = costs.read / num_riders - costs.weights
    return min(MAX_TREE_TOKENS, max(1, int(max(hidden, costs.weights) / costs.token)))


def pays(
    costs: Costs, *, num_riders: int, tree_tokens: int, tokens_per_pass: float, draft_seconds: float
) -> bool:
    """Return whether drafting gives more tokens a second than going without.

    Riders draft one after the other, while the carousel stands: that time comes on top of the sweep, once for each
    rider, whereas the sweep's reading is shared by all.

    Args:
        costs: of a sweep.
        num_riders: that share it.
        tree_tokens: that each brings, if it drafts.
        tokens_per_pass: that each then gets.
        draft_seconds: that drafting takes each.
    """
    plain = max(costs.read, num_riders * (costs.weights + costs.token))
    drafted = max(costs.read, num_riders * (costs.weights + tree_tokens * costs.token))
    return tokens_per_pass * plain > drafted + num_riders * draft_seconds
