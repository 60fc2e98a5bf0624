"""Likelihoods of text: lines packed into micro-batches, micro-batches riding shared sweeps.

The first token of a line is scored after the tokenizer's BOS token, or EOS where it has none, as lm-eval does;
without a prefix it is left unscored. Lines are packed with lines of like length, so that little is padded; a
line's score does not depend on its neighbours beyond rounding.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from slowllm import __version__
from slowllm.errors import InputError, StateError
from slowllm.head import log_probs
from slowllm.model import StreamedLM
from slowllm.plan import MAX_RIDER_TOKENS, Job, Plan, Rates, padding_worth
from slowllm.state import Journal, State, journal

# Lines are sorted by length within a window of this many sweeps' tokens, so that any number can stream through.
WINDOW_SWEEPS = 4


class TextSide(Protocol):
    """What is asked of a model before its weights: a `StreamedLM`, or a `Description`."""

    @property
    def config(self) -> Any:
        """Transformers' config."""

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer."""


@dataclass(frozen=True)
class Line:
    """One line of text as token ids.

    Attributes:
        number: in its file, from 1.
        text: as read.
        ids: without prefix.
        truncated: whether ids were cut off.
    """

    number: int
    text: str
    ids: tuple[int, ...]
    truncated: bool = False


@dataclass
class Totals:
    """Sums over scores.

    Attributes:
        num_lines: scored.
        num_scored: tokens with a log-probability.
        log_likelihood: of all, in nats.
    """

    num_lines: int = 0
    num_scored: int = 0
    log_likelihood: float = 0.0

    def add(self, score: Score) -> None:
        """Count one line."""
        self.num_lines += 1
        self.num_scored += len(score.log_probs)
        self.log_likelihood += score.log_likelihood


@dataclass(frozen=True)
class Score:
    """The likelihood of one line.

    Attributes:
        line: that was scored.
        log_probs: natural logarithms, one for each scored token; the first token is missing where no prefix
            was used.
    """

    line: Line
    log_probs: tuple[float, ...]

    @property
    def log_likelihood(self) -> float:
        """Sum over the scored tokens, in nats."""
        return math.fsum(self.log_probs)

    @property
    def mean_nll(self) -> float:
        """Negative log-likelihood of a token; NaN where none is scored."""
        return -self.log_likelihood / len(self.log_probs) if self.log_probs else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean_nll)."""
        return safe_exp(self.mean_nll)


def safe_exp(value: float) -> float:
    """Return exp(value), infinity where that is too large for a float."""
    return math.exp(value) if not value > 709.0 else math.inf


