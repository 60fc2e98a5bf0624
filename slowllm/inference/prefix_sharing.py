"""Pure arithmetic: which rows answer which queries, where rows that begin alike are cut, what shares a micro-batch.

Knows token ids and counts; knows no model. A query asks for the log-probabilities of a continuation after a context.
Queries whose tokens are the beginning of another's, or the same, need no row of their own. Rows that begin alike may
be cut, so that what they have in common is computed once: the pieces are segments, and each goes on from the keys
and values of its parent.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from slowllm.inference.text import Query
from slowllm.planning.packing import pack

# Rows are cut at multiples of this: contexts of like length then go on at the same place, without gaps between.
CUT_TOKENS = 8

# How many depths are candidates for a cut, how many may be chosen, and how many are tried for each choice after the
# first: 2,400 queries take 0.7 s so, and 5.6 s with all of them.
MAX_DEPTHS, MAX_CHOSEN, NUM_TRIED = 24, 8, 6

# Rows by which it is decided where to cut; what pays for these pays for the others, and is found sooner.
SAMPLE_ROWS = 1000

# The cost of a parent's token, whose keys and values a row holds, relative to a token that is computed.
# In BLOOM the keys and values of a token and a copy of each are an eighth of the scratch memory of a block.
PARENT_WEIGHT = 0.25


@dataclass(frozen=True)
class Target:
    """One log-probability wanted.

    Attributes:
        position: in the row, after which the token is expected.
        token: its id.
        query: whose it is.
        place: in the query's continuation.
    """

    position: int
    token: int
    query: int
    place: int


@dataclass
class PackedRow:
    """Tokens that pass through the model, and what is wanted of them."""

    ids: tuple[int, ...]
    targets: list[Target] = field(default_factory=list)


@dataclass
class Segment:
    """A piece of one row or of several that begin alike.

    Attributes:
        start: position of its first token in the row.
        ids: its tokens.
        parent: number of the segment that it goes on from.
        targets: positions counted in the row.
    """

    start: int
    ids: tuple[int, ...]
    parent: int | None
    targets: list[Target] = field(default_factory=list)


def merge(queries: Sequence[Query | None]) -> list[PackedRow]:
    """Return the rows that answer all queries, in lexicographic order.

    A query whose tokens begin another row is answered by that row: so one row serves all choices of a single token
    after one context.

    Args:
        queries: all of them, because targets have their numbers; None for one that is not to be answered.
    """
    asked = {
        number: query for number, query in enumerate(queries) if query is not None and query.continuation
    }
    order = sorted(asked, key=lambda number: asked[number].ids)
    rows: list[PackedRow] = []
    # From the last to the first: what begins another row begins the one that follows it in this order.
    for number in reversed(order):
        query = asked[number]
        ids = query.ids
        if not rows or rows[-1].ids[: len(ids)] != ids:
            rows.append(PackedRow(ids))
        first = len(query.context) - 1
        rows[-1].targets += [
            Target(first + place, token, number, place) for place, token in enumerate(query.continuation)
        ]
    rows.reverse()
    return rows


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] equal, a[:high] not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def cut(rows: Sequence[PackedRow], depths: Sequence[int]) -> list[Segment]:
    """Cut rows at depths where two or more of them are alike so far.

    Args:
        rows: in lexicographic order, none the beginning of another.
        depths: ascending.
    Returns:
        segments; parents come before their children, and every target is in exactly one.
    """
    alike = [common(a.ids, b.ids) for a, b in itertools.pairwise(rows)]
    segments: list[Segment] = []
    above: list[tuple[int, int]] = []  # (end, number) of the segments that the last row went through
    for index, row in enumerate(rows):
        before = alike[index - 1] if index else 0
        after = alike[index] if index < len(alike) else 0
        above = [(end, number) for end, number in above if end <= before]
        start, parent = above[-1] if above else (0, None)
        ends = [d for d in depths if start < d <= max(before, after) and d < len(row.ids)]
        for end in [*ends, len(row.ids)]:
            segments.append(Segment(start, row.ids[start:end], parent))
            parent, start = len(segments) - 1, end
            if end != len(row.ids):
                above.append((end, parent))
        for target in row.targets:
            _owner(segments, len(segments) - 1, target.position).targets.append(target)
    return _without_only_children(segments)


def _without_only_children(segments: Sequence[Segment]) -> list[Segment]:
    """Join a segment from which only one other goes on with that one."""
    num_children = Counter(segment.parent for segment in segments)
    numbers: list[int] = []  # of each old segment among the new ones
    kept: list[Segment] = []
    for segment in segments:
        if segment.parent is not None and num_children[segment.parent] == 1:
            number = numbers[segment.parent]
            kept[number].ids += segment.ids
            kept[number].targets += segment.targets
        else:
            number = len(kept)
            parent = None if segment.parent is None else numbers[segment.parent]
            kept.append(Segment(segment.start, segment.ids, parent, segment.targets))
        numbers.append(number)
    return kept


def _owner(segments: Sequence[Segment], number: int, position: int) -> Segment:
    segment = segments[number]
    while position < segment.start:
        assert segment.parent is not None, "the first segment of a row starts at 0"
        segment = segments[segment.parent]
    return segment


def batches_of(segments: Sequence[Segment], rider_tokens: int, padding_tokens: int | None) -> list[list[int]]:
    """Divide segments into micro-batches whose members all start at one position; parents' come first."""
    starts = sorted({segment.start for segment in segments})
    batches = []
    for start in starts:
        members = [number for number, segment in enumerate(segments) if segment.start == start]
        lengths = [len(segments[number].ids) for number in members]
        extra = start * PARENT_WEIGHT
        batches += [
            [members[index] for index in batch]
            for batch in pack(lengths, rider_tokens, padding_tokens, extra)
        ]
    return batches


