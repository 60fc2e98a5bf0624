"""Where a continuation ends: at an EOS token, behind a stop string, or after the most tokens allowed."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StopStringCriteria

from slowllm.errors import CheckpointError
from slowllm.files import shown
from slowllm.inference.generation_types import OnTokens, Settings
from slowllm.inference.text import TextSide

# A vocabulary of more tokens is damaged; tables of it would take gigabytes.
_MAX_TOKENS = 1 << 23
# Criteria of different stop strings that are kept for a tokenizer; transformers keeps as many tables.
MAX_CRITERIA = 8
_criteria: weakref.WeakKeyDictionary[Any, dict[tuple[str, ...], StopStringCriteria | None]] = (
    weakref.WeakKeyDictionary()
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that end a continuation and pad a batch.

    Attributes:
        eos: each of them ends a continuation.
        pad: fills up the rows of a batch; it is masked.
    """

    eos: tuple[int, ...]
    pad: int


def special_tokens(lm: TextSide) -> SpecialTokens:
    """Return the EOS tokens of generation_config.json, else of config.json, else of the tokenizer.

    Raises:
        CheckpointError: one of them is no token id.
    """
    generation_config = getattr(getattr(lm, "model", None), "generation_config", None)
    for source in (generation_config, lm.config.get_text_config()):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            break
    else:
        eos = lm.tokenizer.eos_token_id
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    pad = getattr(generation_config, "pad_token_id", None)
    for name, ids in (("eos_token_id", eos_ids), ("pad_token_id", () if pad is None else (pad,))):
        if not all(type(token) is int and abs(token) < _MAX_TOKENS for token in ids):
            raise CheckpointError(
                f"the checkpoint's {name} is {shown(ids[0] if len(ids) == 1 else ids)}, no token id"
            )
    return SpecialTokens(eos_ids, pad if pad is not None and pad >= 0 else eos_ids[0] if eos_ids else 0)


def without_eos(ids: Sequence[int], tokens: SpecialTokens) -> tuple[int, ...]:
    """Return the ids of a continuation without an EOS token at their end."""
    return tuple(ids[:-1] if ids and ids[-1] in tokens.eos else ids)


def stop_criteria(tokenizer: Any, stop: tuple[str, ...]) -> StopStringCriteria | None:
    """Return transformers' criteria for stop strings, made once; None where no tokens can make any of them.

    Their tables grow with the vocabulary: tens of megabytes for 250,000 tokens.

    Raises:
        CheckpointError: the tokenizer has a token beyond any vocabulary.
    """
    made = _criteria.setdefault(tokenizer, {})
    if stop not in made:
        made[stop] = _make_criteria(tokenizer, stop) if stop else None
        if len(made) > MAX_CRITERIA:
            del made[next(iter(made))]
    return made[stop]


def _make_criteria(tokenizer: Any, stop: tuple[str, ...]) -> StopStringCriteria | None:
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= _MAX_TOKENS:
        raise CheckpointError(f"the tokenizer has a token {last}, beyond any vocabulary")
    try:
        return StopStringCriteria(tokenizer, list(stop))
    except ValueError as error:  # no tokens of this tokenizer can make any of them
        log.info("stop strings %s: %s", stop, error)
        return None


class EndDetector:
    """Detects whether token ids end in EOS or a stop string.

    Args:
        lm: its tokenizer says which tokens make the strings.
        settings: with the stop strings.
        tokens: with EOS.
    """

    def __init__(self, lm: TextSide, settings: Settings, tokens: SpecialTokens) -> None:
        self._eos = torch.tensor(tokens.eos, dtype=torch.int64)
        self._tokenizer, self._stop = lm.tokenizer, settings.stop
        self._strings = stop_criteria(lm.tokenizer, settings.stop)

    def has_ended(self, ids: Tensor, width: int) -> Tensor:
        """Return (B,) bool: whether the last token of each sequence (B, T) ends it.

        Args:
            ids: of prompts and continuations.
            width: of the prompts: a stop string that begins in one does not count.
        """
        ended = torch.isin(ids[:, -1], self._eos.to(ids.device))
        if self._strings is not None:
            for row in self._strings(ids, None).nonzero().flatten().tolist():
                text = new_text(self._tokenizer, ids[row].tolist(), width)
                ended[row] |= any(stop in text for stop in self._stop)
        return ended


def new_text(tokenizer: Any, ids: Sequence[int], width: int) -> str:
    """Return the text of the tokens behind the first `width`.

    All are decoded together, because a tokenizer may drop the blank before the first token that it decodes.
    """
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, whole = str(decode(list(ids[:width]))), str(decode(list(ids)))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(decode(list(ids[width:])))  # the prompt ends inside a letter


class RowMonitor(StoppingCriteria):
    """Watches the rows of one call of transformers' `generate`.

    It ends rows at EOS and stop strings, notes at which length each has ended, and reports tokens as they come.

    Args:
        detector: of ends.
        tokens: with EOS.
        numbers: of the prompts, for `on_tokens`.
        width: of the prompts, padding included.
        settings: of all prompts.
        on_tokens: see `generation.generate`.
        on_pass: called after each pass through the model with the number of tokens that the first row got.
    Attributes:
        lengths: of the rows that have ended, prompt included.
    """

    def __init__(
        self,
        detector: EndDetector,
        tokens: SpecialTokens,
        numbers: Sequence[int],
        width: int,
        settings: Settings,
        on_tokens: OnTokens | None,
        on_pass: Callable[[int], None] | None,
    ) -> None:
        self.lengths: dict[int, int] = {}
        self._detector, self._tokens, self._numbers, self._width = detector, tokens, numbers, width
        self._on_tokens, self._on_pass = on_tokens, on_pass
        self._has_beams, self._rows_each = settings.num_beams > 1, settings.num_return_sequences
        self._num_seen = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return (B,) bool: which rows have ended."""
        num_rows, length = input_ids.shape
        if self._has_beams:
            # Candidates of all prompts, likeliest first; how many rows each prompt has is up to transformers.
            firsts = range(0, num_rows, num_rows // len(self._numbers))
            self._report(input_ids, {row: (place, 0) for place, row in enumerate(firsts)})
            return self._detector.has_ended(input_ids, self._width)
        going = [row for row in range(num_rows) if row not in self.lengths]
        # With a draft several tokens come at once; the first that ends a row counts.
        for end in range(self._num_seen + 1, length + 1):
            for row in self._detector.has_ended(input_ids[:, :end], self._width).nonzero().flatten().tolist():
                self.lengths.setdefault(row, end)
        if self._on_pass is not None:
            self._on_pass(self.lengths.get(0, length) - self._num_seen)
        self._num_seen = length
        self._report(input_ids, {row: divmod(row, self._rows_each) for row in going})
        return torch.tensor([row in self.lengths for row in range(num_rows)], device=input_ids.device)

    def _report(self, input_ids: Tensor, rows: dict[int, tuple[int, int]]) -> None:
        """Call `on_tokens` for rows, each with the place of its prompt and the number of its continuation."""
        if self._on_tokens is None:
            return
        for row, (place, index) in rows.items():
            ids = input_ids[row, self._width : self.lengths.get(row)].tolist()
            self._on_tokens(self._numbers[place], index, without_eos(ids, self._tokens))