def prefix_id(tokenizer: Any, vocab_size: int | None = None) -> int:
    """Return the token that stands before a line: BOS, or EOS where there is no BOS.

    Raises:
        InputError: the tokenizer has neither, or one that is beyond the model's vocabulary.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            if vocab_size is not None and token >= vocab_size:
                raise InputError(
                    f"the tokenizer's BOS or EOS is {token}, beyond the model's {vocab_size} tokens"
                )
            return int(token)
    raise InputError("this tokenizer has neither BOS nor EOS to score the first token after; use --no-prefix")


def max_line_tokens(lm: TextSide) -> int:
    """Return how many tokens a line may have, prefix included, by the model's own limit.

    Raises:
        InputError: the config's limit is no length.
    """
    config = lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    # ALiBi has no limit of its own; BLOOM was trained on 2,048.
    limit = limit or 2048
    if not isinstance(limit, int) or limit < 2:
        raise InputError(f"config.json: {limit!r} is no length that the model could take")
    return limit


def encode(
    lm: TextSide, texts: Iterable[tuple[int, str]], *, max_tokens: int, truncate: bool
) -> Iterator[Line]:
    """Turn numbered texts into lines of token ids, without special tokens.

    Raises:
        InputError: a line has more than `max_tokens` tokens and `truncate` is false.
    """
    vocabulary = lm.config.get_text_config().vocab_size
    for number, text in texts:
        ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError(f"line {number}: the tokenizer makes no tokens of it")
        if max(ids) >= vocabulary:
            raise InputError(
                f"line {number}: token {max(ids)} is beyond the model's vocabulary of {vocabulary}"
            )
        if len(ids) > max_tokens and not truncate:
            raise InputError(
                f"line {number} has {len(ids)} tokens but the limit is {max_tokens}; "
                "use --truncate to cut such lines, or --max-tokens to raise the limit"
            )
        yield Line(number, text, tuple(ids[:max_tokens]), len(ids) > max_tokens)


class Lines(Iterable[Line]):
    """Any number of lines, with little memory for each.

    Args:
        lines: taken one by one.
    Attributes:
        num_tokens: of all, prefixes not counted.
        longest: the line with the most.
        num_truncated: how many were cut.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self._texts: list[tuple[int, str, bool]] = []
        # Four bytes a token, where a tuple of them takes ten times as many.
        self._ids, self._ends = array.array("i"), array.array("q", [0])
        self.longest: Line | None = None
        for line in lines:
            self._texts.append((line.number, line.text, line.truncated))
            self._ids.extend(line.ids)
            self._ends.append(len(self._ids))
            if self.longest is None or len(line.ids) > len(self.longest.ids):
                self.longest = line
        self.num_tokens = len(self._ids)
        self.num_truncated = sum(truncated for _, _, truncated in self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Line]:
        for index, (number, text, truncated) in enumerate(self._texts):
            ids = self._ids[self._ends[index] : self._ends[index + 1]]
            yield Line(number, text, tuple(ids), truncated)

    def padded_tokens(self, extra: int, padding_tokens: int | None = None) -> int:
        """Return the tokens of all lines in micro-batches, padding and `extra` tokens a line included."""
        lengths = [end - start + extra for start, end in itertools.pairwise(self._ends)]
        return sum(
            len(batch) * lengths[batch[0]] for batch in pack(lengths, MAX_RIDER_TOKENS, padding_tokens)
        )

    def digest(self) -> str:
        """Return a hash of numbers and tokens, to know the lines again."""
        found = hashlib.sha256(self._ids.tobytes() + self._ends.tobytes())
        found.update(array.array("q", [number for number, _, _ in self._texts]).tobytes())
        return found.hexdigest()