def padded_tokens(segments: Sequence[Segment], batches: Sequence[Sequence[int]]) -> int:
    """Return the tokens of micro-batches, padding included."""
    return sum(len(batch) * max(len(segments[n].ids) for n in batch) for batch in batches)


def choose_depths(rows: Sequence[PackedRow], rider_tokens: int, padding_tokens: int) -> tuple[int, ...]:
    """Choose where to cut rows that begin alike, so that tokens and micro-batches cost the least together.

    Depths are added one by one as long as that makes it cheaper; none where sharing does not pay.

    Args:
        rows: in lexicographic order.
        rider_tokens: capacity of a micro-batch.
        padding_tokens: tokens that take as long as one more micro-batch does.
    """
    rows = rows[:SAMPLE_ROWS]

    def cost(depths: Sequence[int]) -> int:
        segments = cut(rows, depths)
        batches = batches_of(segments, rider_tokens, padding_tokens)
        return padded_tokens(segments, batches) + padding_tokens * len(batches)

    alike = [common(a.ids, b.ids) for a, b in itertools.pairwise(rows)]
    if sum(alike) <= padding_tokens:
        return ()
    depths = _depths(rows, alike)
    chosen: tuple[int, ...] = ()
    cheapest = cost(())
    while depths and len(chosen) < MAX_CHOSEN:
        now = NUM_TRIED if chosen else len(depths)
        tried = sorted((cost(tuple(sorted({*chosen, d}))), d) for d in depths[:now])
        if tried[0][0] >= cheapest:
            break
        cheapest, depth = tried[0]
        chosen = tuple(sorted({*chosen, depth}))
        # What saved least before will hardly save most now.
        depths = [*(d for _, d in tried[1:]), *depths[now:]]
    return chosen


def _depths(rows: Sequence[PackedRow], alike: Sequence[int]) -> list[int]:
    """Return the depths that save the most tokens: what all have in common, and multiples of `CUT_TOKENS`."""
    saved: dict[int, int] = {}
    for shared in alike:
        depth = shared // CUT_TOKENS * CUT_TOKENS
        if depth:
            saved[depth] = saved.get(depth, 0) + depth
    header = min(alike)
    if header and header < min(len(row.ids) for row in rows):
        saved[header] = saved.get(header, 0) + header * len(alike)
    return sorted(sorted(saved, key=lambda depth: -saved[depth])[:MAX_DEPTHS])


@dataclass(frozen=True)
class Load:
    """What passes through the model in one sweep.

    Attributes:
        segments: that make it up.
        batches: their numbers in each micro-batch; parents' micro-batches come before their children's.
        is_shared: whether any segment goes on from another.
    """

    segments: tuple[Segment, ...]
    batches: tuple[tuple[int, ...], ...]
    is_shared: bool

    @property
    def places(self) -> dict[int, tuple[int, int]]:
        """The micro-batch of each segment, and its row there."""
        return {
            member: (number, row)
            for number, batch in enumerate(self.batches)
            for row, member in enumerate(batch)
        }

    def computed(self, is_saved: Sequence[bool]) -> set[int]:
        """Return the micro-batches to be computed: those whose results are not saved, and those that they continue."""
        places, computed = self.places, set[int]()
        for number, batch in reversed(list(enumerate(self.batches))):
            if number in computed or not is_saved[number]:
                parents = [self.segments[member].parent for member in batch]
                computed |= {number, *(places[parent][0] for parent in parents if parent is not None)}
        return computed


def loads(
    rows: Sequence[PackedRow],
    rider_tokens: int,
    sweep_tokens: int,
    padding_tokens: int,
    *,
    share: bool,
    max_batches: int = 64,
) -> Iterator[Load]:
    """Divide rows among sweeps, and those of each sweep among micro-batches.

    Rows that share nothing make one load, however many they are: their micro-batches need nobody beside them.
    """
    depths = choose_depths(rows, rider_tokens, padding_tokens) if share else ()
    rest = list(rows)
    guess = len(rest)
    while rest:
        count = min(guess, len(rest))
        while True:
            segments = cut(rest[:count], depths)
            batches = batches_of(segments, rider_tokens, padding_tokens)
            is_shared = any(segment.parent is not None for segment in segments)
            total = padded_tokens(segments, batches)
            # All of a load board together, or a parent would leave before the last of its children comes.
            excess = max(total / sweep_tokens, len(batches) / max_batches)
            if not is_shared or excess <= 1 or count == 1:
                break
            count = max(1, min(count - 1, int(count * 0.95 / excess)))
        yield Load(tuple(segments), tuple(map(tuple, batches)), is_shared)
        rest = rest[count:]
        guess = count * 5 // 4 + 1 if is_shared else len(rest)
