"""The identity of all blocks of a model in one word, and which servers hold the blocks that a word names.

Pure decisions from records; knows no network. A word names blocks as block hashes do: by samples of their weights, see
`slowllm.runtime.block_identity`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from slowllm.errors import InputError, MissingBlocksError
from slowllm.swarm.records import ServerRecord

WEIGHTS_LETTERS = 32
# Ways through the spans that are tried; strangers who announce many different weights must not keep a client busy.
MAX_WAYS = 4096


def weights_hash(hashes: Sequence[str]) -> str:
    """Return the word for all blocks of a model.

    Args:
        hashes: identities of the blocks, from the first to the last.
    """
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:WEIGHTS_LETTERS]


def is_weights_hash(text: str) -> bool:
    """Whether this has the form of what `weights_hash` returns."""
    return len(text) == WEIGHTS_LETTERS and not text.strip("0123456789abcdef")


def parse_weights(text: object, name: str) -> str:
    """Return the word that somebody typed as `weights_hash` returns it: in lower case.

    Args:
        text: of any case.
        name: of the field or option, for the message.
    Raises:
        InputError: it is no such word.
    """
    if not isinstance(text, str) or not is_weights_hash(text.lower()):
        raise InputError(
            f"{name} {str(text)[:80]!r} is no word of {WEIGHTS_LETTERS} hexadecimal digits, such as `slowllm swarm status` prints"
        )
    return text.lower()


def assemblies(records: Iterable[ServerRecord], num_blocks: int) -> Iterator[tuple[str, ...]]:
    """Yield whole lists of block hashes that servers can give together, the most common blocks first.

    Servers are put one behind the other; where two have the same block, they must agree about it. At most `MAX_WAYS`
    ways are followed.
    """
    online = [record for record in records if record.block_hashes and record.end <= num_blocks]
    votes = Counter((block, r.hash_of(block)) for r in online for block in range(r.first, r.end))
    # Servers with the same blocks are one choice.
    spans = {(r.first, r.end, r.block_hashes): r for r in online}.values()
    left = MAX_WAYS

    def go_on(known: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        nonlocal left
        begin = len(known)
        if begin == num_blocks:
            yield known
            return
        able = [
            r for r in spans
            if r.first <= begin < r.end and known[r.first :] == r.block_hashes[: begin - r.first]
        ]  # fmt: skip
        able.sort(key=lambda r: (-votes[begin, r.hash_of(begin)], -r.end, r.block_hashes[begin - r.first :]))
        for record in able:
            if not left:
                return
            left -= 1
            yield from go_on(known + record.block_hashes[begin - record.first :])

    seen: set[tuple[str, ...]] = set()
    for found in go_on(()):
        if found not in seen:
            seen.add(found)
            yield found


def check_pin(
    records: Iterable[ServerRecord], own: Mapping[int, str], num_blocks: int, weights: str
) -> dict[int, str]:
    """Return the block hashes that a client must keep to, given the word that it was told.

    Args:
        records: of the servers that may be asked.
        own: hashes of the client's own blocks, by their numbers, if it has all of them.
        num_blocks: of the model.
        weights: as `weights_hash` returns it.
    Raises:
        InputError: the client's own blocks are others.
        MissingBlocksError: no servers have these blocks together.
    """
    if own:
        if (mine := weights_hash([own[block] for block in range(num_blocks)])) != weights:
            raise InputError(
                f"the blocks in the model's own folder are {mine}, not the {weights} of --weights"
            )
        return dict(own)
    records = list(records)
    if (found := pinned_blocks(records, num_blocks, weights)) is not None:
        return found
    others = [weights_hash(one) for one, _ in zip(assemblies(records, num_blocks), range(4), strict=False)]
    raise MissingBlocksError(
        tuple(range(num_blocks)),
        f"no servers have the blocks of --weights {weights}; those that may be asked have "
        + (f"those of {', '.join(others)}" if others else "no whole set of blocks"),
    )


def pinned_blocks(records: Iterable[ServerRecord], num_blocks: int, weights: str) -> dict[int, str] | None:
    """Return the block hashes that a word stands for, by the blocks' numbers; None where servers have no such blocks.

    Args:
        records: of the servers that may be asked.
        num_blocks: of the model.
        weights: as `weights_hash` returns it.
    """
    for found in assemblies(records, num_blocks):
        if weights_hash(found) == weights:
            return dict(enumerate(found))
    return None
