"""Divergences are those of whole logits, in whatever chunks the two heads come by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import InputError
from slowllm.modeling.compared_heads import Divergence, HiddenPair, check_heads, compare_heads
from slowllm.modeling.head import last_hidden
from tests.support.families import VOCAB, resident

Tiny = Callable[..., Path]
IDS = torch.randint(5, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
# fp32 logits and normalizers, each rounded.
TOLERANCE = 2e-6


def divergence(a: Any, b: Any) -> Divergence:
    heads = check_heads(a.model, b.model)
    with torch.no_grad():
        hidden = [
            last_hidden(lm.model, {"input_ids": IDS, "use_cache": False})[:, :-1].flatten(0, 1)
            for lm in (a, b)
        ]
    tokens = IDS[:, 1:].flatten()
    pairs = [
        HiddenPair(*(part[rows] for part in hidden), tokens[rows]) for rows in (slice(0, 7), slice(7, None))
    ]
    found = compare_heads(*heads, pairs)
    assert len(found) == 2
    return found[0] if len(found) == 1 else _joined(found)


def _joined(parts: list[Divergence]) -> Divergence:
    sides = []
    for name in ("a", "b"):
        of_side = [getattr(part, name) for part in parts]
        fields = ("log_probs", "likeliest", "likeliest_log_probs")
        sides.append(type(of_side[0])(*(torch.cat([getattr(one, f) for one in of_side]) for f in fields)))
    return Divergence(torch.cat([part.kl for part in parts]), *sides)


def wanted(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits = resident(folder)(IDS, use_cache=False).logits[:, :-1]
    return logits.flatten(0, 1).double().log_softmax(-1)


def check(found: Divergence, a: torch.Tensor, b: torch.Tensor) -> None:
    kl = (a.exp() * (a - b)).sum(-1)
    assert (found.kl - kl).abs().max() <= TOLERANCE * max(1.0, float(kl.max()))
    assert kl.max() > 1e-4
    for side, log_probs in ((found.a, a), (found.b, b)):
        tokens = IDS[:, 1:].reshape(-1, 1)
        assert (side.log_probs - log_probs.gather(-1, tokens)[:, 0]).abs().max() <= 1e-5
        assert torch.equal(side.likeliest, log_probs.argmax(-1))
        assert (side.likeliest_log_probs - log_probs.amax(-1)).abs().max() <= 1e-5


def test_divergences_equal_those_of_whole_logits(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slowllm.modeling.compared_heads.TILE_COLUMNS", 23)
    # Two families with one vocabulary, one of which scales its logits; their heads come in different chunks.
    monkeypatch.setattr("slowllm.modeling.layout.MIN_CHUNK_BYTES", 90 * 64 * 4)
    with slowllm.load(tiny("bloom"), dtype="fp32", keep_resident=False, poison=True) as a:
        monkeypatch.setattr("slowllm.modeling.layout.MIN_CHUNK_BYTES", 50 * 64 * 4)
        with slowllm.load(tiny("cohere-scaled-logits"), dtype="fp32", keep_resident=False, poison=True) as b:
            assert 1 < len(a.layout.chunks) != len(b.layout.chunks)
            one, other = wanted(tiny("bloom")), wanted(tiny("cohere-scaled-logits"))
            check(divergence(a, b), one, other)
            check(divergence(b, a), other, one)


def test_a_model_does_not_differ_from_itself(tiny: Tiny) -> None:
    with slowllm.load(tiny("bloom"), dtype="fp32") as a, slowllm.load(tiny("bloom"), dtype="fp32") as b:
        found = divergence(a, b)
    assert torch.equal(found.kl, torch.zeros(len(found.kl)))
    assert torch.equal(found.a.log_probs, found.b.log_probs)


@pytest.mark.parametrize(("ours", "theirs"), [(-torch.inf, -torch.inf), (-torch.inf, 3.0)])
def test_what_a_rules_out_does_not_count(
    ours: float, theirs: float, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruling_out(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def transform(logits: torch.Tensor) -> torch.Tensor:
            changed = logits.clone()
            changed[..., 0] = value
            return changed

        return transform

    with slowllm.load(tiny("bloom"), dtype="fp32") as a, slowllm.load(tiny("llama-tied"), dtype="fp32") as b:
        heads = check_heads(a.model, b.model)
        for head, value in zip(heads, (ours, theirs), strict=True):
            monkeypatch.setattr(head, "logit_transform", ruling_out(value))
        hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        (found,) = compare_heads(*heads, [HiddenPair(hidden, hidden, torch.tensor([1, 2, 3, 4]))])
    assert found.kl.isfinite().all()


def test_models_of_different_vocabularies_are_refused(tiny: Tiny) -> None:
    with (
        slowllm.load(tiny("bloom"), dtype="fp32") as a,
        slowllm.load("embedded:tiny-bloom", dtype="fp32") as b,
    ):
        with pytest.raises(
            InputError, match=r"logits of 307 tokens and the other of [\d,]+, so their predictions"
        ):
            check_heads(a.model, b.model)
        a.model.get_output_embeddings().logit_transform = None
        with pytest.raises(InputError, match="BloomForCausalLM: its logits can only be computed all at once"):
            check_heads(a.model, a.model)
