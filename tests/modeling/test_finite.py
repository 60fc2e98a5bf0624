"""NaN and infinity are refused, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from slowllm.errors import NonFiniteError
from slowllm.modeling.finite import UNKNOWN_MASK, check_finite
from slowllm.streaming.call_context import call_context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_among_many_is_found(dtype: torch.dtype, value: float) -> None:
    for place in ((0, 0, 0), (1, 4, 6), (2, 6, 32)):
        values = torch.randn(3, 7, 33).to(dtype)
        values[place] = value
        with pytest.raises(NonFiniteError, match=rf"h: .* at position \[{place[0]}, {place[1]}\]") as caught:
            check_finite("h", values)
        assert caught.value.row == place[0]


def test_infinities_that_cancel_out_are_found() -> None:
    values = torch.zeros(1, 2, 4)
    values[0, 1, 0], values[0, 1, 1] = float("inf"), float("-inf")
    with pytest.raises(NonFiniteError, match="infinity in the output"):
        check_finite("h", values)
    check_finite("h", values, infinity_is_legal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_whose_sum_is_too_large_are_no_error(dtype: torch.dtype) -> None:
    largest = torch.full((2, 3, 4096), torch.finfo(dtype).max, dtype=dtype)
    check_finite("h", largest)
    check_finite("h", -largest)


def test_only_positions_with_text_count() -> None:
    values = torch.zeros(2, 3, 4)
    values[1, 0] = float("nan")
    for mask in (torch.tensor([[1, 1, 1], [0, 1, 1]]), UNKNOWN_MASK):
        with call_context(text_mask=mask):
            check_finite("h", values)
    with call_context(text_mask=torch.ones(2, 3)), pytest.raises(NonFiniteError, match="NaN"):
        check_finite("h", values)


def test_an_empty_output_is_none() -> None:
    check_finite("h", torch.zeros(0, 3, 4))


def test_the_row_is_named_where_there_are_rows() -> None:
    values = torch.zeros(3, 2, 4)
    values[1, 0, 2] = torch.nan
    for has_rows, row in ((True, 1), (False, None)):
        with pytest.raises(NonFiniteError, match="NaN") as caught:
            check_finite("a block", values, has_rows=has_rows)
        assert caught.value.row == row
