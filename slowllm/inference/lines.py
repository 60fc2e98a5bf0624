"""Lines of text, each scored as a whole: what `slowllm forward` does.

The first token of a line is scored after the tokenizer's BOS token, or EOS where it has none, as lm-eval does;
without a prefix it is left unscored. Lines are packed with lines of like length, so that little is padded; a
line's score does not depend on its neighbours beyond rounding.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slowllm.errors import InputError
from slowllm.inference.likelihood import Likelihood, safe_exp
from slowllm.inference.scoring import score_keyed
from slowllm.inference.text import Query, TextSide, max_line_tokens, plain_ids
from slowllm.planning.host_plan import MAX_RIDER_TOKENS, padding_worth
from slowllm.planning.job import Job, Rates
from slowllm.planning.packing import pack
from slowllm.runtime.run_identity import batch_identity, packed_as_begun, saved_packing
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM


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
class ScoreTotals:
    """Sums over lines.

    Attributes:
        num_lines: scored.
        num_scored: tokens with a log-probability.
        log_likelihood: of all tokens, in nats.
    """

    num_lines: int = 0
    num_scored: int = 0
    log_likelihood: float = 0.0

    def add(self, likelihood: Likelihood) -> None:
        """Count one line."""
        self.num_lines += 1
        self.num_scored += len(likelihood.log_probs)
        self.log_likelihood += likelihood.log_likelihood

    @property
    def perplexity(self) -> float:
        """Of all tokens; NaN where none is scored."""
        return safe_exp(-self.log_likelihood / self.num_scored) if self.num_scored else math.nan


def encode(
    lm: TextSide,
    texts: Iterable[tuple[int, str]],
    *,
    max_tokens: int,
    truncate: bool,
    prefix: int | None = None,
) -> Iterator[Line]:
    """Turn numbered texts into lines of token ids, without special tokens.

    Args:
        lm: the model, or its description.
        texts: with their numbers.
        max_tokens: of a line.
        truncate: whether to cut longer lines.
        prefix: token that is put before every line, if any; a line that begins with it gets no second one.
    Raises:
        InputError: a line has more than `max_tokens` tokens and `truncate` is false.
    """
    vocabulary = lm.config.get_text_config().vocab_size
    for number, text in texts:
        ids = plain_ids(lm.tokenizer, text)
        if ids[:1] == (prefix,) and len(ids) > 1:
            ids = ids[1:]
        if not ids:
            raise InputError(f"line {number}: the tokenizer makes no tokens of it")
        if max(ids) >= vocabulary:
            raise InputError(
                f"line {number}: token {max(ids)} is beyond the model's vocabulary of {vocabulary}"
            )
        if len(ids) > max_tokens and not truncate:
            raise InputError(
                f"line {number} has {len(ids)} tokens but the limit is {max_tokens}; use --truncate to cut such lines"
                + (", or --max-tokens to raise the limit" if len(ids) < max_line_tokens(lm) else "")
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


def job_of(
    lines: Lines,
    prefix: int | None,
    rates: Rates,
    begun: Mapping[str, Any] | None = None,
    num_virtual_tokens: int = 0,
) -> Job:
    """Return what the plan must know of a job.

    Args:
        lines: all of them.
        prefix: token id before each line, if any.
        rates: of the machine, which say how much padding is worth a micro-batch.
        begun: from `state.read_job`: micro-batches are then packed as when the job was begun.
        num_virtual_tokens: of a soft prompt before each line.
    Raises:
        StateError: the state is another version's.
        InputError: there are no lines.
    """
    if lines.longest is None:
        raise InputError("there are no lines to score")
    extra = num_virtual_tokens + (0 if prefix is None else 1)
    packing = saved_packing(begun or {})
    job = Job(
        num_tokens=lines.padded_tokens(extra, packing[2] if packing else padding_worth(rates)),
        longest=len(lines.longest.ids) + extra,
        forward_only=True,
        keeps_results=False,
    )
    return packed_as_begun(job, begun)


def describe(lm: StreamedLM, lines: Lines, prefix: int | None) -> dict[str, Any]:
    """Return what the likelihoods of lines depend on, for `State`."""
    return batch_identity("forward", lm, lines=lines.digest(), prefix=prefix)


def score_lines(
    lm: StreamedLM, lines: Iterable[Line], *, prefix: int | None, state: State | None = None
) -> Iterator[tuple[Line, Likelihood]]:
    """Yield any number of lines with their likelihoods, in order, in as few sweeps as the plan allows.

    The next sweep begins while the results of the last one are handed over.

    Args:
        lm: a loaded model.
        lines: from `encode`; drawn on the carousel's thread as riders leave, so the iterable must not call the model.
        prefix: token id before each line, from `prefix_id`; None leaves each line's first token unscored.
        state: keeps finished micro-batches, and returns those that an earlier process finished.
    Raises:
        StateError: the state cannot be written.
    """

    def queries() -> Iterator[tuple[Line, Query]]:
        for line in lines:
            ids = line.ids if prefix is None else (prefix, *line.ids)
            yield line, Query(ids[:1], ids[1:])

    return score_keyed(lm, queries(), share=False, state=state)
