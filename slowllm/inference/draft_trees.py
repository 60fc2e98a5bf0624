"""Pure arithmetic of speculative decoding: which tree of tokens to verify, how large it may be, and whether it pays.

Knows probabilities, counts and seconds; knows no model. A tree grows from the last accepted token. It is verified as
rows of one batch, one for each path from the root to a leaf, all padded to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Beyond this a larger tree adds next to nothing.
MAX_TREE_TOKENS = 512


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
        read: reading its bytes from disk.
        weights: passing the weights through the processor, for each rider.
        token: computing one token.
    """

    read: float
    weights: float
    token: float


def free_tokens(costs: Costs, num_riders: int) -> int:
    """Return how many tokens each rider may bring whose computation is hidden behind reading.

    Where nothing is read, or so many riders share the sweep that nothing is hidden: as many as take as long as the
    weights take through the processor.
    """
    hidden = costs.read / num_riders - costs.weights
    return min(MAX_TREE_TOKENS, max(1, int(max(hidden, costs.weights) / costs.token)))


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
    plain = max(costs.read, num_riders * (costs.weights + costs.token))
    drafted = max(costs.read, num_riders * (costs.weights + tree_tokens * costs.token))
    return tokens_per_pass * plain > drafted + num_riders * draft_seconds
