"""What a text gets when it is alone, against what it gets beside others: scores, choices and continuations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import slowllm
from slowllm.inference import scoring
from slowllm.inference.generation import generate
from slowllm.inference.generation_types import Prompt, Settings
from slowllm.inference.text import Query

# In fp32, a sum of a batch of another size is rounded otherwise.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Deviation:
    """A text whose numbers depend on its neighbours."""

    what: str
    alone: object
    beside_others: object


def random_ids(generator: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    """Return token ids above the special ones."""
    return tuple(generator.randrange(10, vocab_size) for _ in range(length))


def queries_of(vocab_size: int, lengths: Sequence[int]) -> list[Query]:
    """Return queries of many lengths; some share a header of 24 tokens."""
    generator = random.Random(0)
    found = [
        Query(random_ids(generator, length, vocab_size), random_ids(generator, 3, vocab_size))
        for length in lengths
    ]
    for header_length in (12, 24):
        header = random_ids(generator, header_length, vocab_size)
        found += [
            Query(header + random_ids(generator, length, vocab_size), random_ids(generator, 2, vocab_size))
            for length in (1, 3, 2, 9, 4, 4, 2, 20, 1, 5)
        ]
    return found


def score_deviations(lm: slowllm.StreamedLM, queries: Sequence[Query]) -> Iterator[Deviation]:
    """Score queries one by one, together, and together in the opposite order."""
    alone = [next(iter(scoring.score_queries(lm, [query]))).log_probs for query in queries]
    together = [found.log_probs for found in scoring.score_queries(lm, queries)]
    backward = [found.log_probs for found in scoring.score_queries(lm, queries[::-1])][::-1]
    again = [next(iter(scoring.score_queries(lm, [query]))).log_probs for query in queries]
    for kind, others in (("together", together), ("in the opposite order", backward), ("alone again", again)):
        for number, (one, other) in enumerate(zip(alone, others, strict=True)):
            if any(abs(a - b) > TOLERANCE for a, b in zip(one, other, strict=True)):
                yield Deviation(f"score {number}, {kind}", one, other)


def prompts_of(vocab_size: int, lengths: Sequence[int], settings: Settings) -> list[Prompt]:
    """Return prompts of many lengths."""
    generator = random.Random(1)
    return [Prompt(random_ids(generator, length, vocab_size), settings) for length in lengths]


def generation_deviations(lm: slowllm.StreamedLM, prompts: Sequence[Prompt]) -> Iterator[Deviation]:
    """Continue prompts one by one, together, and together in the opposite order."""
    alone = [next(iter(generate(lm, [prompt]))) for prompt in prompts]
    together = list(generate(lm, prompts))
    backward = list(generate(lm, prompts[::-1]))[::-1]
    for kind, others in (("together", together), ("in the opposite order", backward)):
        for number, (one, other) in enumerate(zip(alone, others, strict=True)):
            if [c.ids for c in one] != [c.ids for c in other]:
                yield Deviation(
                    f"continuation {number}, {kind}", [c.ids for c in one], [c.ids for c in other]
                )
                continue
            for a, b in zip(one, other, strict=True):
                pairs = zip(a.log_probs or (), b.log_probs or (), strict=True)
                if any(abs(x - y) > TOLERANCE for x, y in pairs):
                    yield Deviation(
                        f"probabilities of continuation {number}, {kind}", a.log_probs, b.log_probs
                    )


def deviations(
    folder: Path, vocab_size: int, lengths: Sequence[int] = (4, 9, 6, 17, 2, 30, 9)
) -> list[Deviation]:
    """Return every deviation of a checkpoint that has a tokenizer."""
    with slowllm.load(folder, dtype="fp32", ram="4GiB") as lm:
        settings = Settings(6, top_log_probs=1)
        return [
            *score_deviations(lm, queries_of(vocab_size, lengths)),
            *generation_deviations(lm, prompts_of(vocab_size, lengths, settings)),
        ]
