"""An online softmax gives the logarithms of a whole one, however the vocabulary is cut."""

from __future__ import annotations

import pytest
import torch

from slowllm.modeling import online_softmax
from slowllm.modeling.online_softmax import OnlineSoftmax, tiles_of

ROWS = torch.tensor([0, 0, 2, 3, 1, 2])
TOKENS = torch.tensor([0, 96, 5, 50, 49, 5])


@pytest.mark.parametrize("width", [1, 7, 50, 97, 200])
def test_log_probs_do_not_depend_on_the_tiles(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_softmax, "TILE_COLUMNS", width)
    logits = torch.randn(4, 97, generator=torch.Generator().manual_seed(0)) * 20
    softmax = OnlineSoftmax(4, ROWS, TOKENS)
    weighted = torch.zeros(4)
    values = torch.arange(97.0)
    for first, tile, _ in tiles_of(logits.T, None, 0):
        part = tile.T.clone()
        scale, here, columns = softmax.add(part, first, part.amax(-1))
        assert torch.equal(first + columns, TOKENS[here])
        weighted = weighted * scale + part @ values[first : first + len(tile)]
    found = softmax.token_logits - softmax.normalizers()[ROWS]
    assert torch.allclose(found, logits.log_softmax(-1)[ROWS, TOKENS], rtol=1e-6, atol=1e-5)
    assert torch.allclose(weighted / softmax.total, logits.softmax(-1) @ values, rtol=1e-5)


def test_a_token_of_no_tile_has_no_number() -> None:
    softmax = OnlineSoftmax(1, torch.tensor([0]), torch.tensor([5]))
    softmax.add(torch.zeros(1, 5), 0, torch.zeros(1))
    assert softmax.token_logits.isnan().all()


def test_tiles_have_their_own_part_of_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_softmax, "TILE_COLUMNS", 4)
    weight, bias = torch.arange(20.0).view(10, 2), torch.arange(10.0)
    tiles = list(tiles_of(weight, bias, 100))
    assert [first for first, _, _ in tiles] == [100, 104, 108]
    assert torch.equal(torch.cat([rows for _, rows, _ in tiles]), weight)
    assert [part.tolist() for _, _, part in tiles if part is not None] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
