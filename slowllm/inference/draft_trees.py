"""Pure arithmetic of speculative decoding: which tree of tokens to verify, how large it may be, and whether it pays.

Knows probabilities, counts and seconds; knows no model. A tree grows from the last accepted token. It is verified as
rows of one batch, one for each path from the root to a leaf, all padded to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# Beyond this a larger tree adds next to nothing.
MAX_TREE_TOKENS = 512
# How likely the next token of a draft is accepted, for the size of a tree whose every token has a price. Published rates of
# small drafts for large models are 0.6 to 0.8.
ACCEPTANCE = 0.7
MAX_DRAFTED_WITH_EXPERTS = 16


@dataclass(frozen=True)
class Node:
    """One drafted token.

    Attributes:
        token: its id.
        parent: number of the node before it; -1 for the root, the last accepted token.
        depth: from 1.
        log_prob: of the path to it, by the draft.
    """

    token: int
    parent: int
    depth: int
    log_prob: float


def choose_tree(nodes: Sequence[Node], num_tokens: int, num_before: int, max_rows: int) -> list[Node]:
    """Choose the nodes of which most tokens are expected to be accepted.

    For each depth the tree is filled greedily, likeliest paths first; the best of these trees is returned.

    Args:
        nodes: candidates, parents before children, no child likelier than its parent.
        num_tokens: that drafting may add; at least one.
        num_before: tokens at the beginning of every row; without a draft there would be one row of them.
        max_rows: of the batch.
    Returns:
        the nodes, numbered anew.
    """
    order = sorted(range(len(nodes)), key=lambda n: -nodes[n].log_prob)
    most_expected, best = 0.0, list[int]()
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
        if expected > most_expected:
            most_expected, best = expected, sorted(chosen)
    new_numbers = {-1: -1, **{old: number for number, old in enumerate(best)}}
    return [replace(nodes[old], parent=new_numbers[nodes[old].parent]) for old in best]


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


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a sweep take by the plan, once resident stops are in memory.

    Attributes:
        read: reading its bytes from disk, those of experts that are read on demand excepted.
        weights: passing the weights through the processor, for each rider.
        token: computing one token.
        experts: the seconds of reading and of computing the experts that so many tokens are expected to choose, where experts
            are read on demand.
    """

    read: float
    weights: float
    token: float
    experts: Callable[[int], tuple[float, float]] | None = None

    def sweep_seconds(self, num_riders: int, num_tokens: int) -> float:
        """Return how long a sweep takes in which each of some riders brings `num_tokens`."""
        reading, computing = self.read, num_riders * (self.weights + num_tokens * self.token)
        if self.experts is not None:
            read_experts, compute_experts = self.experts(num_riders * num_tokens)
            reading, computing = reading + read_experts, computing + compute_experts
        return max(reading, computing)


def free_tokens(costs: Costs, num_riders: int) -> int:
    """Return how many drafted tokens each rider may bring, at most `MAX_TREE_TOKENS`.

    As many as are computed while the weights are read. Where nothing is read, or so many riders share the sweep that nothing is
    hidden: as many as take as long as the weights take through the processor. Where experts are read on demand no token is
    free, since each chooses experts of its own: then as many as give the most tokens a second, if each is accepted by
    `ACCEPTANCE` (Leviathan, Kalman and Matias 2023, "Fast inference from transformers via speculative decoding", section 3.4), or
    none.
    """
    if costs.experts is not None:
        return max(
            range(MAX_DRAFTED_WITH_EXPERTS + 1),
            key=lambda number: _tokens_a_second(costs, num_riders, number),
        )
    hidden = costs.read / num_riders - costs.weights
    return min(MAX_TREE_TOKENS, max(1, int(max(hidden, costs.weights) / costs.token)))


def _tokens_a_second(costs: Costs, num_riders: int, num_drafted: int) -> float:
    """Return the expected tokens of one rider, by the seconds of its sweep."""
    expected = (1 - ACCEPTANCE ** (num_drafted + 1)) / (1 - ACCEPTANCE)
    return expected / max(costs.sweep_seconds(num_riders, num_drafted + 1), 1e-12)


def pays(
    costs: Costs, *, num_riders: int, tree_tokens: int, tokens_per_pass: float, draft_seconds: float
) -> bool:
    """Return whether drafting gives more tokens a second than plain decoding.

    Riders draft one after the other, while the carousel stands still: that time is added to the sweep once for each
    rider, whereas all of them share the sweep's reading.

    Args:
        costs: of a sweep.
        num_riders: that share it.
        tree_tokens: that each brings, if it drafts.
        tokens_per_pass: that each then gets.
        draft_seconds: that drafting takes each.
    """
    # The last token that was accepted goes through the experts with those that are drafted.
    brought = tree_tokens + (costs.experts is not None)
    plain, drafted = costs.sweep_seconds(num_riders, 1), costs.sweep_seconds(num_riders, brought)
    return tokens_per_pass * plain > drafted + num_riders * draft_seconds