def pack(lengths: Sequence[int], rider_tokens: int, padding_tokens: int | None = None) -> list[list[int]]:
    """Divide lines into micro-batches of at most `rider_tokens` tokens, padding included.

    Longest first, so that lines of like length share a micro-batch. A line longer than that rides alone.

    Args:
        lengths: tokens of each line.
        rider_tokens: capacity of a micro-batch.
        padding_tokens: most tokens of padding in one, where more would cost more than another; None for any.
    Returns:
        the lines' indices, each exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    padding = 0
    for index in order:
        widest = lengths[batches[-1][0]] if batches else 0
        padding += widest - lengths[index]
        has_room = bool(batches) and (len(batches[-1]) + 1) * widest <= rider_tokens
        if has_room and (padding_tokens is None or padding <= padding_tokens):
            batches[-1].append(index)
        else:
            batches.append([index])
            padding = 0
    return batches


def job_of(lines: Lines, prefix: int | None, rates: Rates, begun: Mapping[str, Any] | None = None) -> Job:
    """Return what the plan must know of a job.

    Args:
        prefix: token id before each line, if any.
        rates: of the machine, which say how much padding is worth a micro-batch.
        begun: from `state.read_job`: micro-batches are then packed as when the job was begun.
    Raises:
        StateError: the state is another version's.
        InputError: there are no lines.
    """
    if lines.longest is None:
        raise InputError("there are no lines to score")
    extra = 0 if prefix is None else 1
    packing = None
    if begun is not None:
        found = begun.get("packing")
        if not (
            isinstance(found, list)
            and len(found) == 3
            and all(type(n) is int and 0 < n < 1 << 24 for n in found)
            and begun.get("dtype") in ("float32", "bfloat16", "float16")
        ):
            raise StateError("the state is another version's, or damaged; delete its folder")
        packing = (found[0], found[1], found[2])
    return Job(
        num_tokens=lines.padded_tokens(extra, packing[2] if packing else padding_worth(rates)),
        longest=len(lines.longest.ids) + extra,
        forward_only=True,
        keeps_results=False,
        packing=packing,
    )


@contextlib.contextmanager
def opened_state(
    folder: Path | None, lm: StreamedLM, lines: Lines, prefix: int | None, save_seconds: float
) -> Iterator[State | None]:
    """Open the state of a scoring job: everything that its results depend on must be as it was.

    Raises:
        StateError: see `State`.
    """
    if folder is None:
        yield None
        return
    job = {
        "kind": "forward",
        "versions": {
            "slowllm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": lm.fingerprint(),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "lines": lines.digest(),
        "prefix": prefix,
        "packing": [lm.plan.rider_tokens, lm.plan.sweep_tokens, lm.plan.padding_tokens],
        "threads": torch.get_num_threads(),
    }
    with State(folder, job, save_seconds) as state:
        yield state


def score_lines(
    lm: StreamedLM, lines: Iterable[Line], *, prefix: int | None, state: State | None = None
) -> Iterator[Score]:
    """Yield the scores of any number of lines, in order, in as few sweeps as the plan allows.

    Lines are drawn as riders leave, so their number is no limit, and the next sweep begins while the last one's
    results are handed over.

    Args:
        lm: a loaded model.
        lines: from `encode`; drawn here for the first window, then on the carousel's thread, so it must not call
            the model.
        prefix: token id before each line, from `prefix_id`; None leaves each line's first token unscored.
        state: where to keep what is done, and to find what an earlier process has done of the same job.
    Raises:
        StateError: the state cannot be written.
    """
    plan, aboard = lm.plan, deque[tuple[int, list[int]]]()
    extra = 0 if prefix is None else 1
    windows = _packed_windows(lines, plan, extra)
    first = next(windows, [])
    # A job that fits one sweep rides it, however small its micro-batches are.
    seats = max(1, plan.sweep_tokens // plan.rider_tokens)
    if sum(len(batch) * (len(batch[0].ids) + extra) for _, batch in first) <= plan.sweep_tokens:
        seats = max(seats, len(first))

    def jobs() -> Iterator[Callable[[], list[Score]]]:
        batches = itertools.chain(first, itertools.chain.from_iterable(windows))
        for number, (positions, batch) in enumerate(batches):
            aboard.append((number, positions))
            if state is None:
                yield functools.partial(_score_batch, lm, batch, prefix, None)
            elif (done := state.result(number)) is None:
                yield functools.partial(_score_batch, lm, batch, prefix, state.journal(number))
            else:
                yield functools.partial(_scores_of, batch, done)

    found: dict[int, Score] = {}
    position = 0
    for scores in lm.stream(jobs(), seats):
        number, positions = aboard.popleft()
        if state is not None:
            state.finish(number, [score.log_probs for score in scores])
        found.update(zip(positions, scores, strict=True))
        while position in found:
            yield found.pop(position)
            position += 1


def _scores_of(lines: list[Line], log_probs: list[list[float]]) -> list[Score]:
    """Return what an earlier process found; a rider that calls no model."""
    return [Score(line, tuple(values)) for line, values in zip(lines, log_probs, strict=True)]


def _packed_windows(
    lines: Iterable[Line], plan: Plan, extra: int
) -> Iterator[list[tuple[list[int], list[Line]]]]:
    """Yield micro-batches with the positions of their lines, packed within windows of a few sweeps."""
    first = 0
    for window in _windows(lines, plan.sweep_tokens * WINDOW_SWEEPS, extra):
        lengths = [len(line.ids) + extra for line in window]
        yield [
            ([first + index for index in batch], [window[index] for index in batch])
            for batch in pack(lengths, plan.rider_tokens, plan.padding_tokens)
        ]
        first += len(window)


def _windows(lines: Iterable[Line], max_tokens: int, extra: int) -> Iterator[list[Line]]:
    window: list[Line] = []
    num_tokens = 0
    for line in lines:
        if window and num_tokens + len(line.ids) + extra > max_tokens:
            yield window
            window, num_tokens = [], 0
        window.append(line)
        num_tokens += len(line.ids) + extra
    if window:
        yield window


def _score_batch(lm: StreamedLM, lines: list[Line], prefix: int | None, kept: Journal | None) -> list[Score]:
    """Score the lines of one micro-batch; runs as a rider."""
    journal.set(kept)  # in the rider's own context
    rows = [(prefix, *line.ids) if prefix is not None else line.ids for line in lines]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        # Padded on the right: a causal model never looks there, and positions count from the first token.
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
        targets[number, : len(row) - 1] = ids[number, 1 : len(row)]
    found = log_probs(lm.model, targets, input_ids=ids, attention_mask=mask)
    return [
        Score(line, tuple(values[: len(row) - 1].tolist()))
        for line, row, values in zip(lines, rows, found, strict=True)
    ]
