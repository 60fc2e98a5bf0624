"""What a teacher says of every token of texts: its log-probability, and the likeliest tokens of its place.

A student is trained on them without the teacher. Places are those of scoring: each token but the first is expected
after those before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from slowllm.errors import InputError, forward_errors
from slowllm.inference.text_batches import SWEEPS_HELD, Result, TextPasses, TokenBatch
from slowllm.inference.text_files import Text, Texts
from slowllm.modeling.top_log_probs import top_log_probs
from slowllm.planning.host_plan import padding_worth
from slowllm.planning.job import Job, Rates
from slowllm.runtime.run_identity import batch_identity, packed_as_begun, saved_packing
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM

# Of one of the likeliest tokens: its key while the head comes by; what a rider returns, and its copies; as it is kept.
_KEY_BYTES, _RETURNED_BYTES, _KEPT_BYTES = 8, 32, 4 + 2
# The tensors of a text, which grow with it; see `top_tokens`.
TENSORS = ("input_ids", "log_probs", "top_ids", "top_log_probs")


def check_num_top(num_top: int, vocabulary: int) -> None:
    """Refuse a number of likeliest tokens that the vocabulary does not have.

    Raises:
        InputError: it is less than one, or larger than the vocabulary.
    """
    if not 1 <= num_top <= vocabulary:
        raise InputError(
            f"--top {num_top} is no number of likeliest tokens; the model has {vocabulary:,}, of which 1 at least"
        )


def job_of(texts: Texts, num_top: int, rates: Rates, begun: Mapping[str, Any] | None = None) -> Job:
    """Return what the plan must know of a job.

    Args:
        texts: all of them.
        num_top: how many of the likeliest tokens of each place are kept.
        rates: of the machine.
        begun: from `state.read_job`: micro-batches are then packed as when the job was begun.
    Raises:
        StateError: the state is another version's.
    """
    packing = saved_packing(begun or {})
    num_tokens = texts.padded_tokens(1, packing[2] if packing else padding_worth(rates))
    job = Job(
        num_tokens=num_tokens,
        longest=max(1, texts.longest - 1),
        forward_only=True,
        keeps_results=False,
        held_token_bytes=num_top * (_KEY_BYTES + _RETURNED_BYTES + SWEEPS_HELD * _KEPT_BYTES),
    )
    return packed_as_begun(job, begun)


def describe(lm: StreamedLM, texts: Texts, **settings: Any) -> dict[str, Any]:
    """Return what the rows depend on, for `State`."""
    return batch_identity("teach", lm, texts=texts.digest, **settings)


def top_tokens(
    lm: StreamedLM, texts: Iterable[Text], num_top: int, *, state: State | None = None, num_done: int = 0
) -> TextPasses:
    """Return the passes of texts that find the likeliest tokens of every place.

    Of a text of L tokens, prefix included, the result has `input_ids` (L,) int32, and for each token but the first
    `log_probs` (L - 1,) float32, `top_ids` (L - 1, K) int32, from the likeliest on, and `top_log_probs` (L - 1, K)
    float16.

    Args:
        lm: a model that was opened for the job.
        texts: see `TextPasses`.
        num_top: K.
        state: see `TextPasses`.
        num_done: see `TextPasses`.
    """

    def compute(batch: TokenBatch) -> list[Result]:
        return _top_of(lm, batch, num_top)

    return TextPasses(lm, texts, compute, num_dropped=1, state=state, num_done=num_done)


def _top_of(lm: StreamedLM, batch: TokenBatch, num_top: int) -> list[Result]:
    """Pass one micro-batch through the model; runs as a rider."""
    counts = [len(ids) - 1 for ids in batch.texts]
    rows = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    positions = torch.tensor([place for count in counts for place in range(count)], dtype=torch.int64)
    tokens = torch.tensor([token for ids in batch.texts for token in ids[1:]], dtype=torch.int64)
    with forward_errors(lm.model):
        found = top_log_probs(lm.model, rows, positions, tokens, num_top, **batch.inputs)
    # One token is asked for after each place, and places are in order.
    parts: Sequence[Sequence[torch.Tensor]] = (
        found.log_probs.split(counts),
        found.top_ids.int().split(counts),
        found.top_log_probs.half().split(counts),
    )
    return [
        dict(
            zip(
                TENSORS,
                (torch.tensor(ids, dtype=torch.int32), *(part[n] for part in parts)),
                strict=True,
            )
        )
        for n, ids in enumerate(batch.texts)
    ]
