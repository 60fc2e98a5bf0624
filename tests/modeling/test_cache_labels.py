"""What a move cannot do with a layer's keys and values is said with the index that is wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from slowllm.errors import SessionError
from slowllm.modeling.cache_labels import Move, move_layer


def layer_of(rows: int, length: int) -> DynamicLayer:
    cache, pair = DynamicCache(), torch.randn(2, rows, 1, length, 4)
    cache.update(pair[0], pair[1], 0)
    (layer,) = cache.layers
    assert isinstance(layer, DynamicLayer)
    return layer


@pytest.mark.parametrize(
    ("move", "sentence"),
    [
        (Move(5, torch.tensor([0, 3])), "names row 3, but the session has 3 rows from 0 on"),
        (Move(5, torch.tensor([-2, 2])), "names row -2, but the session has 3 rows"),
        (
            Move(1, torch.tensor([[0]]), torch.tensor([[5]])),
            "names position 5, but the session has 5 positions",
        ),
        (
            Move(1, torch.tensor([[0]]), torch.tensor([[-1]])),
            "names position -1, but the session has 5 positions",
        ),
        (Move(6), "keeps 6 of 5 positions"),
    ],
)
def test_the_index_that_is_wrong_is_named(move: Move, sentence: str) -> None:
    layer = layer_of(3, 5)
    before = layer.keys.clone()
    with pytest.raises(SessionError, match=f"a move {sentence}"):
        move_layer(layer, move)
    assert torch.equal(layer.keys, before)


def test_a_session_without_keys_and_values_cannot_be_moved() -> None:
    with pytest.raises(SessionError, match="has no keys and values yet"):
        move_layer(DynamicLayer(), Move(1))
